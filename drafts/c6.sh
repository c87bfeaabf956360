# bash c6.sh SHA: one H200, the program that is decided on
. drafts/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
timeout -k 2 150 python3 benchmarks/train_gpu.py --lr 1e-6 --only "benthic bf16" "benthic bf16, rows one by one" "benthic fp8" "transformers, grouped_mm experts" --out $O/train_gpu.json > $O/train_gpu.txt 2>&1; T train_gpu; tail -5 $O/train_gpu.txt | cut -c1-150
for s in "" "--set train.warmup_steps=2000" "--set train.local_batch_size=4 --set train.global_batch_size=32"; do timeout -k 2 60 python3 -m torch.distributed.run --nproc-per-node 1 benchmarks/train_ranks.py --layouts $s --out "$O/ranks1$(echo $s | tr -dc a-z0-9 | tail -c 12).json" > $O/ranks1.txt 2>&1; T ranks1 $s; tail -2 $O/ranks1.txt | cut -c1-150; done
timeout -k 2 250 python3 benchmarks/serve_gpu.py --parts bf16 fp8-weights --out $O/serve_gpu.json > $O/serve_gpu.txt 2>&1; T serve_gpu; grep -E "prefill|decode" $O/serve_gpu.txt | cut -c1-150 | head -40
timeout -k 2 80 python3 -m benthic calibrate --out $O/calibrate.json > $O/calibrate.txt 2>&1; T calibrate
timeout -k 2 200 python3 benchmarks/sanitize.py --timeout 100 --out $O/sanitize.json > $O/sanitize.txt 2>&1; T sanitize; tail -8 $O/sanitize.txt | cut -c1-200
