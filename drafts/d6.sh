. .gpu/env.sh $1 >/dev/null 2>&1; unset OMP_NUM_THREADS
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O; R="python3 -m torch.distributed.run --nproc-per-node 2"
T() { pkill -9 -f train_ranks; echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
F="--set recompute=deepseek-v3 --set train.global_batch_size=96 --set train.local_batch_size=3 --set precision.weights=fp8 --set precision.matmul=fp8 --set precision.fp8_swiglu=true --set precision.e5m6_attention=true --set train.lr=1e-6"
timeout -s INT -k 3 130 $R benchmarks/train_ranks.py --full --steps 5 --layouts ep2 $F --out $O/full_fp8.json > $O/full_fp8.txt 2>&1; T full_fp8; tail -1 $O/full_fp8.txt | cut -c1-250
timeout -s INT -k 3 85 $R benchmarks/train_ranks.py --layouts ep2 dualpipe dualpipev-ep2 --set train.lr=1e-6 --out $O/ranks_1.json > $O/ranks_1.txt 2>&1; T ranks_1; grep TFLOP $O/ranks_1.txt | cut -c1-170
timeout -s INT -k 3 115 $R benchmarks/train_ranks.py --full --steps 5 --layouts ep2 --set recompute=deepseek-v3 --set train.local_batch_size=4 --set train.global_batch_size=128 --set optimizer.store_param_remainders=true --set train.lr=1e-6 --out $O/full.json > $O/full.txt 2>&1; T full; tail -1 $O/full.txt | cut -c1-200
