"""Random weights for measuring speed: tokens spread over the experts as they do in a trained model.

Not for training, which starts from `benthic.model.initialise`: with those weights, far below the embeddings,
most tokens of a step go to the same experts, which flatters decoding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from benthic.model.network import DeepSeek
from benthic.model.sharded import hold
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig
    from benthic.spec.shard import Shard

EMBED_STD, HEAD_STD, STD = 1.0, 0.01, 0.02


@torch.no_grad()
def random_weights(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    seed: int,
    mtp: bool = False,
    shard: Shard | None = None,
) -> DeepSeek:
    """A model whose residual stream stays near the token's own embedding; MTP modules only where asked for.

    Matrices N(0, 0.02), those that write to the residual stream divided by sqrt(2 layers) (GPT-2 report,
    section 2.3), embeddings N(0, 1); norms 1 and router biases 0. `dtype` None is bfloat16. The same seed
    gives the same weights on devices of one kind. With `shard`, each parameter is drawn whole and this rank's
    part of it kept.
    """
    config = config if mtp else replace(config, num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = DeepSeek(config).to(dtype or torch.bfloat16)
    if shard is not None:
        hold(model, shard)
    model.to_empty(device=device)
    state = model.state_dict()
    generator = torch.Generator(device).manual_seed(seed)
    last = STD / (2 * config.num_hidden_layers) ** 0.5
    for param in parameters(model.config):
        tensor = state[param.name]
        if param.part == "norms":
            tensor.fill_(1.0)
        elif not param.trainable:
            tensor.zero_()
        else:
            ends = param.name.endswith((".o.weight", ".down.weight", "experts.down"))
            std = {"embed.weight": EMBED_STD, "head.weight": HEAD_STD}.get(param.name, last if ends else STD)
            whole = tensor if shard is None else tensor.new_empty(param.shape)
            whole.normal_(0.0, std, generator=generator)
            if shard is not None:
                tensor.copy_(whole[shard.box(param)])
    return model
