# bash .gpu/e4.sh SHA: one H200: ways in rotated order; a server; kernels of training; tests; within 460 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
timeout -k 2 60 python3 .gpu/d/run_order.py --until 50 > $O/order.txt 2>&1; T order $?; grep -vi warn $O/order.txt | tail -30 | cut -c1-190
timeout -k 2 170 python3 benchmarks/serve_gpu.py --parts bf16 --out $O/serve_gpu.json > $O/serve_gpu.txt 2>&1; T serve_gpu $?; grep -E "prefill|decode|roofs|beside" $O/serve_gpu.txt | cut -c1-190 | head -24; tail -1 $O/serve_gpu.txt | cut -c1-200
timeout -k 2 100 python3 .gpu/d/prof_train.py $O/prof_train.txt > $O/prof_train.log 2>&1; T prof_train $?; grep == $O/prof_train.txt; tail -1 $O/prof_train.log | cut -c1-200
PT="python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -p xdist"
OMP_NUM_THREADS=1 timeout -k 2 100 $PT -n 6 --dist worksteal -m gpu tests/serve/test_gpu.py tests/kernels/test_gpu.py tests/model tests/train/test_gpu.py tests/kernels/test_attention_gpu.py -k "serve or grouped or experts or best or greedy or permute or model or train or attention" > $O/tests.txt 2>&1; T tests $?; grep -E "^FAILED|^ERROR|passed|failed" $O/tests.txt | tail -8 | cut -c1-200
