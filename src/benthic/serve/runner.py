"""Runs a plan: block table, tensors, one forward pass, logits for the rows that need them and no others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from benthic.model.network import Hidden
from benthic.sched.lockstep import MODEL, Intent
from benthic.serve import halves
from benthic.serve.attend import DecodeRows, StepLayout
from benthic.serve.columns import ColumnLinear
from benthic.serve.graphs import NO_GRAPHS, ModuleBuffers, ModuleGraphs, ModuleRows, Served
from benthic.serve.invariant import InvariantAttend
from benthic.serve.plugs import Plugs
from benthic.serve.prompt_graphs import PromptGraphs
from benthic.serve.step_graphs import StepBuffers, StepGraphs
from benthic.serve.steps import StepBuilder
from benthic.serve.tail_graphs import TailGraphs
from benthic.serve.tapes import DecodeTapes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Exchange, Sockets
    from benthic.sched.lockstep import Turn
    from benthic.sched.plans import StepPlan, TableWrite
    from benthic.serve.cache import LatentCache
    from benthic.serve.drafts import Drafts
    from benthic.serve.graphs import Graphs, GraphSizes
    from benthic.serve.step_graphs import Drawn
    from benthic.serve.steps import Replayed, StepRows, StepTensors

LOGIT_ROWS = 256
"""Most rows of prompt logits that exist at one time: 256 rows of a 129,280-token vocabulary are 132 MB."""


@dataclass(frozen=True)
class StepResult:
    """What a forward pass leaves for the sampler.

    `logits_SV` has one row for each of `StepPlan.sampled_ids`, or with drafts `1 + d` for each decode;
    `hidden_TD` and `chunk_rows` serve prompt log-probabilities, `previous_TD` feeds the first prediction
    module. `drawn` is what a graph has made of the logits already, for requests that are greedy.
    """

    logits_SV: Tensor
    hidden_TD: Tensor
    previous_TD: Tensor
    step: StepTensors
    drawn: Drawn | None = None

    @property
    def chunk_rows(self) -> tuple[range, ...]:
        """The rows of every prefill chunk, in plan order."""
        return self.step.chunk_rows


class Lead(Protocol):
    """Tells others, who hold the other shards of the model, what is about to run: they must run it too."""

    def move(self, plan: StepPlan) -> None:
        """The copies of a plan."""
        ...

    def step(self, plan: StepPlan, drafts: Drafts | None) -> None:
        """A step."""
        ...

    def score(self, rows: range) -> None:
        """Logits of some rows of the latest step."""
        ...

    def newest(self, slots: tuple[int, ...], token_S: Tensor) -> None:
        """Nothing, but these are the newest tokens of these slots."""
        ...


class Turns(Protocol):
    """Others that run passes of their own, which meet this runner's in collectives."""

    @property
    def exchange(self) -> Exchange:
        """How rows reach experts in the pass that all run now, as it is written."""
        ...

    @property
    def halves(self) -> Sequence[Exchange]:
        """The same of both halves, where all run in two; empty otherwise."""
        ...

    def take(self, intent: Intent) -> Turn:
        """Tell them what would run here, and find out what all run."""
        ...


class Runner:
    """One model on one device with its cache.

    Args:
        model: loaded weights, all layers.
        cache: pages for at least the model's layers.
        max_num_seqs: scheduler slots.
        max_model_len: longest sequence.
        plugs: the sockets; None takes the fastest exact ones here.
        enforce_eager: run every step as it is written, without tapes.
        graph_sizes: sizes for which `capture` makes CUDA graphs.
        drafts: most drafts of a sequence; every number of them up to this gets graphs of its own.
        alone: nobody else draws for this runner's requests, so what a graph draws is what is drawn.
        lead: who else runs the same steps; None when nobody does, or where this runner is the one that is
        told.
        turns: who else runs steps of their own at the same time; None when nobody does.
        halve_from: rows of a step from which on it runs in two halves, with `turns`; 0 never does.
    """

    def __init__(  # noqa: PLR0913 (what a step depends on)
        self,
        model: DeepSeek,
        cache: LatentCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        plugs: Plugs | None = None,
        enforce_eager: bool = False,
        graph_sizes: GraphSizes = NO_GRAPHS,
        drafts: int = 0,
        alone: bool = True,
        lead: Lead | None = None,
        turns: Turns | None = None,
        halve_from: int = 0,
    ) -> None:
        self.cache = cache
        self.model = model.eval()
        self._plugs = plugs = plugs or Plugs.fastest(model)
        self._lead = lead
        self._turns = turns
        self._halve_from = halve_from
        self.tapes: DecodeTapes | None = None  # None: every step runs as it is written
        columns = -(-max_model_len // cache.layout.block_size)
        taped = isinstance(plugs.linear, ColumnLinear) and cache.layout.dtype == torch.float32
        if taped and not enforce_eager:
            self.tapes = DecodeTapes(
                model, cache, linear=plugs.linear, exchange=plugs.exchange, columns=columns
            )
            self.tapes.warm_up()
        self.steps = StepBuilder(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=cache.layout.block_size,
            device=cache.pages_LPBW.device,
            drafts=drafts,
            reads_pages=plugs.attend is InvariantAttend,
        )
        depths = cache.layout.layers - model.config.num_hidden_layers
        lines = max_num_seqs + 1 if depths else 0
        self.ahead_ND = model.embed.weight.new_zeros((lines, model.config.hidden_size))
        self.ahead_previous_ND = torch.zeros_like(self.ahead_ND)
        self._alone = alone
        self.graphs: dict[int, StepGraphs] = {}  # of decode steps, by queries a sequence
        self.prompts: tuple[PromptGraphs, ...] = ()  # of steps with prompts, the first that holds one runs it
        self.tails: dict[int, TailGraphs] = {}  # of what follows them, likewise
        self.modules: dict[tuple[int, int], ModuleGraphs] = {}  # of prediction modules, by depth and queries
        if graph_sizes.decodes and not enforce_eager:
            served = Served.of(model, cache, plugs)
            self._make_graphs(served, graph_sizes.decodes, columns, drafts, depths)
            self.prompts = PromptGraphs.kinds(
                served, graph_sizes.prompts, max_num_seqs=max_num_seqs, columns=columns, drafts=drafts
            )

    def _make_graphs(
        self, served: Served, sizes: tuple[int, ...], columns: int, drafts: int, depths: int
    ) -> None:
        """Graphs of decode steps with every number of queries; captured by `benthic.serve.capture`."""
        numbers = range(1, drafts + 2)
        room = sizes[-1], numbers[-1], columns
        buffers = StepBuffers.blank(self.model, *room)
        self.graphs = {
            queries: StepGraphs(served, sizes, queries, steps=self.steps, buffers=buffers)
            for queries in numbers
        }
        if depths:
            given = ModuleBuffers.blank(self.model, *room)
            self.modules = {
                (depth, queries): ModuleGraphs(served, sizes, queries, depth=depth, buffers=given)
                for depth in range(depths)
                for queries in numbers
            }
        if depths == 1 and self._alone and self._turns is None:
            self.tails = {
                queries: TailGraphs(graphs, self.ahead_ND, self.ahead_previous_ND)
                for queries, graphs in self.graphs.items()
            }

    @property
    def all_graphs(self) -> tuple[Graphs, ...]:
        """Everything to capture, what needs the most memory first: the others find it there."""
        return (*self.prompts, *self.graphs.values(), *self.tails.values(), *self.modules.values())

    def release(self) -> None:
        """Give up graphs, which hold on to the group that they communicate in; steps then run as written."""
        for graphs in self.all_graphs:
            graphs.release()

    def write(self, tables: Iterable[TableWrite]) -> None:
        """Apply a plan's block-table writes; a second time changes nothing."""
        self.steps.write(tables)

    def move(self, plan: StepPlan) -> None:
        """Make the copies of a plan, if there are any, before it is drafted for or run; nothing waits."""
        if plan.to_host or plan.from_host:
            if self._lead is not None:
                self._lead.move(plan)
            self.cache.move(plan.to_host, plan.from_host)

    @torch.inference_mode()
    def run(self, plan: StepPlan, drafts: Drafts | None = None) -> StepResult:
        """Compute one step, verifying `drafts`. Cost: one forward pass of `plan.num_tokens` rows."""
        if self._lead is not None:
            self._lead.step(plan, drafts)
        self.write(plan.tables)
        rows = self.steps.rows(plan, drafts)
        queries = 1 if drafts is None else drafts.queries
        graphs = self.graphs.get(queries)
        size = None if graphs is None else graphs.size_of(rows)
        if self._turns is not None:
            first = halves.first_rows(rows) if self._halve_from else 0
            size = self._agreed(size, MODEL, queries, len(rows.position_T), first)
        if graphs is not None and size is not None:
            replayed = graphs.run(rows, size)
            return self._result(replayed.outputs, replayed.step, replayed.drawn if self._alone else None)
        step = self.steps.tensors(rows)
        taped = None if self.tapes is None or drafts is not None else self.tapes.run(step)
        if taped is not None:
            return self._result(taped, step, None)
        hidden = self._hidden(rows, step)
        hidden_TD = hidden.hidden_TD
        sampled_SD = hidden_TD if step.sampled_S is None else hidden_TD.index_select(0, step.sampled_S)
        return StepResult(self.logits(sampled_SD), hidden_TD, self.model.mtp_input(hidden), step)

    def _hidden(self, rows: StepRows, step: StepTensors) -> Hidden:
        """The states of a step's rows, from a graph that holds it or as it is written."""
        if self._turns is not None and self._turns.halves:
            parts = map(self.steps.tensors, halves.divide(rows, halves.first_rows(rows)))
            return self._in_halves([(part.tokens_T, part.positions_T, part.layout) for part in parts])
        for graphs in self.prompts:
            size = graphs.size_of(rows)
            if size is not None:
                return graphs.run(rows, step, size)
        return self.model(step.tokens_T, step.positions_T, self._sockets(step.layout))

    def _result(self, found: Replayed, step: StepTensors, drawn: Drawn | None) -> StepResult:
        hidden = Hidden(found.pre_norm_TD, found.hidden_TD, ())
        return StepResult(found.logits_TV, hidden.hidden_TD, self.model.mtp_input(hidden), step, drawn)

    def _in_halves(self, parts: list[tuple[Tensor, Tensor, StepLayout]]) -> Hidden:
        """A pass in two halves, each with its rows' way to the experts."""
        assert self._turns is not None  # noqa: S101 (the caller has looked)
        first, second = [
            halves.Half(tokens_T, positions_T, self._sockets(layout, exchange))
            for (tokens_T, positions_T, layout), exchange in zip(parts, self._turns.halves, strict=True)
        ]
        return halves.run(self.model, first, second)

    def _agreed(self, size: int | None, module: int, queries: int, rows: int, first: int = 0) -> int | None:
        """The batch in which all replay this pass, or None: as written. Passes of others may come first."""
        assert self._turns is not None  # noqa: S101 (the caller has looked)
        intent = Intent(
            rows=rows, size=size or 0, queries=queries, working=True, module=module, first=first,
            large=rows >= self._halve_from,
        )  # fmt: skip
        while not intent.joins(turn := self._turns.take(intent)):
            self.stand_in(turn)
            intent = intent._replace(waited=intent.waited + 1)
        return turn.size or None

    @torch.inference_mode()
    def stand_in(self, turn: Turn) -> None:
        """Run rows that store nothing and see nothing, because others run theirs."""
        if turn.size:
            main, key = turn.module == MODEL, (turn.module, turn.queries)
            graphs: Graphs = self.graphs[turn.queries] if main else self.modules[key]
            graphs.idle(turn.size)
            return
        zero_T = torch.zeros(1, dtype=torch.int64, device=self.cache.pages_LPBW.device)
        none_S = zero_T.to(torch.int32)
        layout = StepLayout(zero_T - 1, DecodeRows(1, none_S.unsqueeze(0), none_S), None)
        sockets = self._sockets(layout)
        if turn.halves:
            self._in_halves([(zero_T, zero_T, layout)] * 2)
        elif turn.module == MODEL:
            self.model(zero_T, zero_T, sockets)
        else:
            previous_TD = self.model.embed(zero_T)
            self.model.predict_ahead(turn.module, previous_TD, zero_T, zero_T, sockets)

    def ahead(
        self, depth: int, previous_TD: Tensor, token_T: Tensor, position_T: Tensor, layout: StepLayout
    ) -> Hidden:
        """Run one prediction module over rows of a step or of a draft; see `DeepSeek.predict_ahead`.

        The next call may overwrite what this one returned, in the order of the stream.
        """
        if self._turns is not None:
            previous_TD = previous_TD.clone()  # what runs for others meanwhile may overwrite it
        queries = 1 if layout.decode is None else layout.decode.queries
        graphs = self.modules.get((depth, queries))
        rows = ModuleRows(previous_TD, token_T, position_T, layout)
        size = None if graphs is None else graphs.size_of(rows)
        if self._turns is not None:
            size = self._agreed(size, depth, queries, len(token_T))
        if graphs is not None and size is not None:
            return graphs.run(rows, size)
        return self.model.predict_ahead(depth, previous_TD, token_T, position_T, self._sockets(layout))

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores of the next token for some rows."""
        return self.model.logits(hidden_SD, self._plugs.linear)

    def _sockets(self, layout: StepLayout, exchange: Exchange | None = None) -> Sockets:
        if exchange is None and self._turns is not None:
            exchange = self._turns.exchange
        plugs = self._plugs if exchange is None else replace(self._plugs, exchange=exchange)
        return plugs.sockets(self.cache, layout)

    @torch.inference_mode()
    def row_logits(self, result: StepResult, rows: range) -> Iterator[Tensor]:
        """Logits of some rows of a step, `LOGIT_ROWS` at a time (for prompt log-probabilities)."""
        for start in range(rows.start, rows.stop, LOGIT_ROWS):
            some = range(start, min(start + LOGIT_ROWS, rows.stop))
            if self._lead is not None:
                self._lead.score(some)
            yield self.logits(result.hidden_TD[some.start : some.stop])

    @torch.inference_mode()
    def remember(self, slots: tuple[int, ...], token_S: Tensor) -> None:
        """Note the newest token of each slot, which its next decode row feeds; nothing waits."""
        if self._lead is not None:
            self._lead.newest(slots, token_S)
        self.steps.remember(slots, token_S)
