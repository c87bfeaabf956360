# bash drafts/n1.sh SHA: two H200s, 600 s, on the series that waits; everything in $OUT/o.tgz
export PYTHONPATH=$PWD/src NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 PYTHONUNBUFFERED=1
t0=$SECONDS; O=/tmp/o; J=$O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
PT="python3 -m pytest -q -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short"
R="python3 -m torch.distributed.run"
g0() { export CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=2
 timeout -k 2 110 $PT -p xdist -n 4 --dist worksteal -m gpu tests/kernels/test_launch_gpu.py tests/kernels/test_gpu.py -k "launch or remembered or gate or norm or attention or heads or copies or expert or grouped or cross_entropy or loss or adamw or table_chooses" > $O/tker.txt 2>&1; T tker; grep -E "passed|failed|FAILED" $O/tker.txt | head
 timeout -k 2 70 python3 drafts/h1_check.py > $O/h1.txt 2>&1; T h1; grep -c MISMATCH $O/h1.txt; tail -30 $O/h1.txt | cut -c1-150
 timeout -k 2 40 python3 drafts/run_loss.py > $O/loss.txt 2>&1; T loss; tail -34 $O/loss.txt | cut -c1-120
 unset OMP_NUM_THREADS; timeout -k 2 150 python benchmarks/serve_gpu.py --parts bf16 --out $J/serve_gpu.json > $O/serve_gpu.txt 2>&1; T serve_gpu; grep -E "prefill|decode" $O/serve_gpu.txt | cut -c1-200; }
g1() { export CUDA_VISIBLE_DEVICES=1 OMP_NUM_THREADS=2
 timeout -k 2 90 $PT -m gpu tests/train/test_gpu.py tests/model/test_gpu.py > $O/ttrain.txt 2>&1; T ttrain; grep -E "passed|failed|FAILED" $O/ttrain.txt | head -4
 timeout -k 2 60 $PT -p xdist -n 4 --dist worksteal -m gpu tests/serve/test_gpu.py > $O/tserve.txt 2>&1; T tserve; grep -E "passed|failed|FAILED" $O/tserve.txt | head -4
 unset OMP_NUM_THREADS; timeout -k 2 60 $R --nproc-per-node 1 --master-port 29511 drafts/mystery.py one > $O/m_one.txt 2>&1; T one; grep -E "==|launch|span" $O/m_one.txt | cut -c1-250
 timeout -k 2 150 python benchmarks/train_gpu.py --only "benthic bf16" "benthic fp8" "benthic bf16, rows one by one" "transformers, grouped_mm experts" --out $J/train_gpu.json > $O/train_gpu.txt 2>&1; T train_gpu; tail -5 $O/train_gpu.txt | cut -c1-200; }
g0 & g1 & wait
timeout -s INT -k 2 60 $R --nproc-per-node 2 drafts/mystery.py ep2 > $O/m_ep2.txt 2>&1; T ep2; grep -E "==|launch|span" $O/m_ep2.txt | cut -c1-250
L=$((590-(SECONDS-t0))); OUT2=$OUT; OUT=$O timeout -s INT -k 2 $L bash drafts/h6_check.sh $1 > $O/h6.txt 2>&1; T h6; tail -30 $O/h6.txt | cut -c1-180
