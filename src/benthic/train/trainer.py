"""One training run's state and its step: batch, losses, gradients, update, bias."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benthic import collector
from benthic.errors import CheckpointError, ConfigError
from benthic.model.block import MoeBlock
from benthic.model.products import WeightGradients
from benthic.parallel.mesh import Mesh
from benthic.parallel.setup import number
from benthic.parallel.stages import build
from benthic.parallel.tensor import divide_products
from benthic.spec.parameters import parameters
from benthic.train.balance import update_bias
from benthic.train.checkpoint import Saved
from benthic.train.contents import random_states, set_random_states, tensors_of
from benthic.train.curve import cosine, warmup
from benthic.train.data.microbatch import Batches, ReadAhead
from benthic.train.data.packing import Packing, WholePacking
from benthic.train.exchange import build_exchange
from benthic.train.executor import Executor, Sums, total_of
from benthic.train.fields import to_json
from benthic.train.losses import targets_of, weights_of
from benthic.train.muon import Muon
from benthic.train.numerics import check_gradients, check_losses
from benthic.train.optimizer import AdamW
from benthic.train.precision import keep_weights, linear_socket
from benthic.train.recompute import recompute
from benthic.train.recording import Direct, Recorded
from benthic.train.rows import rows_at, table_of
from benthic.train.spikes import Spikes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.parallel.buckets import Bucket
    from benthic.parallel.stages import Stages
    from benthic.sched.pipeline.table import Table
    from benthic.train.checkpoint import Stored
    from benthic.train.config import LoopConfig, RunConfig
    from benthic.train.data.microbatch import Microbatch
    from benthic.train.data.shards import TokenShards
    from benthic.train.losses import Weights
    from benthic.train.recording import Computation

# What decides the numbers of a run; the rest of the config, its layout too, may change on resuming.
_FIXED = (
    "model.",
    "data.mask_documents",
    "data.packing",
    "data.seed",
    "train.seq_len",
    "train.global_batch_size",
    "precision.weights",
    "optimizer.name",
    "optimizer.moment_dtype",
)
_FREE = ("model.name",)


@dataclass(frozen=True)
class StepResult:
    """What one step did. Losses are means in nats: per target, per target, per row and layer.

    `balance` is 1 when perfectly balanced; `counts` are tokens of each expert by layer; `tokens` counts all
    tokens of the run so far, `step_tokens` those of this step. `skipped` counts steps of the run so far whose
    loss was a spike and which changed nothing (`train.spike_factor`).
    """

    step: int
    loss: float
    mtp: tuple[float, ...]
    balance: float
    grad_norm: float
    lr: float
    tokens: int
    step_tokens: int
    counts: dict[int, Tensor]
    skipped: int = 0


class Trainer:
    """Model, optimizer and position in the data; `step` moves all three, `saved` and `restore` carry them.

    Args:
        config: resolved, so that nothing in it is `auto`.
        shards: the training split.
        mesh: the ranks of the run; None: this process alone.
    """

    def __init__(self, config: RunConfig, shards: TokenShards, mesh: Mesh | None = None) -> None:
        loop, model = config.train, config.model
        torch.set_num_threads(number(loop.threads))
        torch.manual_seed(loop.seed)
        self.config, self.device = config, torch.device(config.device)
        self.mesh = Mesh.of(config.layout, 0) if mesh is None else mesh
        self.mesh.connect(self.device)
        self.rows, self.local_rows = rows_at(config, 0), number(loop.local_batch_size)
        self.table = table_of(config, self.rows)
        self.stages = build_stages(config, self.table, self.mesh)
        pack = WholePacking if config.data.packing == "whole" else Packing
        packing = pack(shards.lengths, number(loop.seq_len), config.data.seed)
        self.batches = Batches(
            shards,
            packing,
            mtp_depth=model.num_nextn_predict_layers,
            mask_documents=config.data.mask_documents,
        )
        self._reader = ReadAhead(self.batches, self.local_rows)
        sink = WeightGradients()
        self._linear = linear_socket(config.precision, sink, self.stages.models.values())
        exchange = build_exchange(config, self.table, self.mesh.expert)
        self.executor = Executor(
            model, self.table, self.stages, self.mesh, self.device, self._linear, exchange, sink
        )
        self.buckets = tuple(self.stages.all_buckets)
        for bucket in self.buckets:
            bucket.collect(sink)
        self.optimizer = optimizer_of(config, self.buckets)
        direct = Direct(self.executor, self.buckets, self.mesh)
        beside = self.optimizer.update_bytes
        self._computation: Computation = Recorded(direct, beside) if loop.cuda_graph is True else direct
        self._biases = router_biases(self.stages.models.values())
        self._data = fingerprint(shards)
        self.steps_done, self.tokens, self.position = 0, 0, 0
        self.spikes = Spikes(loop.spike_factor, loop.spike_window)
        self._targets: tuple[int, ...] = ()

    @property
    def model(self) -> DeepSeek:
        """The whole network, where one rank holds it.

        Raises:
            ConfigError: it is spread over pipeline ranks.
        """
        if len(self.stages.models) > 1 or self.mesh.layout.ranks > 1:
            message = (
                f"the model is spread over {self.mesh.layout.ranks} ranks; this needs it whole. "
                "Export a checkpoint and load that."
            )
            raise ConfigError(message)
        return self.stages.models[0]

    @collector.paused()
    def step(self) -> StepResult:
        """Run one optimizer step.

        Raises:
            NumericsError: a loss or a gradient is not finite; nothing has been updated then.
        """
        self._resize()
        step, batch = self.steps_done + 1, self._read()
        self._targets = total_of(targets_of(batch), self.mesh.data, self.device)
        weights = self._weights()
        found = self._computation.run(batch, weights)
        self._reader.read(self._starts(self.position + self.rows))  # while a GPU is busy
        sums = Sums.of(*found)
        if sums.over:
            found = self._computation.again(batch, weights)
            sums = Sums.of(*found)
        check_losses(step, sums, self.executor, batch, weights)
        check_gradients(step, sums.norm, self.gradients)
        lr = learning_rate(self.config.train, step, self.tokens)
        if not self.spikes.skips(sums.main / max(1, self._targets[0])):
            self.optimizer.step(lr=lr, scale=clip_factor(sums.norm, self.config.train.max_norm))
            for bucket in self.buckets:
                bucket.publish(rounded=True)
            self._linear.renew()
            self._balance(found.outcome.counts)
        return self._advance(step, sums, found.outcome.counts, lr)

    @property
    def recorded(self) -> bool:
        """Whether steps run as CUDA graphs, or will from the third on, unless they are measured."""
        return isinstance(self._computation, Recorded) and not self._computation.refused

    def close(self) -> None:
        """The last step is over; what belongs to steps is freed. Before the ranks' group ends."""
        self._computation.close()

    def gradients(self) -> dict[str, Tensor]:
        """What this rank updates with, by parameter: its pieces of the summed gradients, float32 and flat."""
        return {piece.name: piece.gradient for bucket in self.buckets for piece in bucket.pieces()}

    def saved(self) -> Saved:
        """Everything that an exact continuation needs of this rank; tensors share memory with the run."""
        state: dict[str, Any] = {
            "step": self.steps_done,
            "tokens": self.tokens,
            "position": self.position,
            "optimizer_steps": self.optimizer.steps,
            "spikes": self.spikes.state(),
            "data": self._data,
            "config": to_json(self.config),
        }
        tensors = tensors_of(self.config.model, self.stages, self.optimizer)
        return Saved(self.steps_done, tensors | random_states(self.mesh.rank, self.device), state)

    def restore(self, stored: Stored) -> None:
        """Continue from `stored`, which any layout may have written; running weights are made from masters.

        Raises:
            CheckpointError: it was written with other data or with settings that would change the numbers.
        """
        self._check(stored.state)
        random = random_states(self.mesh.rank, self.device)
        random = {name: one for name, one in random.items() if name in stored.reader.names}
        stored.fill(tensors_of(self.config.model, self.stages, self.optimizer) | random)
        for bucket in self.buckets:
            bucket.publish()
        set_random_states(self.mesh.rank, self.device, random)
        self.optimizer.steps = stored.state["optimizer_steps"]
        self.steps_done, self.tokens = stored.state["step"], stored.state["tokens"]
        self.position = stored.state["position"]
        self.spikes.restore(stored.state.get("spikes", {}))

    def _resize(self) -> None:
        """Take the rows that the batch curve wants of the next step."""
        rows = rows_at(self.config, self.tokens)
        if rows != self.rows:
            self.rows, self.table = rows, table_of(self.config, rows)
            self.executor.follow(self.table)

    def _read(self) -> list[Microbatch]:
        return self._reader.take(self._starts(self.position))

    def _starts(self, position: int) -> range:
        """Where this rank's microbatches start: those of all data ranks alternate within a step."""
        data = self.config.layout.dp_degree
        first = position + self.mesh.place.dp * self.local_rows
        return range(first, position + self.rows, data * self.local_rows)

    def _weights(self) -> Weights:
        loss = self.config.loss
        return weights_of(
            self._targets,
            rows=self.rows,
            mtp_weight=loss.mtp_weight.at(self.tokens),
            normaliser=loss.mtp_normaliser,
            balance_alpha=loss.balance_alpha,
        )

    def _balance(self, counts: dict[int, Tensor]) -> None:
        """Once a step, over all its microbatches."""
        speed = self.config.loss.bias_update_speed.at(self.tokens)
        for layer, bias_E in self._biases.items():
            if speed:
                update_bias(bias_E, counts[layer], speed=speed, recentre=self.config.loss.recentre_bias)

    def _advance(self, step: int, sums: Sums, counts: dict[int, Tensor], lr: float) -> StepResult:
        tokens = self.rows * number(self.config.train.seq_len)
        self.steps_done, self.tokens, self.position = step, self.tokens + tokens, self.position + self.rows
        main, *ahead = (max(1, count) for count in self._targets)
        return StepResult(
            step=step,
            loss=sums.main / main,
            mtp=tuple(term / count for term, count in zip(sums.mtp, ahead, strict=True)),
            balance=sums.balance / max(1, self.rows * len(counts)),
            grad_norm=sums.norm,
            lr=lr,
            tokens=self.tokens,
            step_tokens=tokens,
            counts=counts,
            skipped=self.spikes.skipped,
        )

    def _check(self, state: dict[str, Any]) -> None:
        if state["data"] != self._data:
            message = (
                f"the checkpoint was trained on data {state['data'][:12]}…, --data is {self._data[:12]}…. "
                "Give the folder it was trained on."
            )
            raise CheckpointError(message)
        now, then = _fixed(_flat(to_json(self.config))), _fixed(_flat(state["config"]))
        changed = [name for name in sorted(now | then) if now.get(name) != then.get(name)]
        if changed:
            lines = (f"  {n}: checkpoint {then.get(n)!r}, now {now.get(n)!r}" for n in changed)
            message = "these settings decide the numbers of a run and have changed:\n" + "\n".join(lines)
            msg = f"{message}\nSet them back, or start a new run."
            raise CheckpointError(msg)


def build_stages(config: RunConfig, table: Table, mesh: Mesh) -> Stages:
    """What this rank holds, freshly initialised, in its precision, with its phases recomputed.

    Zeros where a checkpoint will bring all weights (`train.initial`).
    """
    loaded = config.init_from and config.init_mtp == "checkpoint"
    keep = functools.partial(keep_weights, weights=config.precision.weights)
    seed = None if loaded else config.train.seed
    numbers = {"fp8": config.precision.weights == "fp8", "split": config.optimizer.store_param_remainders}
    device = torch.device(config.device)
    stages = build(config.model, table, mesh, device=device, keep=keep, seed=seed, **numbers)
    for model in stages.models.values():
        row_part = number(config.train.seq_len) // config.layout.token_shards
        divide_products(model, mesh.tensor, row_part=row_part)
        recompute(model, config)
    return stages


def optimizer_of(config: RunConfig, buckets: Sequence[Bucket]) -> AdamW | Muon:
    """The optimizer that the config names, of what this rank holds."""
    if config.optimizer.name == "muon":
        params = {param.name: param for param in parameters(config.model)}
        return Muon(buckets, config.optimizer, params)
    return AdamW([bucket.pieces() for bucket in buckets], config.optimizer)


def learning_rate(loop: LoopConfig, step: int, tokens: int) -> float:
    """The learning rate of `step` (from 1), before which `tokens` tokens were seen."""
    factor = warmup(step, loop.warmup_steps)
    if loop.lr_curve is not None:
        return factor * loop.lr_curve.at(tokens)
    if loop.schedule == "constant" or step <= loop.warmup_steps:
        return factor * loop.lr
    fraction = (step - loop.warmup_steps) / max(1, loop.steps - loop.warmup_steps)
    return loop.lr * cosine(fraction, loop.final_lr)


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied with; `max_norm=0` leaves them alone."""
    return max_norm / (norm + 1e-6) if max_norm and norm > max_norm else 1.0


def router_biases(models: Iterable[DeepSeek]) -> dict[int, Tensor]:
    """The correction bias of every layer that has one, MTP layers included, by layer index."""
    found: dict[int, Tensor] = {}
    for model in models:
        ahead = (model.mtp_module(depth).block for depth in model.part.mtp)
        gates = {b.layer: b.moe.gate for b in (*model.blocks, *ahead) if isinstance(b, MoeBlock)}
        found |= {layer: gate.bias for layer, gate in gates.items() if gate.bias is not None}
    return found


def fingerprint(shards: TokenShards) -> str:
    """One digest for a split's tokens and their order."""
    names = "".join(f"{s.sha256}{s.index_sha256}" for s in shards.info.shards)
    return hashlib.sha256(names.encode()).hexdigest()


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every leaf of a config in JSON by its dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in content.items():
        inner = isinstance(value, dict)
        leaves.update(_flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value})
    return leaves


def _fixed(leaves: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in leaves.items() if n.startswith(_FIXED) and n not in _FREE}
