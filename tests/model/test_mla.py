from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from small_models import LENGTHS, VARIANTS, furthest, packed, random_model

from benthic.model.local import plain_linear
from benthic.model.norm import LATENT_NORM_EPS


@dataclass
class AbsorbedAttend:
    """`q . (W^UK c) = (W^UK^T q) . c`; every sequence by itself, every query against latents only."""

    lengths: tuple[int, ...]

    def slots(self, layer):
        return None

    def __call__(self, q_nope_THn, q_rope_THr, latent_TC, k_rope_Tr, up, *, layer, scale):
        q_THC = up.absorb_query(q_nope_THn)
        outs, start = [], 0
        for length in self.lengths:
            rows = slice(start, start + length)
            score = torch.einsum("ihc,jc->hij", q_THC[rows], latent_TC[rows])
            score = score + torch.einsum("ihr,jr->hij", q_rope_THr[rows], k_rope_Tr[rows])
            hidden = torch.ones(length, length).triu(1).bool()
            prob = (score * scale).masked_fill(hidden, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hij,jc->ihc", prob, latent_TC[rows]))
            start += length
        return up.absorb_value(torch.cat(outs))


@pytest.mark.parametrize("name", VARIANTS)
def test_absorbed_attention_equals_expanded_attention(name):
    model = random_model(VARIANTS[name], dtype=torch.float64)
    tokens_T, positions_T, _, sockets = packed(model.config)
    with torch.no_grad():
        expanded = model(tokens_T, positions_T, sockets).hidden_TD
        absorbed = model(tokens_T, positions_T, replace(sockets, attend=AbsorbedAttend(LENGTHS))).hidden_TD
    assert furthest(absorbed, expanded) < 1e-6


def test_attend_socket_sees_normed_latents_rotated_keys_layer_and_scale():
    config = VARIANTS["q-lora, groups, interleaved"]
    model = random_model(config)
    tokens_T, positions_T, _, sockets = packed(config)
    seen = []

    def spy(q_nope_THn, q_rope_THr, latent_TC, k_rope_Tr, up, *, layer, scale):
        seen.append((layer, scale, latent_TC, k_rope_Tr))
        assert q_nope_THn.shape == (15, config.num_attention_heads, config.qk_nope_head_dim)
        assert q_rope_THr.shape == (15, config.num_attention_heads, config.qk_rope_head_dim)
        return sockets.attend(q_nope_THn, q_rope_THr, latent_TC, k_rope_Tr, up, layer=layer, scale=scale)

    spy.slots = sockets.attend.slots
    with torch.no_grad():
        model(tokens_T, positions_T, replace(sockets, attend=spy))
    assert [layer for layer, *_ in seen] == [0, 1, 2]
    _, scale, latent_TC, k_rope_Tr = seen[0]
    assert scale == pytest.approx((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)
    block = model.blocks[0]
    with torch.no_grad():
        kv = block.attn.kv_a(block.attn_norm(model.embed(tokens_T)), plain_linear)
        raw_TC, raw_Tr = kv.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        normed = raw_TC * torch.rsqrt(raw_TC.square().mean(-1, keepdim=True) + LATENT_NORM_EPS)
    torch.testing.assert_close(latent_TC, normed * block.attn.kv_a_norm.weight)
    first = positions_T == 0  # position 0 is not rotated
    torch.testing.assert_close(k_rope_Tr[first], raw_Tr[first])
    torch.testing.assert_close(k_rope_Tr.norm(dim=-1), raw_Tr.norm(dim=-1))
    assert not torch.allclose(k_rope_Tr[~first], raw_Tr[~first])


def test_a_sequence_does_not_see_its_neighbours_in_the_pack():
    config = VARIANTS["odd sizes"]
    model = random_model(config)
    tokens_T, positions_T, _, sockets = packed(config)
    changed_T = tokens_T.clone()
    changed_T[: LENGTHS[0]] = (changed_T[: LENGTHS[0]] + 1) % config.vocab_size
    with torch.no_grad():
        before = model(tokens_T, positions_T, sockets).hidden_TD
        after = model(changed_T, positions_T, sockets).hidden_TD
    assert furthest(after[LENGTHS[0] :], before[LENGTHS[0] :]) < 1e-6
    assert not torch.allclose(after[: LENGTHS[0]], before[: LENGTHS[0]])
