"""AdamW (Loshchilov and Hutter, 2019) with float32 masters and moments in float32 or bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import TensorMismatchError
from benthic.train.precision import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from benthic.train.config import OptimizerConfig


class AdamW:
    """Updates the parameters of a model in place.

    Written here because torch's AdamW refuses bfloat16 moments of float32 parameters on CPUs. Parameters
    narrower than float32 get a float32 master, which is updated and then rounded into the parameter. Weight
    decay touches matrices, not norms. Arithmetic is float32 whatever the moments are kept in.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.steps = 0
        self._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        dtype = DTYPES[config.moment_dtype]
        self._first = {n: torch.zeros_like(p, dtype=dtype) for n, p in self._params.items()}
        self._second = {n: torch.zeros_like(p, dtype=dtype) for n, p in self._params.items()}
        narrow = {n: p for n, p in self._params.items() if p.dtype != torch.float32}
        self._master = {n: p.detach().float() for n, p in narrow.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, lr: float, scale: float = 1.0) -> None:
        """One update with `scale` times the gradients (the clipping factor)."""
        self.steps += 1
        for name, gradient in gradients.items():
            param = self._params[name]
            master = self._master.get(name, param)
            self._update(name, master, gradient * scale, lr)
            if master is not param:
                param.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Everything an exact continuation needs beside the parameters and `steps`."""
        groups = {"first": self._first, "second": self._second, "master": self._master}
        return {f"{group}.{name}": t for group, held in groups.items() for name, t in held.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take over what `state` gave.

        Raises:
            TensorMismatchError: tensors missing, extra or of another dtype, all named.
        """
        own = self.state()
        wrong = sorted(set(own) ^ set(state))
        wrong += [name for name in set(own) & set(state) if own[name].dtype != state[name].dtype]
        if wrong:
            message = (
                f"{len(wrong)} tensors differ between optimizer ({len(own)}) and checkpoint ({len(state)}): "
                f"{', '.join(wrong[:8])}. "
                "Keep optimizer.moment_dtype and precision.weights as they were."
            )
            raise TensorMismatchError(message)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.steps = steps

    def _update(self, name: str, master: Tensor, gradient: Tensor, lr: float) -> None:
        """One tensor; `.float()` is the moment itself when it is kept in float32, a copy otherwise."""
        c = self.config
        first = self._first[name].float().lerp_(gradient, 1.0 - c.beta1)
        second = self._second[name].float().mul_(c.beta2).addcmul_(gradient, gradient, value=1.0 - c.beta2)
        _keep(self._first[name], first)
        _keep(self._second[name], second)
        if master.dim() >= 2:
            master.mul_(1.0 - lr * c.weight_decay)
        root = second.div(1.0 - c.beta2**self.steps).sqrt_().add_(c.eps)
        master.addcdiv_(first, root, value=-lr / (1.0 - c.beta1**self.steps))


def _keep(moment: Tensor, value: Tensor) -> None:
    if value is not moment:
        moment.copy_(value)
