"""Do nodes of a graph keep the priority of the stream they were captured from?"""
import ctypes, json, tempfile, torch
big = torch.empty(600_000_000, device="cuda", dtype=torch.bfloat16).zero_()
small = torch.zeros(50_000, device="cuda")
rt = None
for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
    try: rt = ctypes.CDLL(name); break
    except OSError: pass
def capture(priority, keep):
    side = torch.cuda.Stream(priority=priority)
    g = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        small.add_(1)
        side.wait_stream(torch.cuda.current_stream())
        big.mul_(1.5)
        with torch.cuda.stream(side):
            for _ in range(4): small.mul_(1.25)
        torch.cuda.current_stream().wait_stream(side)
        small.add_(1)
    return g, side
def show(what, launch):
    for _ in range(3): launch()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        launch(); torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as t:
        p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
    k = sorted((e for e in ev if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    t0 = k[0]["ts"]
    print(what, [(round(e["ts"] - t0), round(e["dur"])) for e in k], flush=True)
small.add_(1); big.mul_(1.5); small.mul_(1.25); torch.cuda.synchronize()
for priority in (0, -1):
    g, s = capture(priority, False)
    show(f"torch, priority {priority}", g.replay)
print("range", torch.cuda.Stream.priority_range() if hasattr(torch.cuda.Stream, "priority_range") else "")
try:
    g, s = capture(-1, True)
    raw = g.raw_cuda_graph()
    for flags in (0, 8, 9):
        ex = ctypes.c_void_p()
        rc = rt.cudaGraphInstantiateWithFlags(ctypes.byref(ex), ctypes.c_void_p(raw), ctypes.c_ulonglong(flags))
        print("rc", rc)
        show(f"flags {flags}", lambda: rt.cudaGraphLaunch(ex, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)))
except Exception as e: print(type(e), e)
