from __future__ import annotations

import socket

import msgspec
import pytest

from benthic.serve.http import say_where
from benthic.serve.messages import Ready
from benthic.serve.sampling_defaults import SamplingDefaults
from benthic.serve.service import ServiceSettings

READY = Ready(
    model_name="m", max_model_len=256, vocab_size=8, eos_token_ids=(1,), num_blocks=4, block_size=64
)


@pytest.mark.parametrize(("blocks", "warned"), [(4, False), (3, True)])
def test_a_cache_too_small_for_the_context_is_said_at_the_start(
    blocks: int,
    warned: bool,  # noqa: FBT001 (pytest names arguments)
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = ServiceSettings(served_names=("m",), root="m", max_num_seqs=1, max_waiting=1)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        say_where(bound, settings, msgspec.structs.replace(READY, num_blocks=blocks))
    assert ("holds 192 tokens, but the context is 256" in caplog.text) == warned
    assert ("Set --max-model-len 192" in caplog.text) == warned


@pytest.mark.parametrize(
    ("defaults", "said"),
    [
        (SamplingDefaults(), ""),
        (SamplingDefaults(temperature=0.3, top_p=0.9), "temperature = 0.3, top_p = 0.9"),
    ],
)
def test_defaults_of_the_checkpoint_are_said_at_the_start(
    defaults: SamplingDefaults, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ServiceSettings(
        served_names=("m",), root="m", max_num_seqs=1, max_waiting=1, defaults=defaults
    )
    with socket.socket() as bound, caplog.at_level("INFO", logger="benthic.serve"):
        bound.bind(("127.0.0.1", 0))
        say_where(bound, settings, READY)
    assert ("requests that leave them out get" in caplog.text) == bool(said)
    assert said in caplog.text
