"""Engines that share experts answer as one engine does, whoever is idle, and end together."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import forked_instances
import pytest
import torch
from processes import wait_gone
from running import benthic_server
from small_engine import Answer, prompts, random_model, request
from small_engine import serve as serve_alone
from small_tokenizer import save_tokenizer
from spawn import spawn
from test_overlap import mixed_requests
from test_spread import children
from together import SETTINGS, take_part

from benthic.errors import ConfigError, EngineDeadError
from benthic.model.checkpoint import save_pretrained
from benthic.sched.lockstep import MODEL
from benthic.serve.engine import Engine
from benthic.serve.fleet import Fleet, FleetOptions, start_router
from benthic.serve.journal import Journal
from benthic.serve.launch import check_instances
from benthic.serve.options import EngineOptions
from benthic.serve.speculative import Speculative

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.sched.lockstep import Turn
    from benthic.serve.client import EngineStream
    from benthic.serve.messages import Generate, Stats

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nano` with logits of order 1, in float32, so that a sum in another order changes no token."""
    folder = tmp_path_factory.mktemp("together") / "nano"
    save_pretrained(random_model(), folder, dtype=torch.float32)
    save_tokenizer(folder)
    return folder


LONG = [
    request(f"long-{i}", p, max_tokens=20) for i, p in enumerate(prompts(4, seed=8, shortest=12, longest=20))
]
SEEN = prompts(1, seed=2, shortest=24, longest=24)[0]
LATE = [request(name, SEEN, temperature=0.8, seed=5) for name in ("new", "seen")]
ABORTED = {"long-1", "3"}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Answer]:
    """Every request of these tests from one engine."""
    settings = SETTINGS | {"enable_expert_parallel": False}
    engine = Engine.from_pretrained(folder, EngineOptions(**settings))
    return serve_alone(engine, [*LONG, *mixed_requests(9), *LATE])


def scripts_of(ranks: int, seed: int) -> list[dict]:
    """Who gets what, when: requests that lose their blocks on rank 0, the last rank long idle or always."""
    rng, mixed = random.Random(seed), mixed_requests(9)  # noqa: S311 (not a secret)
    scripts: list[dict] = [{0: list(LONG), 25: ["long-1"], 45: [LATE[0]], 58: [LATE[1]]}]
    scripts += [{} for _ in range(ranks - 1)]
    for each in mixed:
        rank = rng.randrange(ranks - 1) if ranks > 2 else rng.randrange(ranks)
        scripts[rank].setdefault(rng.randrange(25), []).append(each)
        if each.request_id in ABORTED:
            scripts[rank].setdefault(28, []).append(each.request_id)
    return scripts


def same(found: Answer, expected: Answer) -> None:
    assert found.tokens == expected.tokens
    for row, wanted in zip(found.logprobs, expected.logprobs, strict=True):
        assert [entry.token for entry in row] == [entry.token for entry in wanted]
        assert [e.logprob for e in row] == pytest.approx([e.logprob for e in wanted], abs=1e-4)
    prompt, wanted_prompt = found.deltas[0].prompt_logprobs, expected.deltas[0].prompt_logprobs
    assert (prompt is None) == (wanted_prompt is None)
    for row, wanted in zip(prompt or (), wanted_prompt or (), strict=True):
        assert [e.logprob for e in row] == pytest.approx([e.logprob for e in wanted], abs=1e-4)


def drafting(method: str, most: int) -> Speculative:
    return Speculative(method=method, num_speculative_tokens=most, adaptive=False)


def collected(shared: Path, ranks: int) -> tuple[dict[str, Answer], list[Stats], list[list[Turn]]]:
    """What all ranks answered; of each its last report and its turns."""
    reports = [pickle.loads((shared / f"answers-{rank}").read_bytes()) for rank in range(ranks)]  # noqa: S301 (our own)
    answers, stats, turns = zip(*reports, strict=True)
    return {name: answer for each in answers for name, answer in each.items()}, list(stats), list(turns)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"async_scheduling": True, "speculative": drafting("mtp", 2), "replays": True}),
        (
            4,
            {"speculative": drafting("ngram", 2), "enable_dbo": True, "dbo_prefill_token_threshold": 3},
        ),
    ],
    ids=["two, overlapped, replaying, mtp", "four, ngram, in halves"],
)
def test_every_rank_answers_as_one_engine_does(
    ranks: int, options: dict, folder: Path, alone: dict, tmp_path: Path
) -> None:
    """Idle ranks, chunks, preemption, aborts, prefixes: tokens and log-probabilities stay what they are."""
    scripts = scripts_of(ranks, seed=ranks)
    spawn(take_part, ranks, ranks, str(folder), str(tmp_path), options, scripts)
    found, stats, turns = collected(tmp_path, ranks)
    assert found.keys() == alone.keys()
    for name, answer in found.items():
        if name in ABORTED:
            assert alone[name].tokens[: len(answer.tokens)] == answer.tokens
        else:
            same(answer, alone[name])
    assert stats[0].preemptions > 0
    assert stats[0].prefix_cache_hits > 0
    assert (stats[-1].steps == 0) == (ranks > 2)
    assert all(report.num_free_blocks == report.num_blocks for report in stats)
    assert all(each == turns[0] for each in turns)
    assert sum(not turn.rows for turn in turns[0]) < 40, "turns were taken while nobody had work"
    assert any(turn.size for turn in turns[0]) == ("replays" in options)
    in_halves = [turn for turn in turns[0] if turn.halves]
    assert (len(in_halves) > 5) == ("enable_dbo" in options)
    assert all(max(turn.rows) >= 3 and turn.module == MODEL for turn in in_halves)
    assert sum(report.drafts for report in stats) > 0


@pytest.mark.parametrize("idle", [False, True], ids=["in a step", "idle"])
def test_losing_a_rank_ends_requests_and_ranks_and_names_it(
    idle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benthic.serve.client.start_engine", forked_instances.start_engine)
    options = EngineOptions(**SETTINGS, data_parallel_size=2)
    asyncio.run(asyncio.wait_for(lose_one(folder, options, idle=idle), 60))


async def lose_one(folder: Path, options: EngineOptions, *, idle: bool) -> None:
    """Kill rank 1 while each rank has a request, or none has."""
    together = FleetOptions.together(2)
    fleet = Fleet(checkpoint=folder, engine=options, options=together)
    router = start_router(fleet, journal=Journal(time.monotonic), stall_s=60, log_level=40)
    try:
        await router.wait_ready()
        clients = [member.client for member in router.members]
        family = [pid for client in clients for pid in (client.pid, *children(client.pid))]
        asked = [request(str(i), [3, 4, 5 + i], max_tokens=80) for i in range(2)]
        streams = [] if idle else [router.open([each]) for each in asked]
        for stream in streams:
            await anext(stream)
        os.kill(clients[1].pid, signal.SIGKILL)
        await asyncio.gather(*map(ends_with_an_error, streams))
        words = [await client.wait_dead() for client in clients]
        assert "killed by signal 9" in words[1]
        named = f"the 2 ranks share their experts and cannot go on: rank 1 (pid {clients[1].pid})"
        assert named in words[0]
        assert "cannot go on without decode-1: " in router.trouble
        with pytest.raises(EngineDeadError):
            router.open(asked)
    finally:
        await router.close()
    wait_gone(family)


async def ends_with_an_error(stream: EngineStream) -> None:
    with pytest.raises(EngineDeadError):
        async for _ in stream:
            pass


def test_a_server_of_two_ranks_answers_and_drains(folder: Path, alone: dict, tmp_path: Path) -> None:
    """Five requests at once, so that both ranks have some; one rank cannot leave alone."""
    flags = ("--data-parallel-size", "2", "--enable-expert-parallel", "--max-model-len", "64")
    with benthic_server(folder, tmp_path / "log", *flags) as running, running.http() as http:
        family = children(running.process.pid)

        def ask(each: Generate) -> str:
            body = {"model": str(folder), "prompt": list(each.prompt), "max_tokens": 12, "ignore_eos": True}
            answer = http.post("/v1/completions", json=body | {"temperature": 0, "logprobs": 0})
            return answer.json()["choices"][0]["logprobs"]["token_logprobs"]

        with ThreadPoolExecutor(5) as threads:
            found = list(threads.map(ask, LONG + LONG[:1]))
        engine = Engine.from_pretrained(folder, EngineOptions(num_threads=1, max_model_len=64))
        wanted = serve_alone(
            engine, [request(each.request_id, each.prompt, max_tokens=12, logprobs=0) for each in LONG]
        )
        for each, rows in zip(LONG, found, strict=False):
            assert rows == pytest.approx(
                [row[0].logprob for row in wanted[each.request_id].logprobs], abs=1e-4
            )
        cards = http.get("/instances").json()["data"]
        assert [card["name"] for card in cards] == ["decode-0", "decode-1"]
        assert all(
            running.metrics()[f"benthic:instance_generation_tokens_total{{{name},decode}}"]
            for name in ("decode-0", "decode-1")
        )
        refused = http.delete("/instances/decode-1")
        assert refused.status_code == 409
        assert "share experts" in refused.json()["error"]["message"]
        assert http.post("/instances", json={"role": "decode"}).status_code == 409
        running.wait_idle()
    assert running.process.returncode == 0
    wait_gone(family)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"enable_expert_parallel": False}, "data_parallel_size = 2 .* enable_expert_parallel = False"),
        ({"tensor_parallel_size": 2}, "data_parallel_size = 2 and tensor_parallel_size = 2"),
    ],
)
def test_what_ranks_cannot_do_together_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineOptions(**({"data_parallel_size": 2, "enable_expert_parallel": True} | options))


def test_ranks_take_no_part_in_transfers() -> None:
    options = EngineOptions(data_parallel_size=2, enable_expert_parallel=True)
    for how in ({"prefill": 1, "decode": 1, "kv_port": None}, {"prefill": 0, "decode": 0, "kv_port": 5000}):
        with pytest.raises(
            ConfigError, match=r"--data-parallel-size 2, but .* takes engines that share nothing"
        ):
            check_instances(options, **how)
