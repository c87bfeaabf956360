# bash .gpu/e7.sh SHA: one H200: FP8 training before and after, then experts' kernels; within 300 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
cp .gpu/d/gaps2.py /tmp/gaps.py
for v in main new; do mkdir -p /tmp/v/$v; tar xzf .gpu/$v.tgz -C /tmp/v/$v; done
for v in new main new; do
(cd /tmp/v/$v && PYTHONPATH=/tmp/site:/tmp/v/$v/src timeout -k 2 75 python3 /tmp/gaps.py $O/gaps_$v.txt > $O/gaps_$v.log 2>&1); T gaps $v $?; head -3 $O/gaps_$v.txt | cut -c1-170; tail -1 $O/gaps_$v.log | cut -c1-150
done
timeout -k 2 60 python3 benchmarks/kernels.py --only experts --out $O/experts.json > $O/experts.txt 2>&1; T experts $?; tail -26 $O/experts.txt | cut -c1-150
