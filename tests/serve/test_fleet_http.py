"""`benthic serve --prefill --decode`: the same API, and instances that join and drain over HTTP."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from running import benthic_server

from benthic.bench.served import free_port
from benthic.errors import ConfigError, UnknownFieldError
from benthic.serve.fleet import FleetOptions
from benthic.serve.launch import check_instances
from benthic.serve.options import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import httpx
    from running import Running

ENGINE = ("--num-blocks", "128", "--block-size", "4", "--max-model-len", "256", "--max-num-seqs", "8")
NAMES = ("--served-model-name", "nano", *ENGINE)


@pytest.fixture(scope="module")
def one(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of one engine, which hands requests over too."""
    log, flags = tmp_path_factory.mktemp("one") / "log", (*NAMES, "--kv-port", str(free_port()))
    with benthic_server(nano_checkpoint, log, *flags) as running:
        yield running


def ask(http: httpx.Client, prompt: list[int], **fields: object) -> dict:
    body = {"model": "nano", "prompt": prompt, "max_tokens": 8, "seed": 5, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_for(http: httpx.Client, statuses: dict[str, str]) -> None:
    until = time.monotonic() + 60
    while True:
        found = {each["name"]: each["status"] for each in http.get("/instances").json()["data"]}
        if found == statuses:
            return
        assert time.monotonic() < until, found
        time.sleep(0.05)


def test_a_fleet_answers_like_one_engine_and_instances_join_and_drain(
    one: Running, nano_checkpoint: Path, tmp_path: Path
) -> None:
    prompts = [list(range(20 + i, 60 + 2 * i)) for i in range(6)]
    with one.http() as http:
        expected = [ask(http, prompt)["choices"][0]["text"] for prompt in prompts]
    fleet = ("--prefill", "1", "--decode", "1", *NAMES)
    with benthic_server(nano_checkpoint, tmp_path / "fleet.log", *fleet) as running, running.http() as http:
        assert [ask(http, prompt)["choices"][0]["text"] for prompt in prompts] == expected
        usage = ask(http, prompts[0], n=2, temperature=1.0)["usage"]
        assert usage["prompt_tokens"] == 40
        assert usage["completion_tokens"] == 16
        joined = http.post("/instances", json={"role": "decode"})
        assert (joined.status_code, joined.json()["status"]) == (202, "starting")
        wait_for(http, dict.fromkeys(("prefill-0", "decode-1", "decode-2"), "serving"))
        assert http.delete("/instances/decode-1").status_code == 202
        wait_for(http, dict.fromkeys(("prefill-0", "decode-2"), "serving"))
        assert ask(http, prompts[1])["choices"][0]["text"] == expected[1]
        missing = http.delete("/instances/decode-1")
        assert missing.status_code == 404
        assert "no instance 'decode-1'" in missing.json()["error"]["message"]
        assert http.post("/instances", json={"role": "cook"}).status_code == 400
        assert "/instances" in http.get("/openapi.json").json()["paths"]
        running.wait_idle()


@pytest.mark.parametrize(("prefill", "decode"), [(0, 1), (2, 0)])
def test_a_fleet_of_one_or_without_a_decoding_instance_is_refused(prefill: int, decode: int) -> None:
    with pytest.raises(ConfigError, match="a fleet has 2 instances at least, one of them decoding"):
        FleetOptions(prefill=prefill, decode=decode)


def test_an_unknown_policy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownFieldError, match="Did you mean 'shortest_queue'"):
        FleetOptions(prefill=1, decode=1, prefill_policy="shortest_queu")


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (0, 3)])
def test_instances_that_cannot_change_their_role_are_refused_before_they_start(
    prefill: int, decode: int
) -> None:
    with pytest.raises(ConfigError, match=f"--replan 30 with --prefill {prefill} and --decode {decode}"):
        FleetOptions(prefill=prefill, decode=decode, replan_s=30.0)
    with pytest.raises(ConfigError, match=r"--replan 30 moves instances .* but --prefill 0 and --decode 0"):
        check_instances(EngineOptions(), prefill=0, decode=0, kv_port=None, replan=30.0)


def test_two_servers_hand_a_request_over_in_the_words_of_a_vllm_router(
    one: Running, nano_checkpoint: Path, tmp_path: Path
) -> None:
    prompt, flags = list(range(20, 70)), (*NAMES, "--kv-port", str(free_port()))
    with (
        benthic_server(nano_checkpoint, tmp_path / "log", *flags) as second,
        one.http() as prefill,
        second.http() as decode,
    ):
        expected = ask(prefill, prompt)["choices"][0]["text"]
        wanted = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}
        kept = ask(prefill, prompt, max_tokens=1, kv_transfer_params=wanted)["kv_transfer_params"]
        assert len(kept["remote_block_ids"]) == 13
        assert one.metrics()["benthic:kv_blocks_free"] < 128
        assert ask(decode, prompt, kv_transfer_params=kept)["choices"][0]["text"] == expected
        one.wait_idle()
        again = ask(decode, prompt, kv_transfer_params=kept)
        assert again["choices"][0]["text"] == expected
        message = [{"role": "user", "content": "hi " * 20}]
        chat = {"model": "nano", "messages": message, "max_tokens": 1, "kv_transfer_params": wanted}
        answer = prefill.post("/v1/chat/completions", json=chat).json()
        handed = chat | {"max_tokens": 4, "kv_transfer_params": answer["kv_transfer_params"]}
        assert decode.post("/v1/chat/completions", json=handed).status_code == 200
        broken = decode.post(
            "/v1/chat/completions", json=chat | {"kv_transfer_params": {"do_remote_prefill": True}}
        )
        assert broken.status_code == 400
        assert "kv_transfer_params cannot be read" in broken.json()["error"]["message"]
        assert prefill.post("/v1/chat/completions", json=chat | {"n": 2}).status_code == 400
        longer = {"model": "nano", "prompt": [*prompt, 70], "kv_transfer_params": kept}
        other = decode.post("/v1/completions", json=longer).json()["error"]["message"]
        assert "computed 50 tokens, but this prompt has 51" in other
        one.wait_idle()
        second.wait_idle()


def test_a_server_without_transfers_refuses_a_hand_over(server: Running) -> None:
    body = {"model": "fake", "prompt": [5], "kv_transfer_params": {"do_remote_decode": True}}
    with server.http() as http:
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert "--kv-port" in answer.json()["error"]["message"]
        assert http.post("/v1/completions", json=body | {"kv_transfer_params": None}).status_code == 200
