"""Which pieces of the network one instance holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Part:
    """Layers by index, MTP modules by depth, and whether embedding and head are here.

    A pipeline stage is one part; parameter names do not depend on it. The final norm goes with the head. MTP
    modules share the embedding and the head, so the part that holds them holds those too.
    """

    layers: tuple[int, ...]
    embed: bool = False
    head: bool = False
    mtp: tuple[int, ...] = ()

    @classmethod
    def whole(cls, config: ModelConfig) -> Part:
        """Every layer, the embedding, the head and every MTP module of the config."""
        return cls(
            layers=tuple(range(config.num_hidden_layers)),
            embed=True,
            head=True,
            mtp=tuple(range(config.num_nextn_predict_layers)),
        )

    def check(self, config: ModelConfig) -> None:
        """Refuse pieces that the config does not have, or that cannot work without another.

        Raises:
            ConfigError: naming the pieces.
        """
        layers, depths = config.num_hidden_layers, config.num_nextn_predict_layers
        absent = [i for i in self.layers if not 0 <= i < layers]
        if absent:
            message = f"part holds layers {absent}, but num_hidden_layers = {layers}."
            raise ConfigError(message)
        deep = [k for k in self.mtp if not 0 <= k < depths]
        if deep:
            message = f"part holds MTP modules {deep}, but num_nextn_predict_layers = {depths}."
            raise ConfigError(message)
        if self.mtp and not (self.embed and self.head):
            message = (
                f"part holds MTP modules {list(self.mtp)} without embed and head, which they share. Add both."
            )
            raise ConfigError(message)
        if config.tie_word_embeddings and self.head and not self.embed:
            message = (
                "part holds the head but not the embedding; tie_word_embeddings makes them one. Add embed."
            )
            raise ConfigError(message)

    def holds(self, name: str) -> bool:
        """Whether the parameter called `name` (as in `benthic.spec.parameters`) lives in this part."""
        top, _, rest = name.partition(".")
        index = rest.partition(".")[0]
        if top == "layers":
            return int(index) in self.layers
        if top == "mtp":
            return int(index) in self.mtp
        return self.embed if top == "embed" else self.head
