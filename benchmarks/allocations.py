"""What one rank of a training run allocates on a GPU in a step, without one: on torch's meta device.

The trainer runs as it is. Ops choose what they would choose on a GPU, Triton kernels are not launched,
process groups are torch's fake ones, and what the host would read of a tensor is 1, or of the rows that
arrive at experts the mean. A dispatch mode sees every storage that is made and hears when it is gone. Not
seen: what libraries ask for themselves (cuBLAS, cuDNN, NCCL), what the allocator rounds up, and memory that
peers write, which is not the allocator's.
"""

from __future__ import annotations

import contextlib
import gc
import random
import weakref
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benthic.kernels import triton_loss
from benthic.kernels.table import Op
from benthic.parallel.activations import arrivals
from benthic.parallel.exchange import AllToAllExchange
from benthic.parallel.exchange_memory import PeerMemory
from benthic.parallel.mesh import Mesh
from benthic.parallel.setup import number
from benthic.train.data.shards import TokenShards, read_meta, write_made_up
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from benthic.parallel.exchange_routes import Choice
    from benthic.train.config import RunConfig

META: Final = torch.device("meta")
aten = torch.ops.aten
WITHOUT_META: Final = (aten.mm.dtype, aten.addmm.dtype_out, aten._scaled_mm_v2.default)  # noqa: SLF001
"""Products of two matrices into another dtype, which torch has for CUDA alone, or checks wrongly without."""


class Allocations(TorchDispatchMode):
    """Bytes of meta tensors in use, and the most so far; not of memory that peers write.

    Args:
        read: what the host reads of a tensor without dims.
    """

    def __init__(self, read: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.of_peers: Tensor | None = None
        self.read = read
        self._size: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __torch_dispatch__(
        self, func: Any, _types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Do it, and note what is new."""
        words = kwargs or {}
        before = {_key(tensor) for tensor in _tensors((*args, *words.values()))}
        out = self._run(func, args, words)
        for tensor in _tensors(out):
            if tensor.device == META and _key(tensor) not in before:
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is gone."""
        key = storage._cdata  # noqa: SLF001 (where it is, which names it while it lives)
        if key not in self._size and (self.of_peers is None or key != _key(self.of_peers)):
            self._size[key] = 0
            self._set(key, storage.nbytes())
            weakref.finalize(storage, self._forget, key).atexit = False

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
        """As `UntypedStorage.resize_`."""
        self._resize(storage, nbytes)
        if storage._cdata in self._size:  # noqa: SLF001
            self._set(storage._cdata, nbytes)  # noqa: SLF001
        return storage

    def _run(self, func: Any, args: tuple[Any, ...], words: dict[str, Any]) -> object:
        if func is aten._local_scalar_dense.default and args[0].device == META:  # noqa: SLF001
            return self.read(args[0])
        if func is aten._to_copy.default and args[0].device == META != words.get("device", META):  # noqa: SLF001
            return torch.ones(args[0].shape, dtype=words.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and args[1].device == META != args[0].device:
            return args[0]
        return _unwritten(*args, **words) if func in WITHOUT_META else func(*args, **words)

    def _set(self, key: int, nbytes: int) -> None:
        self.bytes += nbytes - self._size[key]
        self._size[key] = nbytes
        self.peak = max(self.peak, self.bytes)

    def _forget(self, key: int) -> None:
        self._set(key, 0)
        del self._size[key]


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata  # noqa: SLF001
    return key


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, list | tuple) else []


def _unwritten(*operands: Any, out: Tensor | None = None, **options: Any) -> Tensor:
    """The output of a product in `WITHOUT_META`."""
    if out is not None:
        return out
    dtype = next(each for each in (*operands, *options.values()) if isinstance(each, torch.dtype))
    empty: Tensor = operands[0].new_empty(operands[0].shape[0], operands[1].shape[1], dtype=dtype)
    return empty


def peak_of_a_step(config: RunConfig, data: Path, rank: int = 0) -> int:
    """The most bytes in use in a step of one rank of a resolved run, whose device is "meta".

    The second step, where FP8 copies are made beside those of the step before.
    """
    gc.collect()
    with world(config, rank), on_meta(config) as found:
        before = {_key(tensor) for tensor in _all()}
        trainer = Trainer(config, TokenShards(data, read_meta(data), "train"), Mesh.of(config.layout, rank))
        for tensor in _all():
            if _key(tensor) not in before:
                found.note(tensor.untyped_storage())
        with found:
            trainer.step()
            if config.precision.weights == "fp8":
                trainer.step()
        return found.peak


def _all() -> list[Tensor]:
    """Every tensor on meta."""
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return [tensor for tensor in found if tensor.device == META]


@contextlib.contextmanager
def world(config: RunConfig, rank: int) -> Iterator[None]:
    """Process groups that communicate nothing; what was sent has arrived."""
    if config.layout.ranks == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.layout.ranks)
    with mock.patch.object(dist, "isend", _Done), mock.patch.object(dist, "irecv", _Done):
        yield
    dist.destroy_process_group()


class _Done:
    """A transfer that is over."""

    def __init__(self, *_args: object, **_options: object) -> None:
        self.is_completed = self.wait = lambda: True


class Keeping:
    """A push that is under way until it is joined."""

    def __init__(self, push: Callable[[], None], inputs: object) -> None:
        push()
        self.inputs: object = inputs

    def join(self) -> None:
        """Let go of the inputs."""
        self.inputs = None

    def wait(self) -> None:
        """Nothing."""


@contextlib.contextmanager
def on_meta(config: RunConfig) -> Iterator[Allocations]:
    """The trainer's allocations with the choices of a GPU, but nothing computed."""
    tokens = number(config.train.local_batch_size) * number(config.train.seq_len)
    tokens //= config.layout.token_shards
    copies = tokens * config.model.num_experts_per_tok

    def read(tensor: Tensor) -> float:
        if tensor.dtype == torch.int32:
            return copies
        return 1.0 if tensor.dtype.is_floating_point else 1

    def counts(exchange: AllToAllExchange, chosen: Choice) -> list[list[list[int]]]:
        dist.all_to_all_single(torch.empty_like(chosen.counts_n2), chosen.counts_n2, group=exchange.group)
        rows = round(tokens * arrivals(config.model, exchange.ranks) / exchange.ranks)
        return [[[rows, round(copies / exchange.ranks)]] * exchange.ranks] * 2

    def symmetric(group: dist.ProcessGroup, words: int, device: torch.device) -> PeerMemory:
        found.of_peers = own = torch.empty(words, dtype=torch.int32, device=device)
        return PeerMemory((own,) * group.size(), group.rank())

    def resize(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
        return found.resize(storage, nbytes)

    found, choose = Allocations(read), Op.choose

    def on_gpu(op: Op, case: Any, impl: str | None = None) -> Any:
        return choose(op, case._replace(device="cuda"), impl)

    with contextlib.ExitStack() as stack:
        for where, name, stand_in in (
            (JITFunction, "run", lambda *_args, **_options: None),
            (Op, "choose", on_gpu),
            (AllToAllExchange, "_counts", counts),
            (PeerMemory, "symmetric", staticmethod(symmetric)),
            (torch.UntypedStorage, "resize_", resize),
        ):
            stack.enter_context(mock.patch.object(where, name, stand_in))
        stack.enter_context(mock.patch("benthic.parallel.stages.initialise"))
        stack.enter_context(mock.patch("benthic.parallel.exchange_nvlink.push_stream", return_value=Keeping))
        stack.enter_context(mock.patch.dict(triton_loss._ROOM, meta=triton_loss._ROOM["cuda"]))  # noqa: SLF001
        yield found


def write_documents(folder: Path) -> Path:
    """Documents of 500 to 5,000 tokens: rows of 4,096 hold two on average."""
    lengths = random.Random(7)  # noqa: S311 (sizes, not secrets)
    documents = {
        split: [[2] * lengths.randint(500, 5000) for _ in range(100)] for split in ("train", "held_out")
    }
    return write_made_up(folder, documents, vocab_size=3, shard_tokens=400_000)
