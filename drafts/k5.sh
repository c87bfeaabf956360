# bash .gpu/k5.sh SHA: one H200: tests of what waits, decode with late sums on and off, gradients that begin apart, the head, training beside a peer; within 590 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
PT="python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -p xdist"
OMP_NUM_THREADS=1 timeout -s INT -k 5 75 $PT -n 8 --dist worksteal tests/kernels/kernel_checks.py tests/kernels/test_launch_gpu.py tests/model/test_gpu.py tests/serve/test_gpu.py -k "normed_where or come_home or launch or early or serve or model" > $O/tests.txt 2>&1; T tests $?; grep -E "^FAILED|^ERROR|passed|failed|^E  " $O/tests.txt | tail -8 | cut -c1-200
timeout -k 2 140 python3 .gpu/d/run_late.py $O/late_trace.txt bf16 256 64 1 512 > $O/late.txt 2>&1; T late $?; grep batch $O/late.txt | cut -c1-250; tail -2 $O/late.txt | cut -c1-200
timeout -k 2 85 python3 .gpu/d/run_stagger.py --until 78 > $O/stagger.txt 2>&1; T stagger $?; tail -14 $O/stagger.txt | cut -c1-200
timeout -k 2 50 python3 benchmarks/training_kernels.py --only loss --out $O/training_kernels.json > $O/head.txt 2>&1; T head $?; tail -25 $O/head.txt | cut -c1-120
timeout -k 2 130 python3 benchmarks/train_gpu.py --lr 1e-6 --only "benthic bf16" "benthic fp8" "benthic bf16, rows one by one" "transformers, grouped_mm experts" --out $O/train_gpu.json > $O/train_gpu.txt 2>&1; T train $?; grep tokens/s $O/train_gpu.txt | cut -c1-150
left=$((588-SECONDS+t0)); [ $left -gt 60 ] && timeout -k 2 $left python3 benchmarks/serve_gpu.py --parts bf16 --out $O/serve_gpu.json > $O/serve_gpu.txt 2>&1; T serve $?; grep -E "prefill|decode" $O/serve_gpu.txt | cut -c1-150 | head -20
