# bash .gpu/f4.sh SHA: one H200: a few tests, steps of a server, then one under load; within 590 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
PT="python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -p xdist"
OMP_NUM_THREADS=1 timeout -s INT -k 5 45 $PT -n 8 --dist worksteal -m gpu tests/kernels/test_gpu.py tests/serve/test_aside.py -k "linear_swiglu or dozens or stream" > $O/tests.txt 2>&1; T tests $?; grep -E "^FAILED|^ERROR|passed|failed|^E  " $O/tests.txt | tail -8 | cut -c1-200
timeout -k 2 235 python3 benchmarks/serve_gpu.py --parts bf16 --out $O/serve_gpu.json > $O/serve_gpu.txt 2>&1; T serve_gpu $?; grep -E "prefill|decode" $O/serve_gpu.txt | cut -c1-150 | head -20; tail -2 $O/serve_gpu.txt | cut -c1-200
left=$((575-SECONDS+t0)); timeout -s INT -k 8 $left python3 benchmarks/served_alone.py --seconds 10 --until $((left-10)) --out $O/served_alone.json > $O/served_alone.txt 2>&1; T served_alone $?
grep -E "^up|^1 colo" $O/served_alone.txt | sed -E "s/'(attainment|completed|median_ttft_ms|p90_ttft_ms|median_tpot_ms|p90_tpot_ms)'://g; s/([0-9]\.[0-9]{2})[0-9]+/\1/g" | cut -c1-110; grep -E "requests/s|no time|warnings" $O/served_alone.txt | tail -5; grep -E "^[A-Za-z]*Error|^  .*(ERROR|WARNING)" $O/served_alone.txt | tail -3 | cut -c1-250
