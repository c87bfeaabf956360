"""Instances are killed and links cut under load: the drill of `benchmarks/serve_drill.py`, short and long."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fake_engine
import forked_instances
import pytest
from small_engine import small_engine

from benthic.errors import EngineDeadError
from benthic.serve.client import EngineClient
from benthic.serve.messages import Generate, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_drill.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark, imported as it is run: beside its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec = importlib.util.spec_from_file_location("serve_drill", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "serve_drill", module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.slow
def test_requests_survive_a_kill_of_each_kind_of_instance_and_a_cut_link(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same tokens as one engine; no request, block, lease, process or folder is left."""
    forked_instances.warm_up()
    monkeypatch.setattr("benthic.serve.client.start_engine", forked_instances.start_engine)
    kinds = ("prefill", "decode", "link", "chunks")
    row = script.run(script.Drill(2, 1, kinds=kinds, kills=1), tmp_path, seed=0)
    assert [(kill["kind"], kill["kills"]) for kill in row["kills"]] == [
        ("prefill", 1),
        ("decode", 1),
        ("link", 1),
        ("chunks", 1),
    ]
    assert 0 < row["early_blocks"] < row["pulled_blocks"]
    assert row["requests_moved"] >= 2
    assert row["other_by_rounding"] <= 1
    assert not any(row["left"].values())
    engines = forked_instances.STARTED
    assert len(engines) >= 6
    assert not any(engine.is_alive() for engine in engines)


def test_another_token_is_rounding_only_where_a_nudge_draws_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, drawing = small_engine(), random.Random(3)  # noqa: S311 (requests, not a secret)
    asked = [script.random_request(f"r{i}", drawing) for i in range(4)]
    for request, tokens in zip(asked, script.all_tokens(engine, asked).values(), strict=True):
        other = [*tokens[:-1], 2 + (tokens[-1] + 100) % 300]
        assert not script.is_close_call(engine, request, tokens, other)
        assert not script.is_close_call(engine, request, tokens, tokens[:-1]), "none is missing"
        with monkeypatch.context() as patch:
            patch.setattr(script, "NUDGE", 90.0)
            assert script.is_close_call(engine, request, tokens, other)


@pytest.mark.parametrize("pipe", ["requests", "replies"])
def test_an_engine_whose_pipe_ends_is_given_up_at_once_though_it_lives(script: ModuleType, pipe: str) -> None:
    """Nothing that comes later counts: what was on its way is lost."""

    tokens: list[int] = []

    async def read(client: EngineClient) -> None:
        asked = Generate(request_id="long", prompt=(7,), params=SamplingParams(max_tokens=300))
        async with client.open([asked]) as stream:
            async for delta in stream:
                if not tokens:
                    script.cut(client, pipe)
                tokens.extend(delta.tokens)

    async def scenario() -> None:
        client = EngineClient(functools.partial(fake_engine.fake, 0.05))
        try:
            await client.wait_ready()
            with pytest.raises(EngineDeadError, match="the connection to the engine has ended"):
                await asyncio.wait_for(read(client), 10)
        finally:
            await client.close()

    asyncio.run(scenario())
    assert tokens == list(range(8, 8 + len(tokens))), "none is missing in between"
