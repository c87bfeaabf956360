# bash .gpu/f3.sh SHA: one H200: ways of a decode step, tests, training, a layer; within 480 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
PT="python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -p xdist"
timeout -k 2 130 python3 .gpu/d/run_ways.py $O/ways_trace.txt bf16 256 128 64 1 > $O/ways.txt 2>&1; T ways $?; grep -v Warn $O/ways.txt | cut -c1-330 | tail -8
run() { n=$1; s=$2; shift 2; OMP_NUM_THREADS=1 timeout -s INT -k 8 $s $PT -n 8 --dist worksteal -m gpu "$@" > $O/$n.txt 2>&1; T $n $?; grep -E "^FAILED|^ERROR|passed|failed|^E  " $O/$n.txt | tail -8 | cut -c1-200; }
run dozens 70 tests/kernels/test_gpu.py tests/serve/test_aside.py tests/serve/test_gpu.py -k "dozens or write_into or documented or serve or stream or early or graph"
timeout -k 2 210 python3 benchmarks/train_gpu.py --lr 1e-6 --only "benthic bf16" "benthic fp8" "transformers, grouped_mm experts" --out $O/train_gpu.json > $O/train_gpu.txt 2>&1; T train_gpu $?; tail -4 $O/train_gpu.txt | cut -c1-150
timeout -k 2 80 python3 benchmarks/moe_layer.py --out $O/moe_layer.json > $O/moe_layer.txt 2>&1; T moe_layer $?; tail -4 $O/moe_layer.txt | cut -c1-200
