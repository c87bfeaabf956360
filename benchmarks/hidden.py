"""How much of the token exchange hides behind compute: `torchrun --nproc-per-node 2 benchmarks/hidden.py`.

Trains the slice of `train_ranks.py` with experts on two GPUs, once as 1F1B, where a microbatch waits for its
own exchange, and once as DualPipeV, whose slots run the phases of a forward and a backward alternately. One
step is traced: the time in which the exchange runs is *exchange*, the part of it in which something else runs
too is *hidden*. Exchange is NCCL's send and receive, our waits and flags wherever they run, and on a stream
that does nothing but exchange also our pushes and copies; what a rank writes for itself on the computing
stream is computation. NCCL's kernels and our waits wait for the slower rank, so exchange is not only
transfer: *transfer* is what our own stream pushes and copies, without waits and flags, and how much of that
is hidden. Larger microbatches: `--set train.local_batch_size=4 --set train.global_batch_size=32`.
`--small` rehearses on gloo, where no kernel is traced.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist
from provenance import write_result
from torch.profiler import ProfilerActivity, profile
from train_ranks import LAYOUTS, configured, parse, shared_data, trainer_of

from benthic.cli.settings import apply
from benthic.parallel.mesh import Mesh

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from benthic.train.trainer import Trainer

    Interval = tuple[float, float]

PUSHING: Final = ("_push_", "_await_", "_raise_", "_count_", "memcpy ptop", "memcpy dtod", "memcpy dtoh")
"""What the exchange's own stream runs, and nothing else; beginnings of names, lower case."""

ANYWHERE: Final = ("nccldevkernel_sendrecv", "_await_", "_raise_")
"""What is exchange on any stream."""


WAITS: Final = ("_await_", "_raise_", "_count_")
"""What our own stream does besides moving rows."""


class Ran(NamedTuple):
    """What a stream of the device did; times in microseconds."""

    name: str
    stream: int
    start: float
    end: float


def main() -> None:
    """Both layouts with both exchanges; rank 0 prints and writes."""
    words = parse(__doc__ or "")
    rank, device = int(os.environ["RANK"]), "cpu" if words.small else "cuda"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if words.small else "nccl")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = shared_data(Path(folder), rank, small=words.small)
        for name in sorted({"ep2", "dualpipev-ep2"}.intersection(words.layouts), reverse=True):
            for kind in ("all_to_all",) if words.small else ("nvlink", "all_to_all"):
                launched = [f"exchange.kind={kind}", "train.cuda_graph=false"]  # as all_to_all must be
                config = apply(configured(words, device), launched)
                trainer = trainer_of(config, LAYOUTS[name], data, Mesh.of(LAYOUTS[name], rank))
                rows.append({"layout": name, "exchange": kind, **traced(trainer)})
                del trainer
                if rank == 0:
                    print(line(rows[-1]), flush=True)
                    write_result("hidden", rows, out=words.out, set=words.set)
    dist.destroy_process_group()


def traced(trainer: Trainer) -> dict[str, Any]:
    """Seconds of one step after three: the device's span, its exchange, and what of that is hidden."""
    for _ in range(3):
        trainer.step()
    activities = [ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        trainer.step()
    ran = [
        Ran(event.name.lower(), event.device_resource_id, event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    moving, computing = parted(ran)
    busy = union([*moving, *computing])
    exchange, hidden = total(moving), beside(moving, computing)
    pushed = transfers(ran)
    transfer, under = total(pushed), beside(pushed, computing)
    return {
        "device_seconds": (busy[-1][1] - busy[0][0]) / 1e6 if busy else None,
        "exchange_seconds": exchange / 1e6,
        "hidden_seconds": hidden / 1e6,
        "hidden_fraction": hidden / exchange if exchange else None,
        "transfer_seconds": transfer / 1e6,
        "transfer_hidden_fraction": under / transfer if transfer else None,
    }


def beside(moving: list[Interval], computing: list[Interval]) -> float:
    """Microseconds in which both run."""
    return total(moving) + total(computing) - total(union([*moving, *computing]))


def streams_of(ran: list[Ran]) -> set[int]:
    """Those that do nothing but exchange."""
    streams: dict[int, list[str]] = {}
    for one in ran:
        streams.setdefault(one.stream, []).append(one.name)
    return {
        stream
        for stream, names in streams.items()
        if all(name.startswith(PUSHING) for name in names)
        and any(name.startswith("_raise_") for name in names)
    }


def transfers(ran: list[Ran]) -> list[Interval]:
    """When the exchange's own stream moved rows."""
    pushing = streams_of(ran)
    return union(
        (one.start, one.end) for one in ran if one.stream in pushing and not one.name.startswith(WAITS)
    )


def parted(ran: list[Ran]) -> tuple[list[Interval], list[Interval]]:
    """When the exchange ran, and when anything else did."""
    pushing = streams_of(ran)

    def exchanges(one: Ran) -> bool:
        return one.stream in pushing or one.name.startswith(ANYWHERE)

    moving = union((one.start, one.end) for one in ran if exchanges(one))
    return moving, union((one.start, one.end) for one in ran if not exchanges(one))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times without overlap, in order."""
    return list(_merged(sorted(intervals)))


def _merged(intervals: list[Interval]) -> Iterator[Interval]:
    current: Interval | None = None
    for start, end in intervals:
        if current is not None and start <= current[1]:
            current = current[0], max(current[1], end)
            continue
        if current is not None:
            yield current
        current = start, end
    if current is not None:
        yield current


def total(intervals: list[Interval]) -> float:
    """Microseconds."""
    return sum(end - start for start, end in intervals)


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    if row["hidden_fraction"] is None:
        return f"{row['layout']:<14} {row['exchange']:<11} no kernels were traced"
    moved = ""
    if row["transfer_hidden_fraction"] is not None:  # of a stream of our own
        share = 100 * row["transfer_hidden_fraction"]
        moved = f"; transfer {1e3 * row['transfer_seconds']:6.1f} ms, {share:5.1f} % of it hidden"
    return (
        f"{row['layout']:<14} {row['exchange']:<11} step {1e3 * row['device_seconds']:7.1f} ms, exchange "
        f"{1e3 * row['exchange_seconds']:6.1f} ms, {100 * row['hidden_fraction']:5.1f} % of it hidden{moved}"
    )


if __name__ == "__main__":
    main()
