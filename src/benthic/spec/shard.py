"""Which part of every parameter one of several ranks holds that serve a model together.

Where every rank sees every token, heads, feed-forward columns and the vocabulary are divided evenly over the
ranks (Shoeybi et al. 2019); latents, norms and gates are whole on each. A layer of routed experts is divided
either by their width, like any other feed-forward network, or into whole experts. Where every rank has tokens
of its own (DeepSeek-V3 report section 3.4), whole experts are divided and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import Param

Box = tuple[slice, ...]

DIVISIBLE: Final = frozenset({"heads", "vocab", "ffn", "expert"})
"""Axes of parameters that some shard divides."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rank `index` of `size`; `whole_experts` says how routed experts are divided.

    `own_tokens`: each rank has tokens of its own, and all parameters but whole experts.
    """

    index: int = 0
    size: int = 1
    whole_experts: bool = False
    own_tokens: bool = False

    @property
    def degree(self) -> str:
        """What the number of ranks is called."""
        return "data_parallel_size" if self.own_tokens else "tensor_parallel_size"

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that does not divide.

        Raises:
            ConfigError: naming every width that does not, with both numbers.
        """
        problems = list(self.problems(config))
        if problems:
            raise ConfigError(" ".join(problems))

    def problems(self, config: ModelConfig) -> Iterator[str]:
        """Everything that keeps `config` from being divided so, a sentence each."""
        if self.own_tokens and not config.n_routed_experts:
            yield (
                f"n_routed_experts = 0, so data_parallel_size = {self.size} has no experts to divide. "
                f"Start {self.size} independent instances by --decode {self.size}."
            )
        for name, width in self._divided(config).items():
            if width % self.size:
                yield (
                    f"{name} = {width} does not divide over {self.degree} = {self.size}. "
                    f"Set {self.degree} to a divisor of {width}."
                )

    def _divided(self, config: ModelConfig) -> dict[str, int]:
        """What is divided in this model, by name."""
        if self.own_tokens:
            return {"n_routed_experts": config.n_routed_experts}
        widths = {"num_attention_heads": config.num_attention_heads, "vocab_size": config.vocab_size}
        if not all(config.is_moe(layer) for layer in range(config.num_hidden_layers)):
            widths["intermediate_size"] = config.intermediate_size
        if config.n_routed_experts:
            routed = "n_routed_experts" if self.whole_experts else "moe_intermediate_size"
            widths[routed] = getattr(config, routed)
            if config.n_shared_experts:
                shared = config.n_shared_experts * config.moe_intermediate_size
                widths["n_shared_experts x moe_intermediate_size"] = shared
        return widths

    def experts(self, config: ModelConfig) -> range:
        """The routed experts of which this rank holds anything."""
        if not self.whole_experts:
            return range(config.n_routed_experts)
        held = config.n_routed_experts // self.size
        return range(self.index * held, (self.index + 1) * held)

    def box(self, param: Param) -> Box:
        """The part of `param` that is here: one slice for each dim."""
        divided = set() if self.own_tokens else {"heads", "vocab"}
        if "expert" in param.axes and self.whole_experts:
            divided.add("expert")
        elif not self.own_tokens:
            divided.add("ffn")
        return tuple(
            self._piece(size) if axis in divided else slice(0, size)
            for size, axis in zip(param.shape, param.axes, strict=True)
        )

    def _piece(self, size: int) -> slice:
        width = size // self.size
        return slice(self.index * width, (self.index + 1) * width)


def always_held(param: Param) -> tuple[int | slice, ...]:
    """An index into `param` of what rank 0 holds at that place, however the model is divided."""
    return tuple(0 if axis in DIVISIBLE else slice(None) for axis in param.axes)
