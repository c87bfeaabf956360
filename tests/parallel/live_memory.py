"""Counts the bytes of all tensors that are alive, those that only autograd's graph holds included."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Notes every storage that an operation makes while the mode is on; `bytes` are of those still in use.

    What operations in `without` make is not counted.
    """

    def __init__(self, without: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._without = without
        self._made: dict[int, tuple[StorageWeakRef, int, tuple[str, tuple[int, ...], torch.dtype]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata in before or str(func) in self._without:
                continue
            ref = StorageWeakRef(storage)
            self._made[id(ref)] = (ref, storage.nbytes(), (str(func), tuple(tensor.shape), tensor.dtype))
        return out

    def alive(self) -> list[tuple[int, str, tuple[int, ...], torch.dtype]]:
        """Bytes, operation, shape and dtype of each storage that is still in use."""
        found = [(nbytes, *what) for ref, nbytes, what in self._made.values() if not ref.expired()]
        return sorted(found, key=lambda one: -one[0])

    @property
    def bytes(self) -> int:
        return sum(nbytes for nbytes, *_ in self.alive())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, list | tuple) or type(value).__name__ == "dict_values":
        return [t for each in value for t in _tensors(each)]
    return []
