# bash .gpu/d1.sh SHA: one H200: steps of a server, then one under load, both on one machine; within 520 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
timeout -k 2 170 python3 benchmarks/serve_gpu.py --parts bf16 --out $O/serve_gpu.json > $O/serve_gpu.txt 2>&1; T serve_gpu $?; grep -E "prefill|decode" $O/serve_gpu.txt | cut -c1-150 | head -20; tail -2 $O/serve_gpu.txt | cut -c1-200
timeout -s INT -k 8 260 python3 benchmarks/served_alone.py --seconds 10 --until 250 --out $O/served_alone.json > $O/served_alone.txt 2>&1; T served_alone $?
grep -E "^up|^1 colo" $O/served_alone.txt | sed -E "s/'(attainment|completed|median_ttft_ms|p90_ttft_ms|median_tpot_ms|p90_tpot_ms)'://g; s/([0-9]\.[0-9]{2})[0-9]+/\1/g" | cut -c1-110; grep -E "requests/s|no time|warnings" $O/served_alone.txt; grep -E "^[A-Za-z]*Error|^  .*(ERROR|WARNING)" $O/served_alone.txt | tail -3 | cut -c1-250
timeout -s INT -k 4 40 python3 benchmarks/front.py --streams 64 1024 --prompts 512 4096 --out $O/front.json > $O/front.txt 2>&1; T front $?; grep "^{" $O/front.txt | cut -c1-160
timeout 6 python3 benchmarks/plan_alone.py --served $O/served_alone.json --out $O/plan_alone.json > $O/plan_alone.txt 2>&1; tail -6 $O/plan_alone.txt | cut -c1-120; T end
