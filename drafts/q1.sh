# bash .gpu/q1.sh SHA: two H200: both ranks' kernels of a step of all of Moonlight, FP8 and bf16
. .gpu/env.sh $1 >/dev/null 2>&1; unset OMP_NUM_THREADS
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O/fp8 $O/bf16; R="python3 -m torch.distributed.run --nproc-per-node 2"
T() { pkill -9 -f "prof_pair"; sleep 1; echo "== T $((SECONDS-t0)) $*"; tar czf $OUT/o.tgz -C /tmp o 2>/dev/null; }
F="--set recompute=deepseek-v3 --set precision.weights=fp8 --set precision.matmul=fp8 --set precision.fp8_swiglu=true --set precision.e5m6_attention=true --set train.lr=1e-6"
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True timeout -k 3 150 $R .gpu/d/prof_pair.py $O/fp8 $F > $O/fp8.txt 2>&1; T fp8; grep -E "^rank" $O/fp8.txt
[ -n "$2" ] && { timeout -k 3 130 $R .gpu/d/prof_pair.py $O/bf16 --set optimizer.store_param_remainders=true --set recompute=deepseek-v3 --set train.lr=1e-6 > $O/bf16.txt 2>&1; T bf16; grep -E "^rank|Error" $O/bf16.txt; }
nvidia-smi --query-gpu=clocks.sm,power.draw,temperature.gpu --format=csv,noheader
