"""Steps that are recorded once and run again, against steps that are launched operator by operator.

A CPU has no graphs: what is recorded is run again here by calling it, into the memory where a graph would
leave its results. `test_gpu.py` and `test_recorded_gpu.py` do the same with CUDA graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from replayed import Again, nothing

from benthic.cli.settings import apply
from benthic.errors import ConfigError, ShapeError
from benthic.model.local import LocalExchange
from benthic.parallel.exchange_routes import Room, arrivals
from benthic.train import recording
from benthic.train.curve import Curve, Piece
from benthic.train.recording import Direct, Recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benthic.train.config import RunConfig
    from benthic.train.recording import Found
    from benthic.train.trainer import Trainer


@pytest.fixture
def recorded(trainer: Callable[[RunConfig], Trainer]) -> Callable[..., Trainer]:
    """A trainer whose steps are recorded, and the list of its graphs."""

    def make(config: RunConfig, graphs: list[Again]) -> Trainer:
        found = trainer(config)

        def record(compute: Callable[[], Found]) -> Again:
            graphs.append(Again(compute))
            return graphs[-1]

        found._computation = Recorded(Direct(found.executor, found.buckets, found.mesh), record=record)
        return found

    return make


def steps(trainer: Trainer, count: int) -> list[tuple[float, ...]]:
    found = [trainer.step() for _ in range(count)]
    return [(each.loss, *each.mtp, each.balance, each.grad_norm) for each in found]


def near(found: list[tuple[float, ...]], wanted: list[tuple[float, ...]], rel: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=rel)


@pytest.mark.parametrize(
    ("settings", "rel"),
    [
        ((), 1e-5),
        (("data.mask_documents=false",), 1e-5),
        (("layout.schedule=dualpipev",), 1e-5),
        (("precision.weights=fp8", "precision.matmul=fp8", "train.lr=1e-5"), 2e-3),
    ],
    ids=str,
)
def test_recorded_steps_find_what_launched_ones_do(
    settings: tuple[str, ...],
    rel: float,
    recorded: Callable[..., Trainer],
    trainer: Callable[[RunConfig], Trainer],
    nano: RunConfig,
) -> None:
    config, graphs = apply(nano, ["train.global_batch_size=8", *settings]), []
    own = recorded(config, graphs)
    near(steps(own, 7), steps(trainer(config), 7), rel)
    assert [graph.runs for graph in graphs] == [5]
    own.close()
    assert graphs[0].compute is nothing


def test_recorded_steps_see_new_weights_where_copies_are_read(
    recorded: Callable[..., Trainer], nano: RunConfig
) -> None:
    config = apply(nano, ["precision.weights=fp8", "precision.matmul=fp8", "train.lr=0.01"])
    graphs: list[Again] = []
    own = recorded(config, graphs)
    steps(own, 4)
    held = own._linear.running._held
    places = {key: copy.tiles.values.data_ptr() for key, copy in held.items()}
    values = {key: copy.tiles.values.float() for key, copy in held.items()}
    steps(own, 2)
    assert places
    assert places == {key: copy.tiles.values.data_ptr() for key, copy in held.items()}
    assert all(not torch.equal(values[key], copy.tiles.values.float()) for key, copy in held.items())


def test_scoring_between_recorded_steps_changes_nothing(
    recorded: Callable[..., Trainer], trainer: Callable[[RunConfig], Trainer], nano: RunConfig
) -> None:
    config = apply(nano, ["precision.weights=fp8", "precision.matmul=fp8", "train.lr=1e-5"])
    graphs: list[Again] = []
    one, other = recorded(config, graphs), trainer(config)
    near(steps(one, 4), steps(other, 4), 2e-3)
    batch = one._read()
    assert one.executor.score(iter(batch)).nats == pytest.approx(
        other.executor.score(iter(batch)).nats, rel=2e-3
    )
    near(steps(one, 3), steps(other, 3), 2e-3)
    assert len(graphs) == 1


def test_steps_of_another_size_are_recorded_anew(
    recorded: Callable[..., Trainer], trainer: Callable[[RunConfig], Trainer], nano: RunConfig
) -> None:
    curve = Curve((Piece(4, tokens=4 * 4 * 32), Piece(8)))
    config = dataclasses.replace(nano, train=dataclasses.replace(nano.train, batch_curve=curve))
    graphs: list[Again] = []
    near(steps(recorded(config, graphs), 9), steps(trainer(config), 9), 1e-5)
    assert len(graphs) == 2


def test_measured_steps_are_launched(recorded: Callable[..., Trainer], nano: RunConfig) -> None:
    class Watch:
        def start(self) -> None:
            """The step begins."""

        def mark(self) -> float:
            return 0.0

    graphs: list[Again] = []
    own = recorded(nano, graphs)
    own.executor.pipeline.stopwatch = Watch()
    steps(own, 4)
    assert not graphs


class Counted(LocalExchange):
    """An exchange that counts rows when it may, and finds more than it has room for when it is told to."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        state = {"room": None, "counted": [], "surprises": [], "rooms": []}
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def begin(self) -> None:
        self.counted.clear()
        if self.room is not None:
            self.room.over.zero_()

    def finish_dispatch(self, flight):
        arrived = super().finish_dispatch(flight)
        self.counted.append(len(arrived.rows_RD))
        if self.room is not None:
            self.rooms.append(self.room.rows[len(self.counted) - 1])
            if self.surprises and self.surprises.pop():
                self.room.over.add_(1)
        return arrived


def test_a_step_with_too_little_room_is_computed_again(
    recorded: Callable[..., Trainer], trainer: Callable[[RunConfig], Trainer], nano: RunConfig
) -> None:
    graphs: list[Again] = []
    own, plain = recorded(nano, graphs), trainer(nano)
    exchange = Counted(nano.model.n_routed_experts)
    own.executor.exchange = exchange
    wanted = steps(plain, 9)
    found = steps(own, 4)
    rows = 2 * 32 * nano.model.num_experts_per_tok
    assert set(exchange.rooms) == {rows + rows // 16 + 1}
    assert exchange.room is None
    exchange.surprises = [True]
    found += steps(own, 1)  # noticed, and launched
    assert graphs[0].compute is nothing
    exchange.rooms.clear()
    found += steps(own, 4)  # recorded at once
    assert set(exchange.rooms) == {rows + 2 * rows // 16 + 1}
    near(found, wanted, 1e-5)
    assert [graph.runs for graph in graphs] == [3, 4]


def test_steps_in_which_the_host_waits_are_not_recorded(
    recorded: Callable[..., Trainer],
    nano: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @contextlib.contextmanager
    def seen(device: torch.device) -> Iterator[list[str]]:
        yield ["somewhere.py, line 7"]

    monkeypatch.setattr(recording, "waits", seen)
    graphs: list[Again] = []
    steps(recorded(nano, graphs), 5)
    assert not graphs
    (line,) = [each.getMessage() for each in caplog.records if each.name == "benthic.train"]
    assert line.endswith("kernel by kernel: the host waits for its device in them: somewhere.py, line 7")


def test_steps_for_whose_graph_there_is_no_memory_are_not_recorded(
    recorded: Callable[..., Trainer], nano: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Again] = []
    own = recorded(nano, graphs)
    monkeypatch.setattr(own._computation, "_no_memory", lambda: "140 GiB of 139 GiB")
    steps(own, 5)
    assert not graphs


def test_rows_beyond_the_room_are_left_out_and_counted() -> None:
    expert_AK = torch.tensor([[0, 1], [1, 2], [0, 1], [5, 1]])
    room = Room([4, 7], torch.zeros((), dtype=torch.int64))
    whole = arrivals(expert_AK, first=0, experts=3, rows=8)
    assert whole.ends_E.tolist() == [2, 6, 7]
    less = whole.within(room.rows[0], room.over)
    assert less.ends_E.tolist() == [2, 4, 4]
    assert less.copy_R.tolist() == whole.copy_R[:4].tolist()
    assert torch.equal(less.row_AK, torch.where(whole.row_AK < 4, whole.row_AK, -1))
    assert room.over.item() == 1
    whole.within(room.rows[1], room.over)
    assert room.over.item() == 1


def test_a_failure_to_record_says_what_to_set(recorded: Callable[..., Trainer], nano: RunConfig) -> None:
    own = recorded(nano, [])

    def no_memory(compute: Callable[[], Found]) -> Again:
        message = "CUDA out of memory"
        raise torch.OutOfMemoryError(message)

    own._computation._to_graph = no_memory
    steps(own, 2)
    with pytest.raises(ConfigError, match=r"out of memory.*train.cuda_graph=false"):
        own.step()


def test_microbatches_are_padded_with_empty_sequences(
    trainer: Callable[[RunConfig], Trainer], nano: RunConfig
) -> None:
    (batch, *_) = trainer(nano)._read()
    here = batch.cu_seqlens.numel() - 1
    padded = batch.padded(here + 3)
    assert padded.cu_seqlens.tolist() == [*batch.cu_seqlens.tolist(), *[64] * 3]
    assert padded.max_seqlen == 32
    with pytest.raises(ShapeError, match=f"{here} sequences cannot be padded to {here - 1}"):
        batch.padded(here - 1)
