"""One way to train a model: everything that its memory and its time depend on, as a hashable value.

A `Candidate` is a `benthic.parallel.setup.Setup`, so the trainer's own arithmetic counts its memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from benthic.errors import ConfigError, ScheduleError, UnknownFieldError
from benthic.parallel.setup import number, unrecordable
from benthic.sched.pipeline import schedules

if TYPE_CHECKING:
    from benthic.parallel.setup import Setup
    from benthic.plan.cost.ops import Dtype
    from benthic.sched.pipeline.table import Table
    from benthic.spec.layout import Layout
    from benthic.spec.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokens of a row, rows of a microbatch.

    kept_pairs: share of a row's causal pairs that document masks leave; None: no masks.
    cuda_graph: launch a step as one CUDA graph where that is possible, so that no host keeps a GPU waiting.
    """

    seq_len: int = 4096
    local_batch_size: int = 1
    kept_pairs: float | None = None
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        if self.kept_pairs is not None and not 0.0 < self.kept_pairs <= 1.0:
            message = (
                f"kept_pairs = {self.kept_pairs}, but document masks leave a share in (0, 1] of the pairs. "
                "Give the sum of squared document lengths over that of squared row lengths."
            )
            raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What numbers are kept in; the words of `train.config.PrecisionConfig`."""

    weights: str = "bfloat16"
    matmul: str = "bfloat16"
    fp8_swiglu: bool = False
    e5m6_attention: bool = False

    @property
    def products(self) -> Dtype:
        """The dtype of linear layers' products."""
        words: dict[str, Dtype] = {"fp8": "fp8", "bfloat16": "bf16", "float32": "fp32"}
        return words[self.matmul]


@dataclass(frozen=True, kw_only=True)
class Updates:
    """The optimizer's state, as in `train.config`. `fused`: whether an update is one kernel, as on GPUs."""

    name: str = "adamw"
    moment_dtype: str = "bfloat16"
    store_param_remainders: bool = False
    fused: bool = True


PRECISIONS: Final[dict[str, Numbers]] = {
    "bf16": Numbers(),
    "fp8": Numbers(weights="fp8", matmul="fp8", fp8_swiglu=True, e5m6_attention=True),
}
RECOMPUTES: Final[dict[str, tuple[str, ...]]] = {
    "none": (),
    "deepseek-v3": ("deepseek-v3",),
    "experts": ("experts",),
    "attention and experts": ("attention", "experts"),
}
"""What a search tries, from keeping everything to keeping a row of each phase."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its batch, precision and recomputation.

    rows: of one optimizer step, over all ranks.
    skew: rows that the busiest expert rank gets, over the mean.
    first_skew: the same while biases have not learnt, which memory must hold. Of Moonlight's first three
        mixtures with fresh weights, on a row of Python sources, one half of the experts got 1.18, 1.01 and
        1.08 times the mean; the fullest layer makes the peak.
    idle: share of experts that get no row of a microbatch, as where a gate learns faster than its biases.
    """

    model: ModelConfig
    layout: Layout
    train: Rows
    rows: int
    precision: Numbers = field(default_factory=Numbers)
    optimizer: Updates = field(default_factory=Updates)
    recompute: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    skew: float = 1.0
    first_skew: float = 1.18
    idle: float = 0.0

    @classmethod
    def of(cls, setup: Setup, rows: int) -> Candidate:
        """What a resolved training run is, with `rows` rows a step; `settings` is the way back."""
        sizes, numbers, updates = setup.train, setup.precision, setup.optimizer
        return cls(
            model=setup.model,
            layout=setup.layout,
            train=Rows(
                seq_len=number(sizes.seq_len),
                local_batch_size=number(sizes.local_batch_size),
                cuda_graph=bool(sizes.cuda_graph),
            ),
            rows=rows,
            precision=Numbers(
                weights=numbers.weights,
                matmul=numbers.matmul,
                fp8_swiglu=numbers.fp8_swiglu,
                e5m6_attention=numbers.e5m6_attention,
            ),
            optimizer=Updates(
                name=updates.name,
                moment_dtype=updates.moment_dtype,
                store_param_remainders=updates.store_param_remainders,
            ),
            recompute=tuple(setup.recompute),
            offload=tuple(setup.offload),
        )

    def recorded(self, gpus_per_node: int) -> bool:
        """Whether a step runs as a CUDA graph."""
        return self.train.cuda_graph and not unrecordable(self, counted=self.layout.ep_degree > gpus_per_node)

    @property
    def microbatches(self) -> int:
        """Of one pipeline in one step."""
        return self.rows // (self.layout.dp_degree * self.train.local_batch_size)

    @property
    def step_tokens(self) -> int:
        """Of one optimizer step."""
        return self.rows * self.train.seq_len

    def table(self) -> Table:
        """Its pipeline schedule.

        Raises:
            ConfigError: the schedule does not exist for these ranks and microbatches.
        """
        layout = self.layout
        return schedules.build(
            layout.schedule, layout.pp_degree, self.microbatches, virtual_stages=layout.virtual_stages
        )

    def problems(self, *, gpus: int) -> tuple[str, ...]:
        """Everything that keeps it from running on `gpus`, with its numbers; nothing if it runs."""
        found = list(self.layout.problems(self.model, ranks=gpus, seq_len=self.train.seq_len))
        share = self.layout.dp_degree * self.train.local_batch_size
        if share < 1 or self.rows % share:
            found.append(
                f"{self.rows} rows a step are no multiple of dp_degree {self.layout.dp_degree} x "
                f"local_batch_size {self.train.local_batch_size} = {share}. Change the batch or a degree."
            )
        if not found:
            try:
                self.table()
            except (ConfigError, ScheduleError) as error:
                found.append(str(error))
        return tuple(found)

    def settings(self) -> dict[str, Any]:
        """What the fields of a training run's config must be for it to be this candidate."""
        fields: dict[str, Any] = {f"layout.{name}": value for name, value in vars(self.layout).items()}
        fields |= {f"precision.{name}": value for name, value in vars(self.precision).items()}
        fields |= {
            "train.seq_len": self.train.seq_len,
            "train.local_batch_size": self.train.local_batch_size,
            "train.global_batch_size": self.rows,
            "train.batch_curve": None,
            "optimizer.name": self.optimizer.name,
            "optimizer.moment_dtype": self.optimizer.moment_dtype,
            "optimizer.store_param_remainders": self.optimizer.store_param_remainders,
            "recompute": self.recompute,
            "offload": self.offload,
        }
        # text is sampled where one rank has the whole network
        return fields | ({"log.sample_tokens": 0} if self.layout.ranks > 1 else {})

    def words(self) -> str:
        """Short: `PP16 dualpipe x DP128 x EP64, ZeRO-1, 1 row a microbatch, fp8, recompute deepseek-v3`."""
        layout = self.layout
        stages = "" if layout.virtual_stages is None else f" v{layout.virtual_stages}"
        schedule = f" {layout.schedule}{stages}" if layout.pp_degree > 1 or layout.schedule != "1f1b" else ""
        degrees = [f"PP{layout.pp_degree}{schedule}", f"DP{layout.dp_degree}", f"EP{layout.ep_degree}"]
        degrees += [f"TP{layout.tp_degree}"] if layout.tp_degree > 1 else []
        degrees += [f"CP{layout.cp_degree}"] if layout.cp_degree > 1 else []
        rows = f"{self.train.local_batch_size} row{'s' * (self.train.local_batch_size > 1)} a microbatch"
        again = f"recompute {' + '.join(self.recompute)}" if self.recompute else "recompute nothing"
        return f"{' x '.join(degrees)}, ZeRO-{layout.zero_stage}, {rows}, {self.precision.products}, {again}"


def precision(name: str) -> Numbers:
    """The precision called `name`.

    Raises:
        UnknownFieldError: there is none.
    """
    if name not in PRECISIONS:
        raise UnknownFieldError(kind="precision", name=name, known=PRECISIONS)
    return PRECISIONS[name]
