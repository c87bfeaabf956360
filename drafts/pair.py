import json, gzip, sys, collections
import numpy as np
f=sys.argv[1]
R=[json.load(gzip.open(f"/work/gpu_out/n3/o/{f}/pair_{r}.json.gz")) for r in (0,1)]
W=[]
for r,d in enumerate(R):
    n=d["names"]; rows=[x for x in d["rows"]]
    t0,t1=rows[0][0],max(x[0]+x[1] for x in rows)
    aw=[x for x in rows if "_await_flags" in n[x[3]]]
    W.append(aw)
    main=collections.Counter(x[2] for x in rows)
    print(r,"span",(t1-t0)/1e3,"kernels",len(rows),"streams",dict(main),"await",sum(x[1] for x in aw)/1e3,len(aw), "start",t0)
    # idle of everything
    rows.sort(); end=rows[0][0]; idle=0
    for x in rows:
        if x[0]>end: idle+=x[0]-end
        end=max(end,x[0]+x[1])
    busy_wo=sum(x[1] for x in rows if "_await" not in n[x[3]] and x[2]==main.most_common(1)[0][0])
    print("  idle",idle/1e3,"busy main stream without waits",busy_wo/1e3)
    # how far host ahead: kernel start - launch
    lag=np.array([x[0]-x[4] for x in rows if x[4]]); print("  host ahead us: p10,50,90", np.percentile(lag,[10,50,90]))
    d2=[x[1] for x in rows if x[4]]
a=np.array([[x[0],x[1]] for x in W[0]]); b=np.array([[x[0],x[1]] for x in W[1]])
m=min(len(a),len(b))
start=a[:m,0]-b[:m,0]
print("start difference r0-r1 us: median",np.median(start),"mean",start.mean(),"abs",np.abs(start).mean()); 
print("min of both waits",np.minimum(a[:m,1],b[:m,1]).sum()/1e3,"max",np.maximum(a[:m,1],b[:m,1]).sum()/1e3)
for k in range(8):
    i=np.arange(k,m,8); print(k,"wait0",a[i,1].mean(),"wait1",b[i,1].mean(),"min",np.minimum(a[i,1],b[i,1]).mean(),"start diff mean",start[i].mean(),"abs",np.abs(start[i]).mean())
