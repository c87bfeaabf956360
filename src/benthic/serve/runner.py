"""Runs a plan: block table, tensors, one forward pass, logits for the rows that need them and no others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from benthic.model.local import LocalExchange
from benthic.model.network import Hidden
from benthic.model.sockets import Sockets
from benthic.serve.attend import PagedAttend
from benthic.serve.columns import ColumnLinear, fastest_linear
from benthic.serve.graphs import Buffers, DecodeGraphs, Pass
from benthic.serve.invariant import InvariantAttend
from benthic.serve.steps import StepBuilder, StepTensors
from benthic.serve.tapes import DecodeTapes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Exchange, Linear
    from benthic.sched.plans import StepPlan, TableWrite
    from benthic.serve.attend import MakeAttend, StepLayout
    from benthic.serve.cache import LatentCache
    from benthic.serve.drafts import Drafts

LOGIT_ROWS = 256
"""Most rows of prompt logits that exist at one time: 256 rows of a 129,280-token vocabulary are 132 MB."""


@dataclass(frozen=True)
class StepResult:
    """What a forward pass leaves for the sampler.

    `logits_SV` has one row for each of `StepPlan.sampled_ids`, or with drafts `1 + d` for each decode;
    `hidden_TD` and `chunk_rows` serve prompt log-probabilities, `previous_TD` feeds the first prediction
    module.
    """

    logits_SV: Tensor
    hidden_TD: Tensor
    previous_TD: Tensor
    step: StepTensors

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


class Runner:
    """One model on one device with its cache.

    Args:
        model: loaded weights, all layers.
        cache: pages for at least the model's layers.
        max_num_seqs: scheduler slots.
        max_model_len: longest sequence.
        linear: how matrices are multiplied; None takes the fastest exact way here, see
        `benthic.serve.columns`.
        enforce_eager: run every step as it is written, without tapes.
        graph_sizes: padded batch sizes for which `capture` makes CUDA graphs.
        drafts: most drafts of a sequence; every number of them up to this gets graphs of its own.
        exchange: how rows reach experts; None where all of them are here.
        lead: who else runs the same steps; None when nobody does, or where this runner is the one that is
        told.
        attend: makes the socket of a step; `InvariantAttend` wants a model made invariant and its linear.
    """

    def __init__(  # noqa: PLR0913 (what a step depends on)
        self,
        model: DeepSeek,
        cache: LatentCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        linear: Linear | None = None,
        enforce_eager: bool = False,
        graph_sizes: tuple[int, ...] = (),
        drafts: int = 0,
        exchange: Exchange | None = None,
        lead: Lead | None = None,
        attend: MakeAttend = PagedAttend,
    ) -> None:
        self._attend = attend
        self.cache = cache
        self.model = model.eval()
        self._linear = fastest_linear(model) if linear is None else linear
        self._exchange = LocalExchange(model.config.n_routed_experts) if exchange is None else exchange
        self._lead = lead
        self.tapes: DecodeTapes | None = None  # None: every step runs as it is written
        self.graphs: DecodeGraphs | None = None  # on a GPU what tapes are on a CPU
        columns = -(-max_model_len // cache.layout.block_size)
        taped = isinstance(self._linear, ColumnLinear) and cache.layout.dtype == torch.float32
        if taped and not enforce_eager:
            self.tapes = DecodeTapes(
                model, cache, linear=self._linear, exchange=self._exchange, columns=columns
            )
            self.tapes.warm_up()
        self.trials: dict[int, DecodeGraphs] = {}  # graphs of decodes with drafts, by queries a sequence
        self.modules: dict[tuple[int, int], DecodeGraphs] = {}  # of prediction modules, by depth and queries
        if graph_sizes and not enforce_eager:
            self._make_graphs(graph_sizes, columns, drafts)
        self.steps = StepBuilder(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=cache.layout.block_size,
            device=cache.pages_LPBW.device,
            reads_pages=attend is InvariantAttend,
        )

    def _make_graphs(self, sizes: tuple[int, ...], columns: int, drafts: int) -> None:
        """Graphs of every number of queries; captured by `build.capture`."""
        numbers, depths = (
            range(1, drafts + 2),
            range(self.cache.layout.layers - self.model.config.num_hidden_layers),
        )
        shared = Buffers.blank(self.model, sizes[-1], numbers[-1], columns)
        given = Buffers.blank(self.model, sizes[-1], numbers[-1], columns, module=True) if depths else shared
        of = partial(
            DecodeGraphs,
            self.model,
            self.cache,
            linear=self._linear,
            exchange=self._exchange,
            sizes=sizes,
            pool=torch.cuda.graph_pool_handle(),
            attend=self._attend,
        )
        made = {queries: of(buffers=shared, what=Pass(queries)) for queries in numbers}
        self.graphs, self.trials = made.pop(1), made
        self.modules = {
            (depth, queries): of(buffers=given, what=Pass(queries, depth))
            for depth in depths
            for queries in numbers
        }

    @property
    def all_graphs(self) -> tuple[DecodeGraphs, ...]:
        """Everything to capture."""
        return () if self.graphs is None else (self.graphs, *self.trials.values(), *self.modules.values())

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
        step = self.steps.build(plan, drafts)
        recorded = self.tapes if self.graphs is None else self.graphs
        if drafts is not None:
            recorded = self.trials.get(drafts.queries)
        replayed = None if recorded is None else recorded.run(step)
        if replayed is not None:
            hidden = Hidden(replayed.pre_norm_TD, replayed.hidden_TD, ())
            return StepResult(replayed.logits_TV, hidden.hidden_TD, self.model.mtp_input(hidden), step)
        hidden = self.model(step.tokens_T, step.positions_T, self._sockets(step.layout))
        hidden_TD = hidden.hidden_TD
        sampled_SD = hidden_TD if step.sampled_S is None else hidden_TD.index_select(0, step.sampled_S)
        return StepResult(self.logits(sampled_SD), hidden_TD, self.model.mtp_input(hidden), step)

    def ahead(
        self, depth: int, previous_TD: Tensor, token_T: Tensor, position_T: Tensor, layout: StepLayout
    ) -> Hidden:
        """Run one prediction module over rows of a step or of a draft; see `DeepSeek.predict_ahead`.

        The next call may overwrite what this one returned, in the order of the stream.
        """
        recorded = None if layout.decode is None else self.modules.get((depth, layout.decode.queries))
        if recorded is not None:
            step = StepTensors(token_T, position_T, layout, None, ())
            replayed = recorded.run(step, previous_TD)
            if replayed is not None:
                return Hidden(replayed.pre_norm_TD, replayed.hidden_TD, ())
        return self.model.predict_ahead(depth, previous_TD, token_T, position_T, self._sockets(layout))

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores of the next token for some rows."""
        return self.model.logits(hidden_SD, self._linear)

    def _sockets(self, layout: StepLayout) -> Sockets:
        return Sockets(self._attend(self.cache, layout), self._exchange, self._linear)

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
