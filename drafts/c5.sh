# bash drafts/c5.sh SHA: one H200, the tree with the waiting commits; everything in $OUT/o.tgz
. drafts/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O; D=drafts
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
PT="python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -p xdist"
for s in mid store; do (OMP_NUM_THREADS=1 timeout -k 2 120 python3 $D/run_$s.py checks > $O/${s}_check.txt 2>&1; T ${s}_check; tail -12 $O/${s}_check.txt | cut -c1-220) & done
(OMP_NUM_THREADS=1 timeout -k 2 120 $PT -n 6 --dist worksteal -m gpu tests/kernels/test_attention_gpu.py tests/kernels/test_launch_gpu.py -k "64 or equal or launch" > $O/tker.txt 2>&1; T tker; grep -E "FAILED|passed|failed" $O/tker.txt | tail -5) &
wait
timeout -k 2 60 python3 $D/run_mid.py times > $O/mid_times.txt 2>&1; T mid_times; cat $O/mid_times.txt | cut -c1-150
timeout -k 2 120 python3 $D/run_fp8_gradient.py > $O/grad.txt 2>&1; T grad; tail -40 $O/grad.txt | cut -c1-150
for s in store gated; do [ -e $D/run_$s.py ] && timeout -k 2 60 python3 $D/run_$s.py $([ $s = store ] && echo times) > $O/${s}_times.txt 2>&1; T ${s}_times; tail -12 $O/${s}_times.txt | cut -c1-150; done
timeout -k 2 60 python3 benchmarks/moe_layer.py --out $O/moe_layer.json > $O/moe_layer.txt 2>&1; T moe_layer; tail -4 $O/moe_layer.txt | cut -c1-200
timeout -k 2 130 python3 benchmarks/start.py --runs 2 --folder /dev/shm/moonlight --out $O/start.json > $O/start.txt 2>&1; T start; tail -3 $O/start.txt | cut -c1-200
L=$((560-(SECONDS-t0))); [ $L -gt 40 ] && timeout -k 2 $L python3 benchmarks/kernels.py --only fp8_products --out $O/k_fp8.json > $O/k_fp8.txt 2>&1; T k_fp8; grep -E "fp8_linear" $O/k_fp8.txt | cut -c1-130 | head -50
