# bash .gpu/e6.sh SHA: one H200: tests, training, a layer; within 400 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
PT="python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -p xdist"
timeout -k 2 130 python3 benchmarks/train_gpu.py --lr 1e-6 --only "benthic bf16" "benthic fp8" "transformers, grouped_mm experts" --out $O/train_gpu.json > $O/train_gpu.txt 2>&1; T train_gpu; tail -4 $O/train_gpu.txt | cut -c1-150
OMP_NUM_THREADS=1 timeout -k 2 100 $PT -n 8 --dist worksteal -m gpu tests/kernels/test_gpu.py tests/train/test_gpu.py tests/kernels/test_repeats_gpu.py -k "fp8 or train or experts or squares or best or greedy or repeats" > $O/tests.txt 2>&1; T tests $?; grep -E "^FAILED|^ERROR|passed|failed" $O/tests.txt | tail -8 | cut -c1-200
timeout -k 2 100 python3 benchmarks/moe_layer.py --out $O/moe_layer.json > $O/moe_layer.txt 2>&1; T moe_layer $?; tail -4 $O/moe_layer.txt | cut -c1-200
