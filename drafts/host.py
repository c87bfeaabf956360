"""Host time of a step on meta: Triton's own launch path in Python, no kernel, no dispatch mode."""
import sys, time, tempfile, contextlib, statistics, json
from pathlib import Path
from unittest import mock
sys.path.insert(0, "benchmarks")
import torch
torch.set_num_threads(1)
import allocations as A, peaks
from moonlight_slices import LAYOUTS
from benthic.kernels import triton_loss
from benthic.kernels.table import Op
from benthic.train.trainer import Trainer
from benthic.train.data.shards import TokenShards, read_meta
from benthic.parallel.mesh import Mesh
from benthic.parallel.exchange import AllToAllExchange
from benthic.parallel.exchange_memory import PeerMemory
import triton
from triton.runtime import jit, driver
from triton.backends.compiler import GPUTarget
lib = torch.library.Library("aten", "IMPL")
def new(a, b, dtype): return torch.empty(a.shape[0], b.shape[1], dtype=dtype, device="meta")
lib.impl("mm.dtype", lambda a, b, out_dtype: new(a, b, out_dtype), "Meta")
lib.impl("addmm.dtype_out", lambda s, a, b, out_dtype, *, beta=1, alpha=1, out: out, "Meta")
try: lib.impl("_scaled_mm_v2", lambda a, b, *r, **k: new(a, b, next(x for x in r if isinstance(x, torch.dtype))), "Meta")
except Exception as e: print(e)
E = torch.empty
def out_(*a, out=None, **k): return out
lib.impl("mm", lambda a, b: E(a.shape[0], b.shape[1], dtype=a.dtype, device="meta"), "Meta")
lib.impl("add.out", out_, "Meta"); lib.impl("sub.out", out_, "Meta"); lib.impl("addmm.out", out_, "Meta"); lib.impl("mm.out", out_, "Meta")
def two(a, b, **k):
    if not isinstance(b, torch.Tensor) or b.dim() == 0 or a.shape == b.shape: return E(a.shape, dtype=a.dtype, device="meta")
    return E(torch.broadcast_shapes(a.shape, b.shape), dtype=torch.promote_types(a.dtype, b.dtype), device="meta")
for n in ("add.Tensor", "mul.Tensor", "sub.Tensor"): lib.impl(n, two, "Meta")
for n in ("add_.Tensor", "mul_.Tensor", "div_.Tensor"): lib.impl(n, lambda a, b, **k: a, "Meta")
lib.impl("empty_like", lambda x, *, dtype=None, **k: E(x.shape, dtype=dtype or x.dtype, device="meta"), "Meta")
def sum_(x, dim, keepdim=False, *, dtype=None):
    d = {i % x.dim() for i in (dim or range(x.dim()))}
    return E([n for i, n in enumerate(x.shape) if i not in d], dtype=dtype or x.dtype, device="meta")
lib.impl("sum.dim_IntList", sum_, "Meta")
lib.impl("linalg_vector_norm", lambda x, *a, dtype=None, **k: E((), dtype=dtype or x.dtype, device="meta"), "Meta")
for n in ("cos", "sin", "sign"): lib.impl(n, lambda x: E(x.shape, dtype=x.dtype, device="meta"), "Meta")
lib.impl("pow.Tensor_Scalar", lambda x, e: E(x.shape, dtype=x.dtype, device="meta"), "Meta")
lib.impl("eq.Scalar", lambda x, e: E(x.shape, dtype=torch.bool, device="meta"), "Meta")
lib.impl("where.self", lambda c, a, b: E(a.shape if a.dim() >= c.dim() else c.shape, dtype=a.dtype, device="meta"), "Meta")
lib.impl("ones_like", lambda x, *, dtype=None, **k: E(x.shape, dtype=dtype or x.dtype, device="meta"), "Meta")
lib.impl("mul.out", out_, "Meta")
def cat(ts, dim=0):
    s = list(ts[0].shape); s[dim] = sum(t.shape[dim] for t in ts); return E(s, dtype=ts[0].dtype, device="meta")
lib.impl("cat", cat, "Meta")
def read(x): return torch.ones(())
lib.impl("_local_scalar_dense", lambda x: 1, "Meta")
COUNT = [0]
def nothing(*a): COUNT[0] += 1
class Kernel:
    function = 1; packed_metadata = (1,); src = None
    launch_metadata = triton.compiler.CompiledKernel.launch_metadata
    def __init__(s, sig, meta):
        # the descriptor wrapper in Python, as 3.6 has it
        has = any(isinstance(t, str) and t.startswith("tensordesc") for t in sig.values())
        s.inner = None
        s.idx = {i for i, t in enumerate(sig.values()) if isinstance(t, str) and t.startswith("tensordesc")}
        s.sizes = (0, 1, 0, 1)
    module = 1; name = "k"
    def _init_handles(s):
        if s.module is not None: return
    def run(s, x, y, z, stream, function, *args):
        # CudaLauncher.__call__
        def allocate(size, align, allocator):
            if size > 0: return 1
        allocate(0, 1, None); allocate(0, 1, None)
        if s.idx:
            final = list(args[:4])
            for i, arg in enumerate(args[4:]):
                if i in s.idx:
                    sh, st = arg.shape, arg.strides
                    assert st[-1] == 1
                    arg.base.data_ptr()
                    list(st)
                    final.extend([1, *sh, *st])
                else: final.append(arg)
            args = final
        nothing(*args)
class Active:
    def get_current_device(s): return 0
    def get_current_stream(s, d): return 0
    def get_current_target(s): return GPUTarget("cuda", 90, 32)
    launcher_cls = None
def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
    k = Kernel(signature, None)
    self.device_caches[device][0][key] = k
    self.hash or self.cache_key
    return k
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from torch import Tensor
from triton import knobs
NUM = frozenset((int, float, bool, type(None)))
def kind(x):
    c = x.__class__
    if c is int: return x
    if isinstance(x, Tensor): return (x.dtype, 1) if x.data_ptr() % 16 else x.dtype
    if c in NUM: return c, x
    if c is TensorDescriptor: return x.base.dtype, tuple(x.block_shape), x.layout, x.padding
    raise TypeError
def quick(kernel):
    known = {}
    names = [p.name for p in kernel.params]
    def run(*args, grid, warmup, **options):
        device = driver.active.get_current_device()
        key = (device, *map(kind, args), *options.items())
        found = known.get(key)
        hooks = knobs.runtime
        if found is None or warmup or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            c = type(kernel).run(kernel, *args, grid=grid, warmup=warmup, **options)
            known[key] = c, tuple(options[n] for n in names[len(args):])
            return c
        c, rest = found
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        c.run(x, y, z, driver.active.get_current_stream(device), c.function, c.packed_metadata, None, None, None, *args, *rest)
        return c
    kernel.run = run
    return kernel

NS=40; MODE = sys.argv[2] if len(sys.argv) > 2 else "time"
@contextlib.contextmanager
def on_meta(config):
    parts = config.layout.dp_degree * config.layout.cp_degree * config.layout.tp_degree // config.layout.ep_degree
    world = A
    choose, known = Op.choose, {}
    def on_gpu(op, case, impl=None):
        k = (op.name, case, impl)
        f = known.get(k)
        if f is None: f = known[k] = choose(op, case._replace(device="cuda"), impl)
        return f
    found = A.Allocations(lambda t: 1.0)
    with (getattr(A,"on_meta",None) or A._on_meta)(config) as found, contextlib.ExitStack() as s:
        s.enter_context(mock.patch.object(jit.JITFunction, "run", RUN))
        s.enter_context(mock.patch.object(Op, "choose", on_gpu))
        s.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", RESIZE))
        s.enter_context(mock.patch.object(jit.JITFunction, "_do_compile", do_compile))
        yield found
RUN, RESIZE = jit.JITFunction.run, torch.UntypedStorage.resize_
driver.set_active(Active()) if hasattr(driver, "set_active") else None
assert driver.active.get_current_device() == 0
to = torch.Tensor.to
tolist = torch.Tensor.tolist
torch.Tensor.tolist = lambda x: [1.0] * x.numel() if x.is_meta else tolist(x)
name = sys.argv[1]; RANK=int(__import__("os").environ.get("RK",0))
layout = LAYOUTS[name] if name != "1" else peaks.Layout()
case = peaks.Case(layout=layout, **json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
with tempfile.TemporaryDirectory() as t:
    data = A.write_documents(Path(t) / "d"); config = case.config
    with (getattr(A,"world",None) or A._world)(config, RANK), on_meta(config):
        tr = Trainer(config, TokenShards(data, read_meta(data), "train"), Mesh.of(config.layout, RANK))
        for _ in range(3): tr.step()
        if "QUICK" in __import__("os").environ:
            only = __import__("os").environ["QUICK"]
            for n, m in list(sys.modules.items()):
                if n.startswith("benthic.kernels"):
                    for k in list(vars(m).values()):
                        if isinstance(k, jit.JITFunction) and "run" not in vars(k): quick(k)
            for _ in range(3): tr.step()
        ts = []; ps = []; PT=[0]
        _run = tr.executor.pipeline.run
        from benthic.parallel.pipeline import TableExecutor
        orun = TableExecutor.run
        def run(self, **k):
            a = time.process_time(); orun(self, **k); PT[0] += (time.process_time()-a)*1e3
        if MODE == "time": TableExecutor.run = run
        COUNT[0] = 0
        if MODE == "time":
            for i in range(NS):
                b = time.process_time(); tr.step(); ts.append((time.process_time() - b) * 1e3); ps.append(PT[0]); PT[0]=0
            ts.sort(); ps.sort()
            print(f"{name} rank {RANK}: min {ts[0]:.1f} q1 {ts[NS//4]:.1f} median {ts[NS//2]:.1f} q3 {ts[3*NS//4]:.1f} ms, pipeline min {ps[0]:.1f} median {ps[NS//2]:.1f}, launches {COUNT[0]//NS}", flush=True)
        elif MODE != "sample":
            import cProfile, pstats
            p = cProfile.Profile(); p.enable(); tr.step(); p.disable()
            s = pstats.Stats(p); s.sort_stats("tottime" if MODE == "prof" else "cumtime").print_stats(70)
            if MODE == "callers": s.print_callers(sys.argv[4])
        if MODE == "sample":
            import signal, collections
            own, incl, tot = collections.Counter(), collections.Counter(), [0]
            def on(sig, frame):
                tot[0] += 1; f = frame; seen = set(); first = True
                while f:
                    k = f"{f.f_code.co_filename[-40:]}:{f.f_code.co_name}"
                    if first: own[k + f":{f.f_lineno}"] += 1; first = False
                    if k not in seen: seen.add(k); incl[k] += 1
                    f = f.f_back
            signal.signal(signal.SIGPROF, on); signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
            for _ in range(300): tr.step()
            signal.setitimer(signal.ITIMER_PROF, 0)
            print("samples", tot[0])
            for k, v in incl.most_common(170): print(f"{100*v/tot[0]:6.2f} {k}")
            print()
            for k, v in own.most_common(70): print(f"{100*v/tot[0]:6.2f} {k}")
        if MODE == "ops":
            import collections, traceback
            from torch.utils._python_dispatch import TorchDispatchMode
            seen = collections.Counter()
            class M(TorchDispatchMode):
                def __torch_dispatch__(s, func, types, args=(), kw=None):
                    st = [f"{f.filename.split('/src/benthic/')[-1]}:{f.lineno}" for f in traceback.extract_stack() if '/src/benthic/' in f.filename]
                    seen[func.__name__ if hasattr(func,'__name__') else str(func), " < ".join(st[::-1][:3])] += 1
                    return func(*args, **(kw or {}))
            with M(): tr.step()
            tot = collections.Counter()
            for (n, w), c in seen.items(): tot[n] += c
            print(tot.most_common())
            for (n, w), c in sorted(seen.items(), key=lambda x: (-tot[x[0][0]], -x[1])):
                print(c, n, w)
