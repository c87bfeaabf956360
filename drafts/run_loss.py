"""Logits to losses and gradients on one H200: old kernel and new, checked against float64, timed. PYTHONPATH=src."""
import statistics, sys, torch
sys.path.insert(0, ".gpu")
import loss_old
from benthic.kernels import triton_loss as new
dev = "cuda"
def make(rows, columns):
    g = torch.Generator(dev).manual_seed(rows)
    x = (torch.randn(rows, columns, generator=g, device=dev) * 3).bfloat16()
    t = torch.randint(columns, (rows,), generator=g, device=dev); t[::7] = -100
    return x, t
def exact(x, t):
    lse = torch.logsumexp(x.double(), 1); kept = t != -100
    loss = torch.where(kept, lse - x.double().gather(1, t.clamp(min=0)[:, None])[:, 0], 0.0)
    grad = torch.exp(x.double() - lse[:, None]); grad[torch.arange(len(t)), t.clamp(min=0)] -= 1.0
    return loss, grad * kept[:, None]
def launch(kernel, x, t, block, warps, **more):
    loss = torch.empty(len(x), device=dev)
    kernel[(len(x),)](x, t, loss, x.shape[1], x.stride(0), -100, GRADIENT=True, BLOCK=block, num_warps=warps, **more)
    return loss
for rows, columns in ((37, 163840), (37, 32768), (5, 50), (9, 163841), (64, 129280)):
    x, t = make(rows, columns); loss64, grad64 = exact(x, t)
    for name, mod in (("old", loss_old), ("new", new)):
        y = x.clone(); loss, grad = mod.turn(y, t, -100, gradient=True)
        print(f"{name} {rows}x{columns}: loss off {float((loss - loss64).abs().max()):.1e}, gradient off {float((grad.double() - grad64).norm() / grad64.norm()):.1e}", flush=True)
for rows, columns in ((3276, 163840), (4096, 129280), (16384, 32768)):
    x, t = make(rows, columns); bytes_ = 2 * x.numel() * 2
    outs = torch.empty_like(x)
    def clock(call, n=12):
        ts = []
        for _ in range(n):
            y = x.clone(); a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); call(y); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
        return statistics.median(ts)
    copy = clock(lambda y: outs.copy_(y))
    print(f"{rows}x{columns}: copy {copy:.3f} ms {bytes_ / copy / 1e9:.2f} TB/s; read once and written once would be as long")
    ms = clock(lambda y: launch(loss_old._turn, y, t, 16384, 32)); print(f"  old                       {ms:.3f} ms  {bytes_ / ms / 1e9:.2f} TB/s", flush=True)
    for block, warps, stages in ((16384, 32, 1), (16384, 32, 2), (16384, 32, 3), (16384, 32, 4), (8192, 16, 3), (8192, 16, 4), (8192, 32, 4), (8192, 16, 1)):
        try:
            ms = clock(lambda y: launch(new._turn, y, t, block, warps, STAGES=stages))
            print(f"  new {block:5} {warps:2} warps {stages} stages {ms:.3f} ms  {bytes_ / ms / 1e9:.2f} TB/s", flush=True)
        except Exception as e: print("  failed", block, warps, stages, type(e).__name__, str(e)[:120])
