# bash .gpu/q2.sh SHA ARGS...: run_graph.py on two GPUs
. .gpu/env.sh $1 >/dev/null 2>&1; unset OMP_NUM_THREADS; shift
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O; R="python3 -m torch.distributed.run --nproc-per-node 2"
for a in "$@"; do
timeout -s INT -k 3 $((${LIMIT:-170})) $R .gpu/d/run_graph.py $a > $O/graph.txt 2>&1; echo "== $((SECONDS-t0)) rc $? $a"; grep -E "graph=" $O/graph.txt | cut -c1-330; grep -vE "graph=|^\[rank|Warning|warn" $O/graph.txt | grep -E "Error|error|File \"/" | tail -12 | cut -c1-220; cp $O/graph.txt $OUT/graph_$SECONDS.txt; pkill -9 -f run_graph; sleep 1
done
