. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
PT="python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -p xdist"
timeout -k 2 25 python3 .gpu/prio.py > $O/prio.txt 2>&1; T prio; grep -v Warn $O/prio.txt | tail -9 | cut -c1-260
OMP_NUM_THREADS=1 timeout -k 2 110 $PT -n 6 --dist worksteal -m gpu tests/model tests/train/test_gpu.py tests/kernels/test_gpu.py -k "model or train or swiglu or squares or both or tiles or columns" > $O/tgpu.txt 2>&1; T tgpu $?; grep -E "FAILED|ERROR|passed|failed" $O/tgpu.txt | tail -8 | cut -c1-200
timeout -k 2 100 python3 benchmarks/moe_layer.py --out $O/moe_layer.json > $O/moe_layer.txt 2>&1; T moe_layer $?; tail -4 $O/moe_layer.txt | cut -c1-200
timeout -k 2 150 python3 benchmarks/train_gpu.py --lr 1e-6 --only "benthic bf16" "benthic bf16, rows one by one" "benthic fp8" "transformers, grouped_mm experts" --out $O/train_gpu.json > $O/train_gpu.txt 2>&1; T train_gpu; tail -5 $O/train_gpu.txt | cut -c1-150
timeout -k 2 120 python3 benchmarks/kernels.py --only fp8 fp8_fused copies update --out $O/k_rest.json > $O/k_rest.txt 2>&1; T k_rest $?; tail -30 $O/k_rest.txt | cut -c1-150
