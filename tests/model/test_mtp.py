from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import BASE, furthest, packed, random_model
from torch.nn import functional as F

from benthic.model.local import packed_sockets, plain_linear

DEEP = replace(BASE, num_nextn_predict_layers=2)


def rms(x, weight, eps=DEEP.rms_norm_eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def one_sequence(config, length):
    sockets = packed_sockets(
        torch.tensor([0, length], dtype=torch.int32), length, n_routed_experts=config.n_routed_experts
    )
    return torch.arange(length), sockets


@pytest.mark.parametrize("source", ["pre_norm", "post_norm"])
def test_depths_follow_the_report_literally(source):
    """Eq. (21)-(23) with 1-based i and k, row by row, over the first T - k positions of one sequence.

    `h'^k_i = M_k [RMSNorm(h^{k-1}_i); RMSNorm(Emb(t_{i+k}))]`, `h^k_{1:T-k} = TRM_k(h'^k_{1:T-k})`,
    `P^k_{i+k+1} = OutHead(h^k_i)`; only the order inside the bracket is that of released weights.
    """
    config = replace(DEEP, mtp_hidden=source)
    model = random_model(config, dtype=torch.float64)
    big_t = 9
    tokens = torch.randint(config.vocab_size, (big_t,), generator=torch.Generator().manual_seed(1))
    positions, sockets = one_sequence(config, big_t)
    emb = model.embed.weight
    with torch.no_grad():
        main = model(tokens, positions, sockets)
        hidden, previous = main, model.mtp_input(main)
        for k in (1, 2):
            # Literally: t[i] is token i counted from 1, so row i - 1 of a tensor.
            module, rows = model.mtp_module(k - 1), []
            for i in range(1, big_t - k + 1):
                h = rms(previous[i - 1], module.hidden_norm.weight)
                e = rms(emb[tokens[i + k - 1]], module.embed_norm.weight)
                rows.append(module.proj.weight @ torch.cat((e, h)))
            here, short = one_sequence(config, big_t - k)
            out, _ = module.block(torch.stack(rows), model.rotary(here), short)
            logits = rms(out, module.norm.weight) @ model.head.weight.T

            # Ours: all T rows, with a made-up token where the sequence has ended.
            shifted = torch.cat((tokens[k:], tokens.new_zeros(k)))
            hidden = model.predict_ahead(k - 1, model.mtp_input(hidden), shifted, positions, sockets)
            assert furthest(hidden.pre_norm_TD[: big_t - k], out) < 1e-6
            assert furthest(model.logits(hidden.hidden_TD, plain_linear)[: big_t - k], logits) < 1e-6
            previous = model.mtp_input(hidden)[: big_t - k]


def test_projection_multiplies_the_embedding_first():
    model = random_model(DEEP)
    module = model.mtp_module(0)
    with torch.no_grad():
        module.proj.weight[:, DEEP.hidden_size :] = 0.0  # the columns of the hidden state
    tokens_T, positions_T, _, sockets = packed(DEEP)
    previous_TD = torch.randn(len(tokens_T), DEEP.hidden_size)
    with torch.no_grad():
        one = model.predict_ahead(0, previous_TD, tokens_T, positions_T, sockets)
        two = model.predict_ahead(0, previous_TD + 1, tokens_T, positions_T, sockets)
        other = model.predict_ahead(0, previous_TD, (tokens_T + 1) % 97, positions_T, sockets)
    assert torch.equal(one.hidden_TD, two.hidden_TD)
    assert not torch.allclose(one.hidden_TD, other.hidden_TD)


def test_attend_socket_and_routing_count_mtp_layers_on_from_the_main_ones():
    model = random_model(DEEP)
    tokens_T, positions_T, _, sockets = packed(DEEP)
    layers = []

    def spy(*operands, layer, scale):
        layers.append(layer)
        return sockets.attend(*operands, layer=layer, scale=scale)

    spy.slots = sockets.attend.slots
    with torch.no_grad():
        for depth in (0, 1):
            hidden = model.predict_ahead(
                depth,
                torch.randn(len(tokens_T), DEEP.hidden_size),
                tokens_T,
                positions_T,
                replace(sockets, attend=spy),
            )
            assert [layer for layer, _ in hidden.routing] == [DEEP.num_hidden_layers + depth]
    assert layers == [3, 4]


def test_embedding_and_head_gather_gradients_of_both_losses():
    model = random_model(DEEP)
    tokens_T, positions_T, _, sockets = packed(DEEP)
    hidden = model(tokens_T, positions_T, sockets)
    ahead = model.predict_ahead(0, model.mtp_input(hidden), tokens_T, positions_T, sockets)
    target_T = torch.randint(DEEP.vocab_size, tokens_T.shape)

    def loss(state):
        return F.cross_entropy(model.logits(state.hidden_TD, plain_linear), target_T)

    shared = (model.embed.weight, model.head.weight)
    main = torch.autograd.grad(loss(hidden), shared, retain_graph=True)
    both = torch.autograd.grad(loss(hidden) + 0.3 * loss(ahead), shared, retain_graph=True)
    extra = torch.autograd.grad(0.3 * loss(ahead), shared)
    for a, b, c in zip(main, extra, both, strict=True):
        torch.testing.assert_close(a + b, c, atol=1e-6, rtol=1e-5)
        assert b.abs().max() > 0
