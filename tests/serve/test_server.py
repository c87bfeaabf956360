"""`benthic serve` with a real model, asked by the official client."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from running import BENTHIC, Connection, Running, benthic_server

from benthic.serve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "nano"
FLAGS = (
    "--served-model-name",
    NAME,
    "--block-size",
    "16",
    "--disable-log-requests",
    "--disable-uvicorn-access-log",
)


@pytest.fixture(scope="module")
def served(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with benthic_server(nano_checkpoint, log, *FLAGS, fresh=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return served.client()


COMPLETIONS = [
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.9, "seed": 7},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5, "seed": 7},
    {"logit_bias": {"70": 50}, "temperature": 0},
    {"logprobs": 5, "temperature": 0},
    {"logprobs": 1, "echo": True, "temperature": 0},
    {"logprobs": 1, "echo": True, "max_tokens": 0},
    {"stop": ["a", "e", "th"], "seed": 7},
    {"n": 3, "seed": 7},
    {"user": "someone", "seed": 7},
    {"extra_body": {"top_k": 3, "min_p": 0.01, "seed": 7}},
    {"extra_body": {"repetition_penalty": 1.3, "min_tokens": 4, "temperature": 0}},
    {"extra_body": {"ignore_eos": True, "stop_token_ids": [70, 71], "seed": 7}},
    {"extra_body": {"priority": 5, "skip_special_tokens": False, "seed": 7}},
    {"extra_body": {"include_stop_str_in_output": True, "seed": 7}, "stop": "e"},
]


@pytest.mark.parametrize("options", COMPLETIONS, ids=lambda options: "-".join(sorted(options)))
def test_every_documented_field_of_completions_gives_the_same_answer_streamed(
    client: openai.OpenAI, options: dict
) -> None:
    asked = {"model": NAME, "prompt": "def add(a, b):", "max_tokens": 12} | options
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason
        if choice.logprobs is not None:
            values = [v for c in own for v in c.logprobs.token_logprobs]
            assert values == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 3, "top_p": 0.8, "n": 2},
        {"logprobs": True, "top_logprobs": 3, "temperature": 0},
        {"stop": ["a", "e"], "seed": 3},
        {"logit_bias": {"70": 50}, "temperature": 0},
        {"presence_penalty": 1.0, "frequency_penalty": 1.0, "seed": 3},
    ],
    ids=lambda options: "-".join(sorted(options)),
)
def test_every_documented_field_of_chat_gives_the_same_answer_streamed(
    client: openai.OpenAI, options: dict
) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    asked = {"model": NAME, "messages": messages, "max_completion_tokens": 12} | options
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(c.delta.content for c in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-5},
        {"top_p": 5e-324},
        {"extra_body": {"min_p": 1.0}},
        {"extra_body": {"repetition_penalty": 0.01}, "presence_penalty": -2, "temperature": 1e-5},
        {"extra_body": {"top_k": 2**31 - 1}, "seed": 2**63 - 1, "n": 3},
        {"logit_bias": {str(token): -100 for token in range(320)}},
        {"logprobs": 20, "echo": True, "extra_body": {"prompt_logprobs": 20}},
        {"max_tokens": 0},
    ],
    ids=str,
)
def test_extreme_values_within_the_bounds_are_answered(client: openai.OpenAI, options: dict) -> None:
    answer = client.completions.create(**({"model": NAME, "prompt": "ab", "max_tokens": 8} | options))
    assert all(choice.finish_reason in ("length", "stop") for choice in answer.choices)


def test_n_sequences_draw_from_different_seeds_and_one_seed_repeats(client: openai.OpenAI) -> None:
    ask = lambda **more: client.completions.create(model=NAME, prompt="the", max_tokens=16, seed=5, **more)  # noqa: E731
    several = [choice.text for choice in ask(n=4).choices]
    assert len(set(several)) == 4
    assert ask().choices[0].text == several[0]


def test_a_bias_of_a_hundred_forces_a_token_and_minus_a_hundred_forbids_it(
    client: openai.OpenAI, nano_checkpoint: Path
) -> None:
    token = Tokenizer.from_folder(nano_checkpoint).encode("q")[0]
    ask = lambda bias: client.completions.create(  # noqa: E731
        model=NAME, prompt="x", max_tokens=8, temperature=0, logit_bias=bias
    )
    assert ask({str(token): 100}).choices[0].text == "q" * 8
    named = {"return_tokens_as_token_ids": True}
    options = {"model": NAME, "prompt": "x", "max_tokens": 1, "temperature": 0, "logprobs": 0}
    first = client.completions.create(**options, extra_body=named).choices[0].logprobs.tokens[0]
    forbidden = {first.removeprefix("token_id:"): -100}
    other = client.completions.create(**options, extra_body=named, logit_bias=forbidden)
    assert other.choices[0].logprobs.tokens[0] != first


def test_echoed_logprobs_equal_those_of_scoring_the_text_again(client: openai.OpenAI) -> None:
    """As lm-eval scores: generated tokens have the log-probabilities of the same tokens in a prompt."""
    made = client.completions.create(
        model=NAME, prompt=[40, 41, 42], max_tokens=6, temperature=0, logprobs=1,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    ).choices[0]  # fmt: skip
    ids = [int(token.removeprefix("token_id:")) for token in made.logprobs.tokens]
    scored = client.completions.create(
        model=NAME, prompt=[40, 41, 42, *ids], max_tokens=1, temperature=0, logprobs=1, echo=True
    ).choices[0]
    assert scored.logprobs.token_logprobs[3:-1] == pytest.approx(made.logprobs.token_logprobs, abs=1e-4)
    best = [max(top.values()) for top in scored.logprobs.top_logprobs[3:-1]]
    assert best == pytest.approx(made.logprobs.token_logprobs, abs=1e-4)


def test_sixty_four_concurrent_clients_get_the_answers_they_would_get_alone(served: Running) -> None:
    prompts = [[40 + i, 60 + i, 80] for i in range(64)]

    async def ask(client: openai.AsyncOpenAI, prompt: list[int]) -> str:
        stream = await client.completions.create(
            model=NAME, prompt=prompt, max_tokens=24, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    together = asyncio.run(scenario())
    client = served.client()
    for i in (0, 13, 63):
        alone = client.completions.create(model=NAME, prompt=prompts[i], max_tokens=24, temperature=0)
        assert together[i] == alone.choices[0].text


def test_two_thousand_requests_with_some_that_leave_lose_no_block(served: Running) -> None:
    before = served.metrics()
    chance = random.Random(0)  # noqa: S311
    total, width = 2000, 64
    outcomes = {"done": 0, "left": 0}

    async def one(connection: Connection, leaves: bool, prompt: list[int]) -> None:  # noqa: FBT001
        body = {"model": NAME, "prompt": prompt, "max_tokens": 100 if leaves else 2, "ignore_eos": True}
        if leaves:
            await connection.post_and_leave("/v1/completions", body | {"stream": True})
            outcomes["left"] += 1
        else:
            answer = await connection.post("/v1/completions", body)
            assert answer["usage"]["completion_tokens"] == 2
            outcomes["done"] += 1

    async def worker(jobs: Iterator[tuple[bool, list[int]]]) -> None:
        connection = Connection(served.url)
        for leaves, prompt in jobs:
            await one(connection, leaves, prompt)
        connection.close()

    async def scenario() -> None:
        jobs = iter(
            [
                (chance.random() < 0.1, [chance.randrange(4, 300) for _ in range(chance.randrange(1, 40))])
                for _ in range(total)
            ]
        )
        await asyncio.gather(*(worker(jobs) for _ in range(width)))

    asyncio.run(scenario())
    assert outcomes["done"] + outcomes["left"] == total
    served.wait_idle()
    after = served.metrics()
    reasons = ("length", "stop", "abort", "error")
    ttft = "benthic:time_to_first_token_seconds_count"
    ended = {
        reason: after.get(f"benthic:request_success_total{{{reason}}}", 0)
        - before.get(f"benthic:request_success_total{{{reason}}}", 0)
        for reason in reasons
    }
    assert sum(ended.values()) == total
    assert ended["error"] == 0
    assert ended["length"] >= outcomes["done"]
    assert after["benthic:kv_cache_usage_perc"] == 0
    assert after[ttft] - before[ttft] == total


def test_prefix_cache_hits_are_reported_in_usage_and_metrics(served: Running) -> None:
    client = served.client()
    prompt = [100 + i % 50 for i in range(65)]
    ask = lambda: client.completions.create(model=NAME, prompt=prompt, max_tokens=1)  # noqa: E731
    ask()
    before = served.metrics()["benthic:prefix_cache_hits_total"]
    assert ask().usage.prompt_tokens_details.cached_tokens == 64
    served.wait_until(lambda m: m["benthic:prefix_cache_hits_total"] == before + 64)


def test_sigkill_of_the_engine_ends_requests_clearly_and_health_says_so(
    nano_checkpoint: Path, tmp_path: Path
) -> None:
    with benthic_server(nano_checkpoint, tmp_path / "log", *FLAGS) as running:
        client = running.client()
        stream = client.completions.create(
            model=NAME, prompt="a", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        os.kill(running.engine_pid(), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="killed by signal 9"):
            list(stream)
        health = httpx.get(f"{running.url}/health")
        assert health.status_code == 503
        assert "killed by signal 9" in health.json()["error"]["message"]
        with pytest.raises(openai.InternalServerError, match="killed by signal 9"):
            client.completions.create(model=NAME, prompt="a")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(10) == 1


def test_sigterm_to_the_whole_group_drains_and_leaves_no_process(
    nano_checkpoint: Path, tmp_path: Path
) -> None:
    with benthic_server(nano_checkpoint, tmp_path / "log", *FLAGS) as running:
        engine = running.engine_pid()
        stream = running.client().completions.create(
            model=NAME, prompt="a", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        os.kill(engine, signal.SIGTERM)  # as service managers do: to every process of the group
        os.kill(running.process.pid, signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert running.process.wait(10) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(engine, 0)


def test_defaults_come_from_generation_config_unless_switched_off(
    nano_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "greedy"
    folder.mkdir()
    for file in nano_checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "eos_token_id": [1, 70]}))
    with benthic_server(folder, tmp_path / "log", *FLAGS) as running:
        client = running.client()
        texts = {
            client.completions.create(model=NAME, prompt="abc", max_tokens=8).choices[0].text
            for _ in range(4)
        }
        assert len(texts) == 1
        ended = client.completions.create(model=NAME, prompt="abc", max_tokens=8, logit_bias={"70": 100})
        assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")


def test_chat_in_a_terminal_streams_answers_and_forgets_on_request(served: Running) -> None:
    lines = "hello\nand more\n/clear\nhello\n/exit\nnever read\n"
    command = [*BENTHIC, "chat", "--url", served.url, "--max-tokens", "8", "--seed", "1"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens, first after") == 3
    raw = subprocess.run(
        [*command, "--raw"], input="def f\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert raw.stdout.count("tokens, first after") == 1


def test_the_log_reports_throughput(served: Running) -> None:
    deadline = time.monotonic() + 15
    while "generation" not in served.log.read_text():
        assert time.monotonic() < deadline, served.log.read_text()[-2000:]
        served.client().completions.create(model=NAME, prompt="a", max_tokens=2)
        time.sleep(0.2)
    line = next(line for line in served.log.read_text().splitlines() if "generation" in line)
    for word in ("prompt", "tokens/s", "running", "waiting", "KV cache", "prefix cache hits"):
        assert word in line
