"""Peer copies one way and both ways at once, by copy engines and by a kernel: python bidir.py (two GPUs, one process)."""
import torch, time, statistics
import triton, triton.language as tl

@triton.jit
def move(src, dst, n, BLOCK: tl.constexpr):
    for i in range(tl.program_id(0), n // BLOCK, tl.num_programs(0)):
        at = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(dst + at, tl.load(src + at))

def run(nbytes, ways, how, programs=0, reps=20):
    a = [torch.randint(0, 9, (nbytes // 4,), dtype=torch.int32, device=f"cuda:{d}") for d in (0, 1)]
    b = [torch.empty_like(x) for x in a]
    def go(d):
        with torch.cuda.device(d):
            if how == "copy": b[1 - d].copy_(a[d], non_blocking=True)
            else: move[(programs,)](a[d], b[1 - d], nbytes // 4, BLOCK=2048, num_warps=8)
    took = []
    for r in range(reps + 3):
        for d in (0, 1): torch.cuda.synchronize(d)
        t = time.perf_counter()
        for d in range(ways): go(d)
        for d in (0, 1): torch.cuda.synchronize(d)
        took.append(time.perf_counter() - t)
    # and ten in a row, events on each device
    ev = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in (0, 1)]
    for d in range(ways):
        with torch.cuda.device(d): ev[d][0].record()
    for _ in range(10):
        for d in range(ways): go(d)
    for d in range(ways):
        with torch.cuda.device(d): ev[d][1].record()
    for d in (0, 1): torch.cuda.synchronize(d)
    many = max(ev[d][0].elapsed_time(ev[d][1]) for d in range(ways)) / 10e3
    return nbytes / statistics.median(took[3:]) / 1e9, nbytes / many / 1e9

torch.cuda.set_device(0)
torch.empty(1, device="cuda:1"); x = torch.empty(1 << 20, device="cuda:0").to("cuda:1")
for nbytes in (8 << 20, 58_720_256, 512 << 20):
    for how, programs in (("copy", 0), ("kernel", 132), ("kernel", 1024), ("kernel", 2048)):
        one, both = run(nbytes, 1, how, programs), run(nbytes, 2, how, programs)
        print(f"{nbytes/1e6:6.1f} MB {how} {programs or ''}: one way {one[0]:.0f} alone, {one[1]:.0f} in a row; both ways {both[0]:.0f} and {both[1]:.0f} GB/s each", flush=True)
