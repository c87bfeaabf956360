# bash drafts/p1.sh SHA: two H200: the exchange with ranks in turn, its tests, calibrate by two ranks, layouts with their own host, all of Moonlight in FP8 under the profiler; within 590 s
. drafts/env.sh $1 >/dev/null 2>&1; unset OMP_NUM_THREADS
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O; R="python3 -m torch.distributed.run --nproc-per-node 2"
T() { pkill -9 -f "train_ranks|benthic calibrate|test_exchange_gpu|prof_full"; sleep 1; echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
F="--set recompute=deepseek-v3 --set precision.weights=fp8 --set precision.matmul=fp8 --set precision.fp8_swiglu=true --set precision.e5m6_attention=true --set train.lr=1e-6"
CUDA_VISIBLE_DEVICES=0 timeout -k 2 60 python3 drafts/run_grad.py --until 45 > $O/grad.txt 2>&1; T grad $?; grep -E "fp8|Error" $O/grad.txt | cut -c1-200
timeout -s INT -k 3 40 $R benchmarks/exchange.py --out $O/exchange.json > $O/exchange.txt 2>&1; T exchange $?; grep -E "4096.*bf16'.*graph|CUDA graph" $O/exchange.txt | grep "wire='bf16'" | cut -c1-150
timeout -k 3 80 python3 -m pytest -v -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short -m multigpu tests/parallel/test_exchange_gpu.py > $O/tests.txt 2>&1; T tests $?; grep -E "^FAILED|^ERROR|passed|failed|^E  " $O/tests.txt | tail -4 | cut -c1-200
timeout -k 3 135 $R -m benthic calibrate --out $O/calibrate_2_h200.json > $O/calibrate.txt 2>&1; T calibrate $?; grep -E "host|nvlink|points in|wrote|Error" $O/calibrate.txt | cut -c1-150
timeout -s INT -k 3 90 $R benchmarks/train_ranks.py --layouts zb-h1 ep2 dualpipe dualpipev-ep2 --set train.lr=1e-6 --out $O/train_ranks.json > $O/ranks_1.txt 2>&1; T ranks_1; grep TFLOP $O/ranks_1.txt | cut -c1-170
timeout -s INT -k 3 100 $R benchmarks/train_ranks.py --layouts pp2 ep2 zero3 dualpipe zb-h1 dualpipev-ep2 tp2 --set train.local_batch_size=4 --set train.global_batch_size=32 --set train.lr=1e-6 --out $O/train_ranks_4_rows.json > $O/ranks_4.txt 2>&1; T ranks_4; grep TFLOP $O/ranks_4.txt | cut -c1-170
left=$((588-SECONDS+t0)); [ $left -gt 100 ] && PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True timeout -k 3 $left $R drafts/prof_full.py $O/prof_full.txt $F > $O/prof_full.out 2>&1; T prof_full $?; head -60 $O/prof_full.txt | cut -c1-150; tail -2 $O/prof_full.out | cut -c1-200
