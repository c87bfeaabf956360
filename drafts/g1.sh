# bash .gpu/g1.sh SHA: two H200: an exchange's tests, all of Moonlight in FP8 and bf16, layouts; within 590 s
. .gpu/env.sh $1 >/dev/null 2>&1; unset OMP_NUM_THREADS
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O; R="python3 -m torch.distributed.run --nproc-per-node 2"
T() { pkill -9 -f train_ranks; echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
F="--set recompute=deepseek-v3 --set train.global_batch_size=96 --set train.local_batch_size=3 --set precision.weights=fp8 --set precision.matmul=fp8 --set precision.fp8_swiglu=true --set precision.e5m6_attention=true --set train.lr=1e-6"
timeout -s INT -k 3 130 $R benchmarks/train_ranks.py --full --steps 5 --layouts ep2 $F --out $O/train_full_fp8.json > $O/full_fp8.txt 2>&1; T full_fp8; tail -1 $O/full_fp8.txt | cut -c1-250
timeout -s INT -k 3 115 $R benchmarks/train_ranks.py --full --steps 5 --layouts ep2 --set recompute=deepseek-v3 --set train.local_batch_size=4 --set train.global_batch_size=128 --set optimizer.store_param_remainders=true --set train.lr=1e-6 --out $O/train_full.json > $O/full.txt 2>&1; T full; tail -1 $O/full.txt | cut -c1-200
timeout -s INT -k 3 125 $R benchmarks/train_ranks.py --set train.local_batch_size=4 --set train.global_batch_size=32 --set train.lr=1e-6 --out $O/train_ranks_4_rows.json > $O/ranks_4.txt 2>&1; T ranks_4; grep TFLOP $O/ranks_4.txt | cut -c1-170
timeout -s INT -k 3 90 $R benchmarks/train_ranks.py --layouts zb-h1 ep2 dualpipe dualpipev-ep2 --set train.lr=1e-6 --out $O/train_ranks.json > $O/ranks_1.txt 2>&1; T ranks_1; grep TFLOP $O/ranks_1.txt | cut -c1-170
timeout -k 3 60 python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -m multigpu tests/parallel > $O/tests.txt 2>&1; T tests $?; grep -E "^FAILED|^ERROR|passed|failed" $O/tests.txt | tail -4 | cut -c1-200
