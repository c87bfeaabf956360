# bash .gpu/k4.sh SHA: two H200: host and links, layouts that wait for the host, all of Moonlight in FP8 with 3 and 4 rows, both ways of the link, the exchange, what hides; within 595 s
. .gpu/env.sh $1 >/dev/null 2>&1; unset OMP_NUM_THREADS
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O; R="python3 -m torch.distributed.run --nproc-per-node 2"
T() { pkill -9 -f train_ranks; pkill -9 -f hidden.py; echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
F="--set recompute=deepseek-v3 --set precision.weights=fp8 --set precision.matmul=fp8 --set precision.fp8_swiglu=true --set precision.e5m6_attention=true --set train.lr=1e-6"
timeout 25 python3 .gpu/d/bidir.py > $O/bidir.txt 2>&1; T bidir; cat $O/bidir.txt | cut -c1-150
timeout -k 3 125 $R -m benthic calibrate --out $O/calibrate_2_h200.json > $O/calibrate.txt 2>&1; T calibrate $?; grep -E "host|nvlink|wrote|Error" $O/calibrate.txt | cut -c1-150
timeout -s INT -k 3 70 $R benchmarks/train_ranks.py --layouts zb-h1 ep2 dualpipe dualpipev-ep2 --set train.lr=1e-6 --out $O/train_ranks.json > $O/ranks_1.txt 2>&1; T ranks_1; grep TFLOP $O/ranks_1.txt | cut -c1-170
timeout -s INT -k 3 145 $R benchmarks/train_ranks.py --full --steps 5 --layouts ep2 $F --set train.global_batch_size=96 --set train.local_batch_size=3 --out $O/train_full_fp8.json > $O/full_fp8.txt 2>&1; T full_fp8; tail -1 $O/full_fp8.txt | cut -c1-250
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True timeout -s INT -k 3 80 $R benchmarks/train_ranks.py --full --steps 5 --layouts ep2 $F --set train.global_batch_size=96 --set train.local_batch_size=4 --out $O/train_full_fp8_4.json > $O/full_fp8_4.txt 2>&1; T full_fp8_4; tail -1 $O/full_fp8_4.txt | cut -c1-250
timeout -s INT -k 3 60 $R benchmarks/exchange.py --out $O/exchange.json > $O/exchange.txt 2>&1; T exchange; grep -E "nvlink|all_to" $O/exchange.txt | head -24 | cut -c1-130
timeout -s INT -k 3 60 $R benchmarks/hidden.py --layouts dualpipev-ep2 --set train.local_batch_size=8 --set train.global_batch_size=256 --set train.lr=1e-6 --out $O/hidden_8_rows.json > $O/hidden.txt 2>&1; T hidden; grep hidden $O/hidden.txt | cut -c1-200
left=$((592-SECONDS+t0)); [ $left -gt 20 ] && timeout -k 3 $left python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -m multigpu tests/parallel/test_exchange_gpu.py > $O/tests.txt 2>&1; T tests $?; grep -E "^FAILED|^ERROR|passed|failed" $O/tests.txt | tail -4 | cut -c1-200
