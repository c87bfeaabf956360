# bash .gpu/h1.sh SHA: one H200: FP8 weights' ways (on join), the machine's calibration, experts' kernels; within 420 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
timeout -k 2 150 python3 .gpu/d/run_ways_fp8.py $O/ways_trace.txt fp8-weights 64 32 256 1 > $O/ways.txt 2>&1; T ways $?; grep batch $O/ways.txt | cut -c1-250
timeout -k 2 150 python3 -m benthic calibrate --out $O/calibrate_h200.json > $O/calibrate.txt 2>&1; T calibrate $?; tail -5 $O/calibrate.txt | cut -c1-200
timeout -k 2 100 python3 benchmarks/kernels.py --only experts copies --out $O/experts.json > $O/experts.txt 2>&1; T experts $?; tail -40 $O/experts.txt | cut -c1-120
