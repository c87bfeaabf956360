# bash n5.sh SHA: two H200s. Everything in $OUT/o.tgz
. drafts/env.sh $1 >/dev/null 2>&1
tar xzf drafts/drafts.tgz -C /tmp; t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
T() { echo "== T $((SECONDS-t0)) $*"; tar czf /tmp/o.$BASHPID.tgz -C /tmp o 2>/dev/null; mv /tmp/o.$BASHPID.tgz $OUT/o.tgz; }
R="python3 -m torch.distributed.run --nproc-per-node 2"
PT="python3 -m pytest -q -p no:cacheprovider -o timeout=0 -o addopts= -W ignore --import-mode=importlib --no-header -rf --tb=short"
python3 -c "
import time;t=time.time();s=0
for i in range(3000000): s+=i
print('HOST python 3M adds %.2f s'%(time.time()-t))"
g0() { export CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=2
 timeout -k 2 60 $PT -p xdist -n 4 --dist worksteal -m gpu tests/kernels/test_gpu.py -k "copies or pad or list or permute or unpermute" > $O/tker.txt 2>&1; T tker; grep -E "passed|failed|FAILED" $O/tker.txt | head -5
 timeout -k 2 80 env PYTHONPATH=/tmp/site:/tmp/drafts/grad/src python3 drafts/run_expert_gradient.py > $O/grad.txt 2>&1; T grad; tail -40 $O/grad.txt | cut -c1-170
 timeout -k 2 80 env PYTHONPATH=/tmp/site:/tmp/drafts/splitk/src python3 drafts/run_splitk.py > $O/splitk.txt 2>&1; T splitk; tail -60 $O/splitk.txt | cut -c1-170; }
g1() { export CUDA_VISIBLE_DEVICES=1 OMP_NUM_THREADS=2
 timeout -k 2 70 python3 drafts/few_dec.py > $O/few_dec.txt 2>&1; T few_dec; grep DEC $O/few_dec.txt
 timeout -k 2 60 $PT -p xdist -n 4 --dist worksteal -m gpu tests/serve/test_gpu.py > $O/tserve.txt 2>&1; T tserve; grep -E "passed|failed|FAILED" $O/tserve.txt | head -4
 mkdir -p /tmp/base && tar xzf drafts/base.tgz -C /tmp/base
 for r in /tmp/base $PWD; do PYTHONPATH=/tmp/site:$r/src:$r/tests/serve timeout -k 2 30 python3 drafts/early_gpu.py $r > $O/early_$(basename $r).txt 2>&1; grep -E "^\{" $O/early_$(basename $r).txt; done; T early
 unset OMP_NUM_THREADS; STEPS=12 timeout -k 2 45 python3 -m torch.distributed.run --nproc-per-node 1 --master-port 29555 drafts/mystery.py one > $O/one.txt 2>&1; T one; grep -E "^==|compiled|span|^launch" $O/one.txt | cut -c1-400; }
g0 & g1 & wait
timeout -s INT -k 5 135 $R benchmarks/train_ranks.py --full --steps 5 --layouts ep2 --set recompute=deepseek-v3 --set train.local_batch_size=3 --set train.global_batch_size=96 --set precision.weights=fp8 --set precision.matmul=fp8 --set precision.fp8_swiglu=true --set precision.e5m6_attention=true --out $O/full_fp8.json > $O/full_fp8.txt 2>&1; T full_fp8; tail -1 $O/full_fp8.txt | cut -c1-200
STEPS=24 timeout -s INT -k 5 50 $R drafts/mystery.py ep2 > $O/ep2.txt 2>&1; T ep2; grep -E "^==|compiled|span|^launch" $O/ep2.txt | cut -c1-700
TRACES=$O/traces timeout -s INT -k 5 75 $R drafts/hid_trace.py --layouts dualpipev-ep2 --set train.local_batch_size=4 --set train.global_batch_size=64 > $O/hid.txt 2>&1; T hid; grep steps $O/hid.txt
timeout -s INT -k 5 60 $R benchmarks/train_ranks.py --layouts zb-h1 ep2 dualpipe dualpipev-ep2 --set train.seq_len=256 --spans $O/spans256 --out $O/ranks256.json > $O/ranks256.txt 2>&1; T ranks256; tail -4 $O/ranks256.txt | cut -c1-160
