"""What a training run's memory depends on, whoever asks: the trainer's config or a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.spec.layout import Layout
    from benthic.spec.model import ModelConfig

PIECES: Final = ("norms", "up_projections", "swiglu", "expert_inputs", "expert_outputs")
"""What can be recomputed within a block's phases."""
PRESETS: Final = {"deepseek-v3": ("norms", "up_projections", "swiglu", "expert_outputs")}
MUON_PARTS: Final = frozenset(
    {"attention", "dense MLP", "routed experts", "shared experts", "MTP projection"}
)
"""Parts of the network whose matrices are Muon's, if that is the optimizer."""

SPARE_ROWS: Final = 16
"""Where the host does not ask how many rows came to the experts here, there is room for a sixteenth more than
each dispatch has brought before, and for twice that after a surprise; spare rows are zeros."""


class Rows(Protocol):
    """Sizes of a microbatch; `auto` must have been replaced."""

    @property
    def seq_len(self) -> int | str:
        """Tokens of one row."""
        ...

    @property
    def local_batch_size(self) -> int | str:
        """Rows of one microbatch."""
        ...

    @property
    def cuda_graph(self) -> bool | str:
        """Whether a step is one graph, where nothing needs the host."""
        ...


class Precision(Protocol):
    """What the numbers are kept in, as `train.config.PrecisionConfig` says."""

    @property
    def weights(self) -> str:
        """float32, bfloat16 or fp8."""
        ...

    @property
    def matmul(self) -> str:
        """float32, bfloat16 or fp8."""
        ...

    @property
    def fp8_swiglu(self) -> bool:
        """Whether inputs of SwiGLU are kept in FP8."""
        ...

    @property
    def e5m6_attention(self) -> bool:
        """Whether outputs of attention are kept in E5M6."""
        ...


class Updates(Protocol):
    """The optimizer's state."""

    @property
    def name(self) -> str:
        """Adamw or muon."""
        ...

    @property
    def moment_dtype(self) -> str:
        """float32 or bfloat16."""
        ...

    @property
    def store_param_remainders(self) -> bool:
        """Whether 16 bits beside a bfloat16 weight are kept instead of its master."""
        ...


class Setup(Protocol):
    """A resolved run. `train.config.RunConfig` is one."""

    @property
    def model(self) -> ModelConfig:
        """The network."""
        ...

    @property
    def layout(self) -> Layout:
        """How ranks divide it."""
        ...

    @property
    def train(self) -> Rows:
        """Its microbatches."""
        ...

    @property
    def precision(self) -> Precision:
        """Its numbers."""
        ...

    @property
    def optimizer(self) -> Updates:
        """Its optimizer."""
        ...

    @property
    def recompute(self) -> Sequence[str]:
        """Phases, pieces and presets that backward computes again."""
        ...

    @property
    def offload(self) -> Sequence[str]:
        """Phases whose activations wait in host memory."""
        ...


def expanded(recompute: Sequence[str]) -> frozenset[str]:
    """Phases and pieces, presets replaced by what they stand for."""
    return frozenset(part for name in recompute for part in PRESETS.get(name, (name,)))


def unrecordable(setup: Setup, *, counted: bool) -> str:
    """Why the host must stay in a step, so that none can be a CUDA graph; empty: it need not.

    `counted`: the exchange asks the device how many rows travel between ranks.
    """
    if counted:
        return "an exchange over hosts, or all_to_all, asks the device how many rows travel"
    if setup.layout.cp_degree > 1:
        return f"layout.cp_degree={setup.layout.cp_degree} cuts documents on the host"
    if setup.offload:
        return f"offload={', '.join(setup.offload)} brings activations to the host"
    return ""


def number(value: int | str) -> int:
    """A field that `train.resolve` has made a number.

    Raises:
        ConfigError: it is still `auto`.
    """
    if isinstance(value, str):
        message = f"{value!r} is not resolved; call train.resolve first."
        raise ConfigError(message)
    return value
