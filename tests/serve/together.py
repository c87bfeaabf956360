"""What a process of its own does in tests as one of several ranks that share experts."""

from __future__ import annotations

import pickle
import select
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from small_engine import Answer, is_empty

from benthic.parallel.team import Team
from benthic.serve import build
from benthic.serve.data_rank import DataRank
from benthic.serve.graphs import GraphSizes
from benthic.serve.options import EngineOptions
from benthic.serve.peers import Peers

if TYPE_CHECKING:
    from benthic.sched.lockstep import Intent, Turn
    from benthic.serve.messages import Generate

SETTINGS = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 11,
    "block_size": 3,
    "num_blocks": 30,
    "num_threads": 1,
    "enable_expert_parallel": True,
}
"""Prompts are cut into chunks, and running sequences lose their blocks."""


class Guest(Team):
    """In a group that `spawn` has made, and will end."""

    def part(self, *, orderly: bool = True) -> None:
        """Stay."""


def meet(rank: int, ranks: int, folder: str, meeting: str, options: dict) -> DataRank:
    chosen = EngineOptions(**(SETTINGS | options), data_parallel_size=ranks)
    if chosen.device == "cuda":
        chosen = replace(chosen, device=f"cuda:{rank}")
    team = Guest(rank, ranks, torch.device(chosen.device))
    return DataRank.meet(Path(folder), chosen, team, Peers.meet(Path(meeting), rank, ranks))


def drive(engine: DataRank, script: dict[int, list[Generate | str]], until: Path) -> dict[str, Answer]:
    """Add (a request) or abort (an id) at this rank's turns; then stay until the file is there."""
    answers: dict[str, Answer] = {}
    turns, last = 0, max(script, default=0)
    woken = select.poll()
    woken.register(engine.wake_fd, select.POLLIN)
    deadline = time.monotonic() + 60
    while turns <= last or engine.has_work or not until.exists():
        assert time.monotonic() < deadline, "no progress"
        for each in script.get(turns, ()):
            if isinstance(each, str):
                engine.abort(each)
            else:
                engine.add(each)
                answers[each.request_id] = Answer()
        if turns <= last:
            turns += 1
        if woken.poll(0 if engine.has_work or turns <= last else 10):
            engine.wake()
        if not engine.has_work:
            continue
        for delta in engine.step():
            answers[delta.request_id].deltas.append(delta)
            answers[delta.request_id].tokens.extend(delta.tokens)
    return answers


def take_part(rank: int, ranks: int, folder: str, shared: str, options: dict, scripts: list[dict]) -> None:
    replays = options.pop("replays", False)
    if replays:
        build.graph_sizes = lambda options, _: GraphSizes((1, 2, 5, options.max_num_seqs))
    engine, turns = meet(rank, ranks, folder, shared, options), []
    take = engine._turns.take

    def noted(intent: Intent) -> Turn:
        turn = take(intent)
        turns.append(turn)
        return turn

    engine._turns.take = noted
    answers = drive(engine, scripts[rank], Path(shared) / "done" if rank else Path(shared))
    if rank == 0:
        (Path(shared) / "done").touch()
    stats = engine.stats()
    assert is_empty(engine)
    engine.leave()
    (Path(shared) / f"answers-{rank}").write_bytes(pickle.dumps((answers, stats, turns)))
