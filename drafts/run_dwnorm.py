"""Squares from experts' weight gradients on one H200: checked, then timed beside a norm that reads. PYTHONPATH=src."""
import statistics
import torch
from benthic.kernels import ops

torch.manual_seed(0)
SHAPES = {  # Moonlight's experts with 16,384 tokens, and a rank of DeepSeek-V3's
    "gate_up 64x~1536 2048->2816": (64, 98304, 2048, 2816),
    "down    64x~1536 1408->2048": (64, 98304, 1408, 2048),
    "gate_up 64x~384  2048->2816": (64, 24576, 2048, 2816),
    "gate_up  8x~4096 7168->4096": (8, 32768, 7168, 4096),
}


def inputs(experts, rows, i_dim, o_dim):
    share = torch.rand(experts, device="cuda") + 0.5
    share[1] = 0  # an expert without rows
    ends = (share.cumsum(0) / share.sum() * rows).int()
    ends[-1] = rows
    x = torch.randn(rows, i_dim, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(rows, o_dim, device="cuda", dtype=torch.bfloat16)
    return x, dy, ends


def check():
    for experts, rows, i_dim, o_dim in [(5, 3000, 512, 1024), (5, 3000, 1408, 200), (5, 70, 2048, 2816), (64, 9000, 1408, 2048)]:
        x, dy, ends = inputs(experts, rows, i_dim, o_dim)
        for fresh in (True, False):
            before = torch.randn(experts, o_dim, i_dim, device="cuda")
            plain, sums, again = before.clone(), before.clone(), before.clone()
            ops.add_weight_gradient(plain, dy, x, ends, fresh=fresh, impl="gluon")
            parts = ops.add_weight_gradient(sums, dy, x, ends, fresh=fresh, squares=True, impl="gluon")
            twice = ops.add_weight_gradient(again, dy, x, ends, fresh=fresh, squares=True, impl="gluon")
            exact = sums.double().square().sum().item()
            error = abs(parts.double().sum().item() / exact - 1)
            read = abs(torch.linalg.vector_norm(sums).square().item() / exact - 1)
            same = torch.equal(plain, sums), torch.equal(parts, twice), torch.equal(sums, again)
            print(f"{experts}x{rows} {i_dim}->{o_dim} fresh={fresh}: off {error:.1e} (read: {read:.1e}), same {same}", flush=True)
            assert all(same) and error < 1e-5


def clock(calls, turns=12):
    """Medians in us; all take turns, so that clocks and neighbours are shared."""
    times = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(); call(); end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def timed():
    for label, shape in SHAPES.items():
        x, dy, ends = inputs(*shape)
        experts, rows, i_dim, o_dim = shape
        into = torch.zeros(experts, o_dim, i_dim, device="cuda")
        kept = [None]

        def add(fresh, squares):
            kept[0] = ops.add_weight_gradient(into, dy, x, ends, fresh=fresh, squares=squares, impl="gluon")

        calls = {"write": lambda: add(True, False), "write+squares": lambda: add(True, True),
                 "add": lambda: add(False, False), "add+squares": lambda: add(False, True),
                 "read norm": lambda: torch.linalg.vector_norm(into).square(),
                 "sum parts": lambda: torch.cat([kept[0]] * 2).sum()}
        add(True, True)
        calls["sum parts"] = lambda parts=kept[0]: torch.cat([parts] * 2).sum()
        found = clock(calls)
        flop = 2 * rows * i_dim * o_dim
        print(label, " ".join(f"{n} {t:.0f} us" for n, t in found.items()), f"({flop / found['write'] / 1e6:.0f} TFLOP/s)",
              f"| written: {found['write+squares'] - found['write']:+.0f}, added: {found['add+squares'] - found['add']:+.0f}, for {found['read norm']:.0f} us", flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    check()
    timed()
