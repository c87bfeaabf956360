# bash drafts/h6_check.sh SHA  (two H200s, about 120 s): checks, then the exchange alone, then what hides
export PYTHONPATH=$PWD/src NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 PYTHONUNBUFFERED=1
t0=$SECONDS; nvidia-smi --query-gpu=name --format=csv,noheader
run="python3 -m torch.distributed.run --nproc-per-node 2"
timeout -k 2 45 python3 -m pytest -q -x -p no:cacheprovider -m multigpu tests/parallel/test_exchange_gpu.py -k "beside or graph" 2>&1 | tail -15 | tee $OUT/h6_tests.txt; echo T $((SECONDS-t0))
timeout -k 2 35 $run benchmarks/exchange.py --tokens 4096 --repeats 30 --out $OUT/exchange.json 2>&1 | grep "Row(\|rror\|disagree" | tee $OUT/h6_exchange.txt; echo T $((SECONDS-t0))
timeout -k 2 50 $run benchmarks/hidden.py --layouts dualpipev-ep2 --set train.local_batch_size=4 --set train.global_batch_size=32 --out $OUT/hidden.json 2>&1 | tail -12 | tee $OUT/h6_hidden.txt; echo T $((SECONDS-t0))
# when there is more time: bits against the all-to-all exchange (60 s), DeepSeek-V3's size fifty times, all layouts
# timeout -k 2 120 python3 -m pytest -q -p no:cacheprovider -m multigpu tests/parallel/test_exchange_gpu.py -k "bits or large" 2>&1 | tail -15
# timeout -k 2 90 $run benchmarks/hidden.py --out $OUT/hidden_1.json 2>&1 | tail -5
