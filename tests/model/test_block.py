from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_models import BASE, VARIANTS, packed, random_model
from torch.utils.checkpoint import checkpoint

from benthic.model.block import PHASES
from benthic.model.sockets import at_once


def run(model):
    tokens_T, positions_T, _, sockets = packed(model.config)
    hidden = model(tokens_T, positions_T, sockets)
    model.zero_grad()
    hidden.hidden_TD.square().sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return hidden, gradients


def test_forward_calls_the_four_phases_in_order():
    model = random_model(BASE)
    calls = []
    for block in model.blocks:
        for phase in PHASES:
            inner = getattr(block, phase)

            def outer(*operands, inner=inner, at=(block.layer, phase)):
                calls.append(at)
                return inner(*operands)

            setattr(block, phase, outer)
    run(model)
    assert calls == [(layer, phase) for layer in range(3) for phase in PHASES]


@pytest.mark.parametrize("phases", [("attention",), ("dispatch",), ("experts",), ("combine",), PHASES])
def test_checkpointing_any_phase_from_outside_changes_no_gradient_and_no_count(phases):
    plain, wrapped = random_model(BASE), random_model(BASE)
    ran = 0

    def counted(inner, *operands):
        nonlocal ran
        ran += 1
        return inner(*operands)

    for block in wrapped.blocks:
        for phase in phases:
            inner = partial(counted, getattr(block, phase))
            setattr(block, phase, partial(checkpoint, inner, use_reentrant=False))
    expected, gradients = run(plain)
    actual, again = run(wrapped)
    if phases != ("combine",):  # it keeps nothing for backward, so there is nothing to compute again
        assert ran > 3 * len(phases), "nothing was recomputed"
    torch.testing.assert_close(actual.hidden_TD, expected.hidden_TD, rtol=0, atol=0)
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0, msg=name)
    assert len(actual.routing) == len(expected.routing) == 2


@pytest.mark.parametrize("name", ["q-lora, groups, interleaved", "odd sizes"])
def test_phases_of_two_microbatches_may_be_interleaved(name):
    model = random_model(VARIANTS[name])
    batches = [packed(model.config, lengths, seed) for seed, lengths in enumerate([(4, 3), (2, 6, 1)])]
    with torch.no_grad():
        expected = [
            model(tokens, positions, sockets).pre_norm_TD for tokens, positions, _, sockets in batches
        ]
        states = [model.embed(tokens) for tokens, *_ in batches]
        angles = [model.rotary(positions) for _, positions, *_ in batches]
        sockets = [batch[3] for batch in batches]
        for block in model.blocks:
            for phase in PHASES:
                for i in (0, 1):
                    more = (angles[i],) if phase == "attention" else ()
                    states[i] = getattr(block, phase)(states[i], *more, sockets[i])
    for actual, wanted in zip(states, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


class Noted:
    """Side work at once, and what happened in order."""

    def __init__(self, order):
        self.order = order

    def moment(self, rows_an_expert):
        assert rows_an_expert == 15 * BASE.num_experts_per_tok / BASE.n_routed_experts
        self.order.append("moment")
        return len(self.order)

    def __call__(self, work, since=None):
        result = work()
        self.order.append("started" if since is None else "started at it")
        assert since is None or self.order[since - 1] == "moment"
        return lambda: self.order.append("taken") or result


def attended_at_once(forward, x_TD, angles, sockets):
    return forward(x_TD, angles, replace(sockets, aside=at_once))


@pytest.mark.parametrize("grad", [True, False])
def test_a_latent_is_started_before_its_query_and_taken_when_it_is_needed(grad):
    model, order = random_model(BASE), []
    tokens_T, positions_T, _, sockets = packed(model.config)
    exact = model(tokens_T, positions_T, sockets).hidden_TD

    for block in model.blocks:
        query = block.attn.query
        block.attn.query = lambda *rows, inner=query: order.append("query") or inner(*rows)
        for phase in ("dispatch", "experts"):
            inner = getattr(block, phase)
            setattr(block, phase, lambda x, given, inner=inner: inner(x, replace(given, aside=at_once)))
    with torch.set_grad_enabled(grad):
        found = model(tokens_T, positions_T, replace(sockets, aside=Noted(order))).hidden_TD
    torch.testing.assert_close(found, exact)
    of_layer = ["started", "taken", "query"] if grad else ["started", "query", "taken"]
    assert order == of_layer * len(model.blocks)


def test_shared_experts_are_started_before_routed_ones_and_taken_after_them():
    model, order = random_model(BASE), []
    tokens_T, positions_T, _, sockets = packed(model.config)
    exact = model(tokens_T, positions_T, sockets).hidden_TD

    for block in model.blocks:
        block.attn.forward = partial(attended_at_once, block.attn.forward)
        if hasattr(block, "moe"):
            gate, forward = block.moe.gate.forward, block.moe.experts.forward
            block.moe.gate.forward = lambda *rows, inner=gate: order.append("gate") or inner(*rows)
            block.moe.experts.forward = lambda *rows, inner=forward: order.append("routed") or inner(*rows)
    found = model(tokens_T, positions_T, replace(sockets, aside=Noted(order))).hidden_TD
    assert torch.equal(found, exact)
    mixtures = sum(hasattr(block, "moe") for block in model.blocks)
    assert order == ["moment", "gate", "started at it", "routed", "taken"] * mixtures


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_that_are_left_to_the_norm_behind_them_are_the_same_to_the_bit(variant):
    """Streams through the network, its last norm and a prediction module."""
    model = random_model(replace(VARIANTS[variant], num_nextn_predict_layers=1))
    tokens_T, positions_T, _, sockets = packed(model.config)
    made = []

    def late(flight):
        made.append(flight)
        return sockets.exchange.late(flight)

    found = []
    with torch.no_grad():
        for each in (sockets, replace(sockets, late=late)):
            hidden = model(tokens_T, positions_T, each)
            ahead = model.predict_ahead(0, model.mtp_input(hidden), tokens_T, positions_T, each)
            found.append((hidden.pre_norm_TD, hidden.hidden_TD, ahead.pre_norm_TD, ahead.hidden_TD))
    assert len(made) == sum(map(model.config.is_moe, range(model.config.num_hidden_layers + 1)))
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there)


def test_where_autograd_records_a_block_ends_with_its_sum():
    model = random_model(BASE)
    tokens_T, positions_T, _, sockets = packed(model.config)
    first = next(block for block in model.blocks if block.sends)
    x_TD, angles = model.embed(tokens_T), model.rotary(positions_T)
    out, _ = first(x_TD, angles, replace(sockets, late=sockets.exchange.late))
    assert isinstance(out, torch.Tensor)
