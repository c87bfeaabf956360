"""A step in two halves is the step, and what travels of one half travels beside the other's work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import is_empty, random_model, serve, small_engine
from test_overlap import mixed_requests

from benthic.errors import ConfigError
from benthic.model.local import LocalExchange
from benthic.serve import halves
from benthic.serve.options import EngineOptions
from benthic.serve.speculative import Speculative

if TYPE_CHECKING:
    from benthic.model.network import DeepSeek, Hidden
    from benthic.model.sockets import Arrived, InFlight
    from benthic.serve.runner import Runner
    from benthic.serve.steps import StepRows, StepTensors


DRAFTS = Speculative(method="mtp", num_speculative_tokens=2, adaptive=False)


@pytest.fixture(scope="module")
def model() -> DeepSeek:
    return random_model()


def half_of(runner: Runner, rows: StepRows) -> halves.Half:
    part = runner.steps.tensors(rows)
    return halves.Half(part.tokens_T, part.positions_T, runner._sockets(part.layout))


@pytest.mark.parametrize("drafts", [False, True])
def test_any_cut_of_any_step_gives_the_states_of_the_whole(model: DeepSeek, *, drafts: bool) -> None:
    """Inside chunks that begin a prompt, go on with one or end it, between decodes and between drafts."""
    speculative = DRAFTS if drafts else None
    engine = small_engine(
        model, enforce_eager=True, max_num_batched_tokens=11, block_size=3, speculative=speculative
    )
    runner, cuts = engine._runner, []
    whole = runner._hidden

    def compared(rows: StepRows, step: StepTensors) -> Hidden:
        hidden = whole(rows, step)
        queries, decoding = 1 if rows.decode is None else rows.decode.queries, len(rows.index_R)
        for cut in range(1, len(rows.position_T)):
            if cut >= decoding or cut % queries == 0:
                parts = [half_of(runner, part) for part in halves.divide(rows, cut)]
                found = halves.run(runner.model, *parts)
                torch.testing.assert_close(found.hidden_TD, hidden.hidden_TD, rtol=1e-4, atol=1e-4)
                cuts.append((cut < decoding, cut > decoding, queries))
        return hidden

    runner._hidden = compared  # type: ignore[method-assign]
    serve(engine, mixed_requests(9))
    assert is_empty(engine)
    assert {(True, False, 1), (False, True, 1)} <= set(cuts)
    assert any(queries > 1 for *_, queries in cuts) == drafts


def test_the_first_half_keeps_drafts_together(model: DeepSeek) -> None:
    engine = small_engine(model, enforce_eager=True, speculative=DRAFTS)
    runner, seen = engine._runner, set()
    whole = runner._hidden

    def looked_at(rows: StepRows, step: StepTensors) -> Hidden:
        first, decoding = halves.first_rows(rows), len(rows.index_R)
        if rows.decode is not None and first < decoding:
            assert first % rows.decode.queries == 0
            seen.add(rows.decode.queries)
        assert first <= len(rows.position_T) // 2
        return whole(rows, step)

    runner._hidden = looked_at  # type: ignore[method-assign]
    serve(engine, mixed_requests(9))
    assert len(seen) > 1


class Told(LocalExchange):
    """Notes its calls in a list that two of them share."""

    def __init__(self, experts: int, name: str, told: list[str]) -> None:
        super().__init__(experts)
        object.__setattr__(self, "note", lambda what: told.append(f"{what} {name}"))

    def start_dispatch(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> InFlight:
        self.note("dispatch")  # type: ignore[attr-defined]
        return super().start_dispatch(x_TD, expert_TK, weight_TK)

    def finish_dispatch(self, flight: InFlight) -> Arrived:
        self.note("arrived")  # type: ignore[attr-defined]
        return super().finish_dispatch(flight)

    def start_combine(
        self, rows_RD: torch.Tensor, arrived: Arrived, beside: tuple[torch.Tensor, ...] = ()
    ) -> InFlight:
        self.note("combine")  # type: ignore[attr-defined]
        return super().start_combine(rows_RD, arrived, beside)

    def finish_combine(self, flight: InFlight) -> torch.Tensor:
        self.note("home")  # type: ignore[attr-defined]
        return super().finish_combine(flight)


def test_the_second_half_works_while_the_first_travels(model: DeepSeek) -> None:
    engine, told = small_engine(model, enforce_eager=True), []
    runner = engine._runner
    exchanges = [Told(model.config.n_routed_experts, name, told) for name in "ab"]
    whole = runner._hidden

    def in_halves(rows: StepRows, step: StepTensors) -> Hidden:
        if len(rows.position_T) < 2:
            return whole(rows, step)
        told.clear()
        parts = [half_of(runner, part) for part in halves.divide(rows, halves.first_rows(rows))]
        named = [
            part._replace(sockets=type(part.sockets)(part.sockets.attend, exchange, part.sockets.linear))
            for part, exchange in zip(parts, exchanges, strict=True)
        ]
        return halves.run(runner.model, *named)

    runner._hidden = in_halves  # type: ignore[method-assign]
    serve(engine, mixed_requests(3))
    mixtures = sum(model.config.is_moe(layer) for layer in range(model.config.num_hidden_layers))
    assert mixtures > 1
    first = ["dispatch a", "dispatch b", "arrived a", "combine a", "arrived b", "combine b", "home a"]
    later = ["dispatch a", "home b", *first[1:]]
    assert told == [*first, *later * (mixtures - 1), "home b"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_dbo": True}, "enable_dbo = True .* data_parallel_size = 1"),
        ({"dbo_prefill_token_threshold": 0}, "dbo_prefill_token_threshold = 0"),
    ],
)
def test_halves_that_cannot_be_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineOptions(**options)
