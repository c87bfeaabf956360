"""Instances of a small random model: in this process, and in processes of their own behind a router."""

from __future__ import annotations

import functools
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
from small_engine import EOS, random_model, serve, small_engine

from benthic.sched.routing import Policy
from benthic.serve.build import assemble
from benthic.serve.engine import Engine
from benthic.serve.instance import Instance, TransferOptions, digest_of
from benthic.serve.journal import Journal
from benthic.serve.options import EngineOptions
from benthic.serve.router import Router, RouterOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benthic.serve.messages import Delta, Generate
    from benthic.serve.pages import Mover
    from benthic.serve.process import EngineFactory

SETTINGS = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 4,
    "num_blocks": 256,
    "share_pages": True,
    "enforce_eager": True,
}


def small_instance(
    address: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    patience_s: float = 20.0,
    seed: int = 0,
    mover: Mover = "host",
    chunk_s: float = 0.0,
    **options: object,
) -> Instance:
    """One instance in this process; its steps last `chunk_s` longer for every chunk of a prompt."""
    torch.set_num_threads(1)
    settings = EngineOptions(**(SETTINGS | {"share_pages": mover == "host"} | options))
    model = random_model(seed=seed)
    parts = assemble(model, settings, model_name="nano", eos=(EOS,))
    transfer = TransferOptions(address=address, model=digest_of(model), patience_s=patience_s, mover=mover)
    instance = Instance(Engine(parts, settings, clock=clock), transfer, clock=clock)
    instance.engine.observers.append(lambda plan: time.sleep(chunk_s * len(plan.prefills)))
    return instance


def factory_in(
    folder: Path, *, record_in: str | None = None, **options: object
) -> Callable[[str, int], EngineFactory]:
    """What a router needs to start instances whose desks are in `folder`."""

    def factory(name: str, index: int) -> EngineFactory:
        record = {} if record_in is None else {"record": f"{record_in}/{name}"}
        return functools.partial(small_instance, f"ipc://{folder}/{name}", **(options | record))

    return factory


@contextmanager
def fleet_folder() -> Iterator[Path]:
    """A short path: those of sockets must not exceed 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="benthic-") as folder:
        yield Path(folder)


def small_router(folder: Path, prefill: int, decode: int, **settings: object) -> Router:
    """A router before instances in processes of their own."""
    engine = settings.pop("engine", {})
    options = RouterOptions(**({"log_level": 40, "policy": Policy()} | settings))
    roles = {"prefill": prefill, "decode": decode}
    journal = Journal(time.monotonic)
    return Router(factory_in(folder, **engine), roles, options, journal=journal)


def colocated(requests: list[Generate]) -> dict[str, list[int]]:
    """What one engine that does everything answers."""
    engine = small_engine(max_num_seqs=32, max_num_batched_tokens=256, num_blocks=2048, enforce_eager=True)
    return {name: answer.tokens for name, answer in serve(engine, requests).items()}


@dataclass
class Pair:
    """A prefill and a decode instance in this process, stepped in turns."""

    owner: Instance
    reader: Instance
    deltas: dict[str, list[Delta]] = field(default_factory=dict)

    def prefill(self, request: Generate) -> Delta:
        """Compute a prompt and keep it; returns the delta that says where it is."""
        held = replace_params(request, max_tokens=1, hold=True)
        self.owner.add(held)
        while self.owner.has_work:
            for delta in self.owner.step():
                if delta.finish_reason is not None:
                    return delta
        raise AssertionError

    def decode(self, request: Generate, first: Delta) -> list[int]:
        """Go on behind it in the other instance; all tokens."""
        self.reader.add(replace_params(request, output=first.tokens, pull=first.remote))
        tokens = list(first.tokens)
        until = time.monotonic() + 30
        while self.reader.has_work:
            assert time.monotonic() < until, "the decode side makes no progress"
            tokens += [token for delta in self.reader.step() for token in delta.tokens]
        return tokens

    def settle(self) -> None:
        """Let the owner hear what its desk heard."""
        until = time.monotonic() + 10
        while self.owner.stats().leased_blocks and time.monotonic() < until:
            self.owner.step()
            time.sleep(0.001)


def replace_params(request: Generate, *, max_tokens: int | None = None, **fields: object) -> Generate:
    if max_tokens is not None:
        least = min(request.params.min_tokens, max_tokens)
        fields["params"] = msgspec.structs.replace(request.params, max_tokens=max_tokens, min_tokens=least)
    return msgspec.structs.replace(request, **fields)


@contextmanager
def pair(**options: object) -> Iterator[Pair]:
    """Two instances in this process; `owner` and `reader` override options of one of them."""
    owner_options, reader_options = options.pop("owner", {}), options.pop("reader", {})
    with fleet_folder() as folder:
        made = [
            small_instance(f"ipc://{folder}/{name}", **(options | own))
            for name, own in (("owner", owner_options), ("reader", reader_options))
        ]
        try:
            yield Pair(*made)
        finally:
            for instance in made:
                instance.shut()


__all__ = ["Pair", "colocated", "fleet_folder", "pair", "replace", "small_instance", "small_router"]
