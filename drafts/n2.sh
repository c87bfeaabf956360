# bash n2.sh SHA: two H200s, 600 s, on the series that waits; everything in $OUT/o.tgz. env.sh as in n1.sh
. drafts/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; J=$O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
PT="python3 -m pytest -q -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short"
g0() { export CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=2
 timeout -k 2 120 $PT -p xdist -n 4 --dist worksteal -m gpu tests/kernels/test_attention_gpu.py tests/kernels/test_gpu.py -k "attention or parts or rope or rotat or list or adamw" > $O/tker.txt 2>&1; T tker; grep -E "passed|failed|FAILED" $O/tker.txt | head
 timeout -k 2 75 python3 drafts/prefill_run.py > $O/prefill.txt 2>&1; T prefill; grep -c DIFFERENT $O/prefill.txt; tail -30 $O/prefill.txt | cut -c1-150
 unset OMP_NUM_THREADS; timeout -k 2 210 python benchmarks/serve_gpu.py --parts bf16 fp8-weights --out $J/serve_gpu.json > $O/serve_gpu.txt 2>&1; T serve_gpu; grep -E "'prefill'|'decode'" $O/serve_gpu.txt | cut -c1-170; }
g1() { export CUDA_VISIBLE_DEVICES=1 OMP_NUM_THREADS=2
 timeout -k 2 90 $PT -m gpu tests/train/test_gpu.py tests/model/test_gpu.py > $O/ttrain.txt 2>&1; T ttrain; grep -E "passed|failed|FAILED" $O/ttrain.txt | head -4
 timeout -k 2 60 $PT -p xdist -n 4 --dist worksteal -m gpu tests/serve/test_gpu.py > $O/tserve.txt 2>&1; T tserve; grep -E "passed|failed|FAILED" $O/tserve.txt | head -4
 unset OMP_NUM_THREADS; timeout -k 2 100 python benchmarks/train_gpu.py --only "benthic bf16" "benthic fp8" --out $J/train_gpu.json > $O/train_gpu.txt 2>&1; T train_gpu; tail -3 $O/train_gpu.txt | cut -c1-200; }
g0 & g1 & wait
timeout -s INT -k 5 60 $PT -m "gpu or multigpu" tests/serve/test_transfer_gpu.py tests/serve/test_early_pull_gpu.py > $O/ttransfer.txt 2>&1; T ttransfer; tail -2 $O/ttransfer.txt
nvidia-smi --query-gpu=timestamp,index,clocks.sm,power.draw,clocks_event_reasons.active --format=csv,noheader -lms 200 > $O/clocks.csv & N=$!
timeout -s INT -k 10 $((585-(SECONDS-t0))) python benchmarks/disaggregate.py --fleets 1P1D --workloads prefill-heavy --rates 10 20 --seconds 8 --seeds 1 --record /tmp/rec --out $O/dis_rec.json > $O/dis.txt 2>&1; kill $N; T dis; tail -4 $O/dis.txt | cut -c1-300
timeout -k 2 20 python benchmarks/live_steps.py /tmp/rec/1P1D --out $O/live_steps.json > $O/live.txt 2>&1; tar czf $O/rec.tgz -C /tmp/rec 1P1D; T live; tail -30 $O/live.txt | cut -c1-160
