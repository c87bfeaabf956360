"""What a checkpoint contains, under names that no layout changes.

model.NAME              float32 master of a parameter, or a router's bias
first.NAME, second.NAME moments
random.RANK.cpu         state of a rank's generator
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.parallel.held import Held
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from benthic.parallel.stages import Stages
    from benthic.spec.model import ModelConfig
    from benthic.train.muon import Muon
    from benthic.train.optimizer import AdamW


def tensors_of(config: ModelConfig, stages: Stages, optimizer: AdamW | Muon) -> dict[str, Held]:
    """What this rank updates of masters and moments, and its routers' biases; all share memory with the run.

    Of copies on several pipeline ranks (a stage of DualPipe, a shared embedding) the first rank owns each
    element; ranks of one ZeRO group hold disjoint ones. A bias is owned by all that hold it.
    """
    held = {f"model.{name}": Held.whole(bias) for name, bias in stages.named_buffers().items()}
    shapes = {param.name: param.shape for param in parameters(config)}
    for bucket in stages.all_buckets:
        owned = bucket.partners.index == 0
        for piece in bucket.pieces():
            flats = {"model": piece.kept, **optimizer.moments(piece.name)}
            local = stages.boxes[piece.name]
            for group, flat in flats.items():
                one = Held.piece(shapes[piece.name], local, piece, flat, owned=owned)
                held[f"{group}.{piece.name}"] = one
    return held


def random_states(rank: int, device: torch.device) -> dict[str, Held]:
    """Copies of the states of this rank's generators."""
    held = {f"random.{rank}.cpu": Held.whole(torch.get_rng_state())}
    if device.type == "cuda":
        held[f"random.{rank}.cuda"] = Held.whole(torch.cuda.get_rng_state(device))
    return held


def set_random_states(rank: int, device: torch.device, held: dict[str, Held]) -> None:
    """Set this rank's generators to those of `random_states` that are in `held`."""
    if (cpu := held.get(f"random.{rank}.cpu")) is not None:
        torch.set_rng_state(cpu.flat)
    if (cuda := held.get(f"random.{rank}.cuda")) is not None:
        torch.cuda.set_rng_state(cuda.flat, device)
