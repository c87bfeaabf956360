from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_models import BASE, LENGTHS, VARIANTS, furthest, packed, random_model

from benthic.errors import ConfigError, ShapeError
from benthic.model.initialise import initialise
from benthic.model.local import packed_sockets, plain_linear
from benthic.model.network import DeepSeek
from benthic.model.part import Part
from benthic.spec.parameters import parameters

MTP = replace(BASE, num_nextn_predict_layers=1)
TIED = replace(BASE, tie_word_embeddings=True)


def test_packing_changes_no_sequence():
    model = random_model(BASE)
    tokens_T, positions_T, _, sockets = packed(BASE)
    with torch.no_grad():
        together = model(tokens_T, positions_T, sockets).hidden_TD
        for rows_T, expected in zip(tokens_T.split(LENGTHS), together.split(LENGTHS), strict=True):
            cu_seqlens = torch.tensor([0, len(rows_T)], dtype=torch.int32)
            alone = packed_sockets(cu_seqlens, len(rows_T), n_routed_experts=BASE.n_routed_experts)
            actual = model(rows_T, torch.arange(len(rows_T)), alone).hidden_TD
            assert furthest(actual, expected) < 1e-5


def test_routing_names_its_layers_and_covers_every_token():
    model = random_model(BASE)
    tokens_T, positions_T, _, sockets = packed(BASE)
    hidden = model(tokens_T, positions_T, sockets)
    assert [layer for layer, _ in hidden.routing] == [1, 2]
    for _, routing in hidden.routing:
        assert routing.scores_TE.shape == (sum(LENGTHS), BASE.n_routed_experts)
        assert routing.expert_TK.shape == routing.weight_TK.shape == (sum(LENGTHS), BASE.num_experts_per_tok)
        assert routing.scores_TE.requires_grad


def test_hidden_is_the_final_norm_of_pre_norm_and_config_picks_which_feeds_mtp():
    tokens_T, positions_T, _, sockets = packed(BASE)
    for source in ("pre_norm", "post_norm"):
        model = random_model(replace(MTP, mtp_hidden=source))
        hidden = model(tokens_T, positions_T, sockets)
        torch.testing.assert_close(hidden.hidden_TD, model.norm(hidden.pre_norm_TD))
        expected = hidden.pre_norm_TD if source == "pre_norm" else hidden.hidden_TD
        assert model.mtp_input(hidden) is expected


def test_two_half_models_composed_equal_the_whole():
    whole = random_model(MTP)
    first = DeepSeek(MTP, Part(layers=(0,), embed=True))
    second = DeepSeek(MTP, Part(layers=(1, 2), embed=True, head=True, mtp=(0,)))
    state = whole.state_dict()
    for half in (first, second):
        half.load_state_dict({name: tensor for name, tensor in state.items() if half.part.holds(name)})
    tokens_T, positions_T, _, sockets = packed(MTP)
    with torch.no_grad():
        expected = whole(tokens_T, positions_T, sockets)
        between = first.run_layers(first.embed(tokens_T), positions_T, sockets)
        hidden = second.finish(second.run_layers(between.x_TD, positions_T, sockets))
        ahead = second.predict_ahead(0, second.mtp_input(hidden), tokens_T, positions_T, sockets)
        wanted = whole.predict_ahead(0, whole.mtp_input(expected), tokens_T, positions_T, sockets)
    torch.testing.assert_close(hidden.hidden_TD, expected.hidden_TD, rtol=0, atol=0)
    torch.testing.assert_close(ahead.hidden_TD, wanted.hidden_TD, rtol=0, atol=0)
    assert [layer for layer, _ in between.routing + hidden.routing] == [1, 2]
    names = set(first.state_dict()) | set(second.state_dict())
    assert names == set(state)
    assert set(first.state_dict()) & set(second.state_dict()) == {"embed.weight"}


@pytest.mark.parametrize(
    ("config", "part", "words"),
    [
        (BASE, Part(layers=(2, 3)), r"layers \[3\].*num_hidden_layers = 3"),
        (MTP, Part(layers=(), mtp=(1,)), r"MTP modules \[1\].*num_nextn_predict_layers = 1"),
        (MTP, Part(layers=(), mtp=(0,), head=True), "share"),
        (TIED, Part(layers=(), head=True), "tie_word_embeddings"),
    ],
)
def test_impossible_part_is_refused_with_its_numbers(config, part, words):
    with pytest.raises(ConfigError, match=words):
        DeepSeek(config, part)


def test_positions_and_tokens_of_different_length_are_refused():
    model = random_model(BASE)
    tokens_T, positions_T, _, sockets = packed(BASE)
    with pytest.raises(ShapeError, match=r"15.*14"):
        model(tokens_T, positions_T[:-1], sockets)


def test_tied_head_is_the_embedding_and_gets_both_gradients():
    model = random_model(TIED)
    assert model.head_weight() is model.embed.weight
    assert not any(name.startswith("head") for name in model.state_dict())
    tokens_T, positions_T, _, sockets = packed(TIED)
    model.logits(model(tokens_T, positions_T, sockets).hidden_TD, plain_linear).square().sum().backward()
    untouched = [v for v in range(TIED.vocab_size) if v not in set(tokens_T.tolist())]
    assert model.embed.weight.grad[untouched].abs().min(dim=0).values.max() > 0


def test_initial_weights_depend_on_seed_and_name_only():
    whole, again, other = DeepSeek(MTP), DeepSeek(MTP), DeepSeek(MTP)
    torch.manual_seed(123)
    initialise(whole, 7)
    torch.manual_seed(321)
    initialise(again, 7)
    initialise(other, 8)
    part = DeepSeek(MTP, Part(layers=(2,)))
    initialise(part, 7)
    state = whole.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name])
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert not torch.equal(other.state_dict()["embed.weight"], state["embed.weight"])


def test_initial_weights_have_the_spread_of_the_config_and_no_repeats():
    model = DeepSeek(MTP)
    initialise(model, 0)
    seen = set()
    for param in parameters(MTP):
        tensor = model.state_dict()[param.name]
        if param.part == "norms":
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif not param.trainable:
            assert torch.equal(tensor, torch.zeros_like(tensor))
        else:
            assert float(tensor.std()) == pytest.approx(MTP.initializer_range, rel=0.15), param.name
            for matrix in tensor.flatten(0, -3) if tensor.dim() > 2 else [tensor]:
                seen.add(float(matrix.flatten()[0]))
    matrices = sum(
        tensor[..., 0, 0].numel() for name, tensor in model.state_dict().items() if tensor.dim() > 1
    )
    assert len(seen) == matrices


def test_initialise_matches_across_dtypes_up_to_rounding():
    wide, narrow = DeepSeek(BASE), DeepSeek(BASE).bfloat16()
    initialise(wide, 0)
    initialise(narrow, 0)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name].to(tensor.dtype)), name


def test_model_survives_a_deep_copy_and_a_move_through_the_meta_device():
    model = random_model(BASE)
    twin = copy.deepcopy(model)
    with torch.device("meta"):
        hollow = DeepSeek(BASE)
    hollow.to_empty(device="cpu")
    hollow.load_state_dict(model.state_dict())
    tokens_T, positions_T, _, sockets = packed(BASE)
    with torch.no_grad():
        expected = model(tokens_T, positions_T, sockets).hidden_TD
        for other in (twin, hollow):
            actual = other(tokens_T, positions_T, sockets).hidden_TD
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_model_stays_near_float32(name):
    wide = random_model(VARIANTS[name])
    narrow = random_model(VARIANTS[name]).bfloat16()
    tokens_T, positions_T, _, sockets = packed(VARIANTS[name])
    with torch.no_grad():
        expected = wide(tokens_T, positions_T, sockets)
        actual = narrow(tokens_T, positions_T, sockets)
    assert actual.hidden_TD.dtype == torch.bfloat16
    # Tokens whose choice of experts was a near tie may differ; most may not.
    off_T = (actual.hidden_TD.float() - expected.hidden_TD).norm(dim=-1) / expected.hidden_TD.norm(dim=-1)
    assert float(off_T.median()) < 0.1
