# bash .gpu/p3.sh SHA: two H200: the way of a request, steps with drawn tokens on both GPUs, then 1P1D; within 590 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
for g in 0 1; do (CUDA_VISIBLE_DEVICES=$g timeout -k 2 150 python3 benchmarks/serve_gpu.py --parts bf16 --temperature 1 --out $O/serve_gpu_$g.json > $O/serve_gpu_$g.txt 2>&1) & done; wait; T serve_gpu; for g in 0 1; do grep -E "prefill|decode|roofs" $O/serve_gpu_$g.txt | cut -c1-130 | tail -12; done
timeout -s INT -k 4 100 python3 benchmarks/front.py --ways --fronts 1 4 --out $O/front_ways.json > $O/ways.txt 2>&1; T ways $?; tail -6 $O/ways.txt
timeout -s INT -k 8 300 python3 benchmarks/served_alone.py --fleet 1P1D --seconds 10 --until $((575-SECONDS+t0)) --out $O/served.json > $O/served.txt 2>&1; T served $?
grep -E "^up|^1P1D|requests/s|no time|warnings|Error" $O/served.txt | cut -c1-170
