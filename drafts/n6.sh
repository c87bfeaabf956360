# bash n6.sh SHA: two H200
. .gpu/env.sh $1 >/dev/null 2>&1; unset OMP_NUM_THREADS
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O; R="python3 -m torch.distributed.run --nproc-per-node 2"
T() { pkill -9 -f train_ranks; echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
F="--set recompute=deepseek-v3 --set train.global_batch_size=96 --set train.local_batch_size=3 --set precision.weights=fp8 --set precision.matmul=fp8 --set precision.fp8_swiglu=true --set precision.e5m6_attention=true"
timeout -s INT -k 5 150 $R benchmarks/train_ranks.py --full --steps 5 --layouts ep2 $F --out $O/full_fp8.json > $O/full_fp8.txt 2>&1; T full_fp8; tail -1 $O/full_fp8.txt | cut -c1-200
timeout -s INT -k 5 150 $R benchmarks/train_ranks.py --full --steps 5 --layouts ep2 --set recompute=deepseek-v3 --set train.local_batch_size=4 --set train.global_batch_size=128 --set optimizer.store_param_remainders=true --out $O/full.json > $O/full.txt 2>&1; T full; tail -1 $O/full.txt | cut -c1-200
for w in 2 2000; do timeout -s INT -k 5 70 $R benchmarks/train_ranks.py --layouts zb-h1 ep2 dualpipe dualpipev-ep2 --set train.warmup_steps=$w --spans $O/spans$w --out $O/ranks_$w.json > $O/ranks_$w.txt 2>&1; T ranks $w; tail -5 $O/ranks_$w.txt | cut -c1-150; done
timeout -s INT -k 5 100 $R benchmarks/train_ranks.py --set train.local_batch_size=4 --set train.global_batch_size=32 --set train.warmup_steps=2000 --out $O/ranks4.json > $O/ranks4.txt 2>&1; T ranks4; tail -10 $O/ranks4.txt | cut -c1-150
timeout -k 5 20 python3 .gpu/bidir.py > $O/bidir.txt 2>&1; T bidir; cat $O/bidir.txt
