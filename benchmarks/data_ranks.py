"""Engines that share experts, each in a process of its own: a part of `serve_ranks.py`.

Requests are dealt out to the ranks in turn, so that a batch of B is B / ranks sequences on each; with fewer
requests than ranks, some run padding. Rank 0 holds the clock.
"""

from __future__ import annotations

import multiprocessing
import pickle
import select
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_gpu import Sizes, requests

from benthic.serve.data_rank import DataRank

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier, Event

    from benthic.serve.messages import Generate
    from benthic.serve.options import EngineOptions

Tokens = dict[int, dict[str, list[int]]]


@dataclass(frozen=True)
class Signals:
    """What processes wait for: all of them, and the end of what rank 0 measures."""

    together: Barrier
    measured: Event


def measure_data_ranks(
    folder: Path, sizes: Sizes, options: EngineOptions
) -> tuple[list[dict[str, Any]], Tokens]:
    """A row for prefill and one for each batch, and the tokens of every batch."""
    ranks = options.data_parallel_size
    context = multiprocessing.get_context("spawn")
    signals = Signals(context.Barrier(ranks, timeout=300), context.Event())
    with tempfile.TemporaryDirectory(prefix="benthic-") as meeting:
        arguments = (folder, sizes, options, Path(meeting), signals)
        processes = [context.Process(target=run, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            msg = f"ranks ended with {[process.exitcode for process in processes]}; see above"
            raise RuntimeError(msg)
        found = [pickle.loads((Path(meeting) / f"found-{rank}").read_bytes()) for rank in range(ranks)]  # noqa: S301 (our own)
    tokens: Tokens = {batch: {} for batch in sizes.batches}
    rows: list[dict[str, Any]] = []
    for own_rows, own_tokens in found:
        rows += own_rows
        for batch, named in own_tokens.items():
            tokens[batch] |= named
    return rows, tokens


def run(
    rank: int, folder: Path, sizes: Sizes, options: EngineOptions, meeting: Path, signals: Signals
) -> None:
    """Body of a process."""
    client = Client(DataRank.join(folder, options, meeting, rank), rank, options.data_parallel_size, signals)
    rows, tokens = [client.prefill(sizes)], {}
    for batch in sizes.batches:
        seconds, tokens[batch] = client.decode(sizes, batch)
        if rank == 0:
            rows.append({"what": "decode", "batch": batch, "step_ms": seconds * 1e3})
            rows[-1] |= {"tokens_per_second": batch / seconds}
    client.engine.leave()
    (meeting / f"found-{rank}").write_bytes(pickle.dumps((rows if rank == 0 else [], tokens)))


class Client:
    """One rank's engine and its share of the requests."""

    def __init__(self, engine: DataRank, rank: int, ranks: int, signals: Signals) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self._rank = rank
        self._ranks = ranks
        self._signals = signals
        self._woken = select.poll()
        self._woken.register(engine.wake_fd, select.POLLIN)

    def prefill(self, sizes: Sizes) -> dict[str, Any]:
        """Tokens a second of several long prompts over all ranks, the second time."""
        count, seconds = sizes.prompts[-1], 0.0
        for turn in range(2):
            self._signals.together.wait()
            began = time.perf_counter()
            self._add(requests(sizes, count, sizes.prompt, 1, seed=turn))
            while self.engine.has_work:
                self.engine.step()
            self._signals.together.wait()
            seconds = time.perf_counter() - began
        return {
            "what": "prefill",
            "prompts": f"{count} x {sizes.prompt}",
            "tokens_per_second": count * sizes.prompt / seconds,
        }

    def decode(self, sizes: Sizes, batch: int) -> tuple[float, dict[str, list[int]]]:
        """Seconds of a step with all requests decoding, and this rank's tokens; requests are then aborted."""
        new = sizes.steps + 8 + 2 * (batch * sizes.context // sizes.budget + 2)
        self._signals.together.wait()
        self._add(requests(sizes, batch, sizes.context, new, seed=7))
        seconds = self._time(sizes.steps) if self._rank == 0 else self._follow()
        for name in self.tokens:
            self.engine.abort(name)
        while self.engine.has_work:
            self._step()
        self._signals.together.wait()
        self._signals.measured.clear()
        return seconds, self.tokens

    def _time(self, steps: int) -> float:
        while min(map(len, self.tokens.values())) < 4:
            self._step()
        began = time.perf_counter()
        for _ in range(steps):
            self._step()
        seconds = (time.perf_counter() - began) / steps
        self._signals.measured.set()
        return seconds

    def _follow(self) -> float:
        while not self._signals.measured.is_set():
            if self._woken.poll(0 if self.engine.has_work else 1):
                self.engine.wake()
            if self.engine.has_work:
                self._step()
        return 0.0

    def _add(self, asked: list[Generate]) -> None:
        own = asked[self._rank :: self._ranks]
        self.tokens = {each.request_id: [] for each in own}
        for each in own:
            self.engine.add(each)

    def _step(self) -> None:
        for delta in self.engine.step():
            self.tokens[delta.request_id].extend(delta.tokens)


def own_options(options: EngineOptions, ranks: int) -> EngineOptions:
    """Each rank has its share of the sequences, and graphs for it."""
    sizes = tuple(sorted({max(1, size // ranks) for size in options.cudagraph_capture_sizes}))
    return replace(
        options,
        tensor_parallel_size=1,
        data_parallel_size=ranks,
        enable_expert_parallel=True,
        max_num_seqs=max(1, options.max_num_seqs // ranks),
        max_num_batched_tokens=options.max_num_batched_tokens // ranks,
        cudagraph_capture_sizes=sizes,
    )
