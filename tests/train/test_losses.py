from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import torch

from benthic.kernels import ops
from benthic.model.initialise import initialise
from benthic.model.local import packed_sockets, plain_linear
from benthic.model.network import DeepSeek
from benthic.parallel.pipeline import Flow
from benthic.spec import presets
from benthic.train.data.microbatch import Microbatch, assemble
from benthic.train.losses import Objective, Tally, Weights, targets_of, weights_of
from benthic.train.stage import ModelStage, Task


def model_of(depths: int) -> DeepSeek:
    config = dataclasses.replace(presets.get("nano"), num_nextn_predict_layers=depths)
    model = DeepSeek(config)
    initialise(model, 3)
    return model


def sockets_of(model: DeepSeek, batch: Microbatch):
    return packed_sockets(
        batch.cu_seqlens,
        batch.max_seqlen,
        n_routed_experts=model.config.n_routed_experts,
        linear=plain_linear,
    )


def loss_of(model: DeepSeek, batch: Microbatch, weights: Weights) -> tuple[torch.Tensor, Tally]:
    """The steps of the whole network in order, not cut."""
    tally, flow = Tally(), Flow(None)
    task = Task(batch, batch.positions_T, sockets_of(model, batch), Objective(weights, tally, batch.rows))
    for phase in ModelStage(model, True, defaultdict(tuple), [task]).phases(0):  # noqa: FBT003
        for step in phase.steps:
            flow = step.run(flow)
    return flow.loss, tally


def weights_for(batch: list[Microbatch], **options) -> Weights:
    return weights_of(targets_of(batch), rows=sum(m.rows for m in batch), **options)


def one_document(tokens: int, depths: int) -> Microbatch:
    """t_1 … t_{T+1} of one document in a row of T; what would lie beyond the document is padding."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.integers(2, 320, tokens + 1), np.zeros(depths, np.int64)])
    owner = np.where(np.arange(tokens + 1 + depths) <= tokens, 0, -1)
    return assemble(ids[None], owner[None], mtp_depth=depths)


@pytest.mark.parametrize("depths", [0, 1, 2])
@torch.no_grad()
def test_main_and_mtp_losses_are_those_of_the_report(depths: int) -> None:
    """DeepSeek-V3 report eq. (21)-(25): L^k = -(1/T) sum_{i=2+k}^{T+1} log P^k_i[t_i]."""
    model, size, weight = model_of(depths), 13, 0.3
    batch = one_document(size, depths)
    sockets = sockets_of(model, batch)
    t = [0, *batch.tokens_T.tolist(), int(batch.target_KT[0, -1])]  # counted from 1

    hidden = model(batch.tokens_T, batch.positions_T, sockets)
    log_p = model.logits(hidden.hidden_TD, plain_linear).log_softmax(-1)
    main = -sum(log_p[i - 2, t[i]] for i in range(2, size + 2)) / size
    ahead = torch.zeros(())
    for k in range(1, depths + 1):
        shifted = torch.tensor([t[i + k] if i + k <= size + 1 else 0 for i in range(1, size + 1)])
        previous = model.mtp_input(hidden)
        hidden = model.predict_ahead(k - 1, previous, shifted, batch.positions_T, sockets)
        log_p = model.logits(hidden.hidden_TD, plain_linear).log_softmax(-1)
        ahead += -sum(log_p[i - 2 - k, t[i]] for i in range(2 + k, size + 2)) / size
    literal = main + (weight / depths * ahead if depths else 0.0)

    weights = weights_for([batch], mtp_weight=weight, normaliser="tokens", balance_alpha=0.0)
    assert torch.allclose(loss_of(model, batch, weights)[0], literal, rtol=1e-5)


def test_depths_can_be_divided_by_their_own_targets() -> None:
    batch = one_document(13, 2)
    weights = weights_for([batch, batch], mtp_weight=0.4, normaliser="targets", balance_alpha=0.5)
    assert batch.num_targets == (13, 12, 11)
    assert weights.main == pytest.approx(1 / 26)
    assert weights.mtp == pytest.approx((0.2 / 24, 0.2 / 22))
    assert weights.balance == pytest.approx(0.25)


def test_balance_loss_sums_over_every_mixture_layer_the_mtp_ones_included() -> None:
    model = model_of(1)
    batch = one_document(12, 1)
    weights = weights_for([batch], mtp_weight=0.3, normaliser="tokens", balance_alpha=0.0)
    _, found = loss_of(model, batch, weights)
    assert sorted(found.counts) == [1, 2, 3]
    assert all(int(count.sum()) == 12 * model.config.num_experts_per_tok for count in found.counts.values())
    sockets = sockets_of(model, batch)
    hidden = model(batch.tokens_T, batch.positions_T, sockets)
    ahead = model.predict_ahead(0, model.mtp_input(hidden), batch.ahead_KT[0], batch.positions_T, sockets)
    routings = [routing for _, routing in (*hidden.routing, *ahead.routing)]
    expected = sum(ops.balance_loss(r.scores_TE, top_k=2, rows=1)[1] for r in routings)
    assert torch.allclose(torch.stack(found.balance).sum(), expected, rtol=1e-6)


def test_loss_of_a_batch_does_not_depend_on_how_it_is_cut_into_microbatches() -> None:
    model = model_of(1)
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, 320, (4, 12))
    owner = (rng.random((4, 12)) < 0.2).cumsum(1)
    whole = [assemble(tokens, owner, mtp_depth=1)]
    parts = [assemble(tokens[i : i + 1], owner[i : i + 1], mtp_depth=1) for i in range(4)]
    totals = []
    for batch in (whole, parts):
        weights = weights_for(batch, mtp_weight=0.3, normaliser="tokens", balance_alpha=0.01)
        totals.append(sum(loss_of(model, m, weights)[0] for m in batch))
    assert torch.allclose(totals[0], totals[1], rtol=1e-5)


def test_masked_documents_do_not_see_each_other() -> None:
    model = model_of(1)
    rng = np.random.default_rng(2)
    tokens = rng.integers(2, 320, (1, 14))
    owner = np.array([[0] * 6 + [1] * 8])
    batch = assemble(tokens, owner, mtp_depth=1)
    changed = tokens.copy()
    changed[0, :6] = rng.integers(2, 320, 6)
    other = assemble(changed, owner, mtp_depth=1)
    with torch.no_grad():
        one = model(batch.tokens_T, batch.positions_T, sockets_of(model, batch)).hidden_TD
        two = model(other.tokens_T, other.positions_T, sockets_of(model, other)).hidden_TD
    assert not torch.allclose(one[:6], two[:6])
    assert torch.allclose(one[6:], two[6:], atol=1e-6)
