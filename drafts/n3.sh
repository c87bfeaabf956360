# bash n3.sh SHA: two H200s, 600 s: all of Moonlight, slots of one row, what hides. Everything in $OUT/o.tgz
. drafts/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
R="python3 -m torch.distributed.run --nproc-per-node 2"; B="--set recompute=deepseek-v3 --set train.local_batch_size=4"
full() { timeout -s INT -k 5 $1 $R benchmarks/train_ranks.py --full --steps $2 --layouts ep2 $B "${@:4}" --out $O/$3.json > $O/$3.txt 2>&1; T $3; tail -1 $O/$3.txt | cut -c1-200; }
full 130 5 full_gbs128 --set train.global_batch_size=128 --set optimizer.store_param_remainders=true
full 110 6 full_fp8 --set train.global_batch_size=32 --set precision.weights=fp8 --set precision.matmul=fp8
timeout -s INT -k 5 130 $R benchmarks/train_ranks.py --layouts zb-h1 ep2 dualpipe dualpipev-ep2 --spans $O/spans --out $O/ranks1.json > $O/ranks1.txt 2>&1; T ranks1; tail -5 $O/ranks1.txt | cut -c1-160
timeout -s INT -k 5 100 $R benchmarks/hidden.py --layouts dualpipev-ep2 --set train.local_batch_size=4 --set train.global_batch_size=128 --out $O/hidden.json > $O/hidden.txt 2>&1; T hidden; tail -3 $O/hidden.txt | cut -c1-200
timeout -k 2 $((590-(SECONDS-t0))) benthic calibrate --out $O/calibrate.json > $O/calibrate.txt 2>&1; T calibrate; tail -5 $O/calibrate.txt
