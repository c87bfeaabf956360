"""Times the token exchanges beside each other: `torchrun --nproc-per-node 2 benchmarks/exchange.py`.

Every line is one direction, started and finished at once, with DeepSeek-V3's row and experts: 4096 tokens a
rank (training, prefill) and 128 (decode); over NVLink with rows written by kernels and by copy engines. What
can be captured is timed from a CUDA graph too, "rows alone" without the copies to each expert; alone, which
counts the launch of a graph and how far apart two ranks start theirs, and 8 in a row. First all exchanges
must give the same bits. Bytes are those that have to leave a rank for others by what the routing
really chose; copies that nobody asked for are not counted. Slowest rank of each repeat, median over repeats.
`--small --device cpu` rehearses on gloo.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from provenance import write_result

from benthic.parallel.exchange import AllToAllExchange

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


IN_A_ROW = 8


@dataclass(frozen=True)
class Row:
    """One timed direction; `gigabytes_per_second` counts bytes that left one rank for others."""

    exchange: str
    what: str
    tokens: int
    wire: str
    microseconds: float
    gigabytes_per_second: float


@dataclass(frozen=True)
class Batch:
    """What one rank sends."""

    x: Tensor
    expert: Tensor
    weight: Tensor

    def leaving(self, per_rank: int, rank: int) -> int:
        """Copies of rows that leave for other ranks: one for each rank of a token's experts."""
        goes = torch.zeros(len(self.x), dist.get_world_size(), dtype=torch.bool, device=self.x.device)
        goes.scatter_(1, self.expert.long() // per_rank, value=True)
        goes[:, rank] = False
        return int(goes.sum())


def batch_of(tokens: int, width: int, experts: int, top_k: int, device: torch.device) -> Batch:
    """Random rows with uniform routing."""
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    x = torch.randn(tokens, width, device=device, generator=generator).bfloat16()
    best = torch.rand(tokens, experts, device=device, generator=generator).topk(top_k, dim=1)
    return Batch(x, best.indices.to(torch.int32), best.values)


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median over repeats of the slowest rank's time."""
    for _ in range(3):
        call()
    found = []
    for _ in range(repeats):
        dist.barrier()
        found.append(_cuda_seconds(call) if device.type == "cuda" else _cpu_seconds(call))
    slowest = torch.tensor(found, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def _cuda_seconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def round_trip(exchange: Any, batch: Batch) -> Tensor:
    """Dispatch and combine with experts that do nothing."""
    arrived = exchange.finish_dispatch(exchange.start_dispatch(batch.x, batch.expert, batch.weight))
    out: Tensor = exchange.finish_combine(exchange.start_combine(arrived.rows_RD, arrived))
    return out


def rows_alone(exchange: Any, batch: Batch) -> None:
    """A dispatch until its rows lie in the mailboxes."""
    flight = exchange.start_dispatch(batch.x, batch.expert, batch.weight).handle
    flight.moving.opened()
    flight.trip.release(flight.moving)


def captured(call: Callable[[], Any], times: int = 1) -> Callable[[], None]:
    """The same work, some times in a row, from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


def lines(
    name: str, exchange: Any, batch: Batch, *, fp8: bool, device: torch.device, repeats: int
) -> list[Row]:
    """Dispatch, combine and both, of one exchange."""
    arrived: Any = None

    def dispatch() -> None:
        nonlocal arrived
        arrived = exchange.finish_dispatch(exchange.start_dispatch(batch.x, batch.expert, batch.weight))

    def combine() -> None:
        exchange.finish_combine(exchange.start_combine(arrived.rows_RD, arrived))

    width = batch.x.shape[1]
    copies = batch.leaving(exchange.per_rank, dist.get_rank())
    home = copies * 2 * width
    out = copies * (width + 4 * -(-width // 128)) if fp8 else home
    work: list[tuple[str, Callable[[], Any], int, int]] = [
        ("dispatch", dispatch, out, 1),
        ("combine", combine, home, 1),
    ]
    if name.startswith("nvlink"):
        dispatch()
        for what, call, size in (
            ("dispatch and combine", lambda: round_trip(exchange, batch), out + home),
            ("dispatch, rows alone", lambda: rows_alone(exchange, batch), out),
            ("combine", combine, home),
        ):
            for times, how in ((1, ""), (IN_A_ROW, f", {IN_A_ROW} in a row")):
                work.append((f"{what}{how}, CUDA graph", captured(call, times), size, times))
    rows = []
    for what, call, size, times in work:
        taken = seconds(call, device, repeats) / times
        wire = "fp8 out, bf16 home" if fp8 else "bf16"
        rows.append(Row(name, what, len(batch.x), wire, taken * 1e6, size / taken / 1e9))
        if dist.get_rank() == 0:
            print(f"{rows[-1]}", flush=True)
    return rows


def exchanges(batch: Batch, experts: int, *, fp8: bool, device: torch.device) -> dict[str, Any]:
    """All exchanges; on a CPU only the one that runs there."""
    group: Any = dist.group.WORLD
    plain = AllToAllExchange(group, experts, fp8=fp8)
    if device.type != "cuda":
        return {"all_to_all": plain}
    from benthic.parallel.exchange_nvlink import NvlinkExchange
    from benthic.parallel.exchange_size import Size

    def nvlink(*, copies: bool) -> NvlinkExchange:
        size = Size(
            n_routed_experts=experts,
            top_k=batch.expert.shape[1],
            hidden_size=batch.x.shape[1],
            dtype=batch.x.dtype,
            max_tokens=len(batch.x),
            fp8=fp8,
            copies=copies,
        )
        return NvlinkExchange.on(group, size, device)

    return {
        "all_to_all": plain,
        "nvlink, kernels": nvlink(copies=False),
        "nvlink, copies": nvlink(copies=True),
    }


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 128], help="of a rank")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sizes = [(64, 256, 16, 4)] if options.small else [(tokens, 7168, 256, 8) for tokens in options.tokens]
    rows: list[Row] = []
    for tokens, width, experts, top_k in sizes:
        for fp8 in (False, True):
            batch = batch_of(tokens, width, experts, top_k, device)
            found = exchanges(batch, experts, fp8=fp8, device=device)
            with torch.no_grad():
                results = [round_trip(exchange, batch) for exchange in found.values()]
                if not all(torch.equal(result, results[0]) for result in results):
                    sys.exit(f"the exchanges disagree at {tokens} tokens, fp8={fp8}")
                for name, exchange in found.items():
                    rows += lines(name, exchange, batch, fp8=fp8, device=device, repeats=options.repeats)
    if dist.get_rank() == 0:
        name = f"exchange_h200x{dist.get_world_size()}"
        if options.out or not options.small:
            write_result(name, [asdict(row) for row in rows], out=options.out, ranks=dist.get_world_size())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
