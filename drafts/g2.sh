# bash .gpu/g2.sh SHA 1P1D|"2 colocated": two H200: one fleet under load; within 500 s
. .gpu/env.sh $1 >/dev/null 2>&1
t0=$SECONDS; O=/tmp/o; rm -rf $O; mkdir -p $O
timeout -s INT -k 8 490 python3 benchmarks/disaggregate.py --seconds 12 --seeds 1 --fleets "$2" --out $O/disaggregate.json > $O/fleet.txt 2>&1; echo "== T $((SECONDS-t0)) $?"
tar czf $OUT/o.tgz -C /tmp o; grep -E "requests/s|goodput" $O/fleet.txt | tail -8 | cut -c1-160
