"""What a server answers before anybody asks."""

from __future__ import annotations

import asyncio
import logging

import fake_engine
import pytest
from small_engine import serve, small_engine

from benthic.errors import ServeError
from benthic.serve import rehearsal, server
from benthic.serve.client import EngineClient
from benthic.serve.http import ServerOptions
from benthic.serve.messages import Generate, SamplingParams
from benthic.serve.rehearsal import SETTINGS, requests


def test_a_small_engine_answers_every_request_of_the_rehearsal() -> None:
    engine = small_engine()
    asked = list(requests(engine.ready()))
    assert len(asked) == len({each.request_id for each in asked}) >= 2 * len(SETTINGS)
    answers = serve(engine, asked)
    assert {len(each.tokens) for each in answers.values()} == {asked[0].params.max_tokens}


def test_a_warm_up_says_how_long_it_took_and_ends_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="benthic.serve"):
        assert asyncio.run(server.warm_up(fake_engine.fake, ServerOptions())) == 0
    assert "requests answered in" in caplog.text


def test_a_rehearsal_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Generate(request_id="r", prompt=(fake_engine.POISON_ERROR,), params=SamplingParams())
    monkeypatch.setattr(rehearsal, "requests", lambda ready: [wrong])

    async def scenario() -> None:
        client = EngineClient(fake_engine.fake)
        try:
            with pytest.raises(ServeError, match="a rehearsal failed: the sampler saw NaN"):
                await rehearsal.rehearse(client, await client.wait_ready())
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
