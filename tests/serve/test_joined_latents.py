"""The latent's weight behind the query's first: one product for both, with the same parameters and tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_engine import NANO, prompts, random_model, request, serve, small_engine

from benthic.model.joined import as_one, latent_pairs, lay_together
from benthic.model.local import plain_linear
from benthic.serve.table_linear import TableLinear

CONFIGS = pytest.mark.parametrize(
    "config", [replace(NANO, q_lora_rank=None), replace(NANO, q_lora_rank=24)], ids=["direct", "low rank"]
)


@CONFIGS
def test_weights_that_were_joined_keep_their_values_and_are_one(config) -> None:
    model, twin = random_model(config), random_model(config)
    assert as_one(pair(twin)) is None
    join_latents(model)
    for (name, joined), kept in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(joined, kept), name
    for block in model.blocks:
        weights = block.attn.first.weight, block.attn.kv_a.weight
        assert torch.equal(as_one(weights), torch.cat(weights))
    assert as_one(pair(model)[::-1]) is None
    assert as_one((pair(model)[0], pair(twin)[1])) is None
    assert as_one((pair(model)[0].t(), pair(model)[1])) is None


@pytest.mark.parametrize("rows", [1, 5, 300])
def test_both_products_are_one_where_the_weights_are(rows, monkeypatch) -> None:
    model, calls, multiply = random_model(), [], TableLinear.__call__
    x = torch.randn(rows, NANO.hidden_size)
    assert TableLinear().together(x, pair(model)) is None
    assert plain_linear.together(x, pair(model)) is None
    join_latents(model)
    monkeypatch.setattr(
        TableLinear,
        "__call__",
        lambda self, x, weight: calls.append(weight.shape) or multiply(self, x, weight),
    )
    for found, weight in zip(TableLinear().together(x, pair(model)), pair(model), strict=True):
        torch.testing.assert_close(found, x @ weight.t())
    assert calls == [(sum(weight.shape[0] for weight in pair(model)), NANO.hidden_size)]


@CONFIGS
def test_a_server_gives_the_same_tokens_with_one_product_a_layer_less(config, monkeypatch) -> None:
    answers, calls = [], []

    def counted(linear):
        class Counted(type(linear)):
            def __call__(self, x, weight):
                calls.append(1)
                return super().__call__(x, weight)

        return Counted()

    def joined(model):
        join_latents(model)
        return counted(TableLinear())

    for fastest in (lambda model: counted(TableLinear()), joined):
        calls.clear()
        monkeypatch.setattr("benthic.serve.build.fastest_linear", fastest)
        engine = small_engine(random_model(config), enforce_eager=True)
        answers.append(
            serve(engine, [request(str(i), p, max_tokens=9) for i, p in enumerate(prompts(5, seed=3))])
        )
        answers.append(len(calls))
    assert [a.tokens for a in answers[0].values()] == [a.tokens for a in answers[2].values()]
    products = answers[1] - answers[3]
    assert products > 0
    assert products % len(random_model(config).blocks) == 0


def join_latents(model) -> None:
    for weights in latent_pairs(model):
        lay_together(weights)


def pair(model) -> tuple[torch.Tensor, torch.Tensor]:
    attention = model.blocks[0].attn
    return attention.first.weight, attention.kv_a.weight
