# bash drafts/p2.sh SHA [FLEET]: two H200: single steps of one, then a fleet at rates around its goodput, on one machine; within 590 s
. drafts/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
(CUDA_VISIBLE_DEVICES=1 timeout -s INT -k 4 50 python3 benchmarks/front.py --streams 64 1024 --prompts 512 4096 --out $O/front.json > $O/front.txt 2>&1) &
CUDA_VISIBLE_DEVICES=0 timeout -k 2 150 python3 benchmarks/serve_gpu.py --parts bf16 --out $O/serve_gpu.json > $O/serve_gpu.txt 2>&1; T serve_gpu $?; grep -E "prefill|decode|roofs" $O/serve_gpu.txt | cut -c1-150 | head -20
timeout -s INT -k 8 400 python3 benchmarks/served_alone.py --fleet "${2:-1P1D}" --seconds 10 --until $((575-SECONDS+t0)) --out $O/served.json > $O/served.txt 2>&1; T served $?
grep -E "^up|^1P1D|^2 colo|requests/s|no time|warnings|Error" $O/served.txt | cut -c1-170
# then: benthic plan engine serve_gpu.json ... --out engine.json; python benchmarks/plan_alone.py --served served.json --engine engine.json
