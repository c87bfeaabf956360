"""Recipes hold together without the machines they are for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from benthic.cli.settings import apply
from benthic.errors import ConfigError
from benthic.parallel.footprint import footprints
from benthic.parallel.setup import number
from benthic.spec import hardware
from benthic.spec.parameters import parameters
from benthic.spec.totals import total
from benthic.train import large, recipes
from benthic.train.checkpoint import FolderStore
from benthic.train.data.shards import Meta, SplitInfo
from benthic.train.fields import flatten
from benthic.train.hardware import HardwareFacts
from benthic.train.resolve import resolve
from benthic.train.rows import planned_tokens, rows_at, table_of
from benthic.train.trainer import learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benthic.train.config import RunConfig
    from benthic.train.trainer import Trainer

# parameters without MTP, ranks, tokens of the first and of the last step, tokens of the run
EXPECTED = {
    "pretrain_100m": (111_109_856, 1, 262_144, 262_144, 1.05e9),
    "moonlight_16b_2xh200": (15_960_110_208, 2, 524_288, 524_288, 1.05e9),
    "moonlight_16b_8xh100": (15_960_110_208, 8, 16_777_216, 33_554_432, 5.2e12),
    "v2_lite_8xh100": (15_706_484_224, 8, 18_874_368, 18_874_368, 5.7e12),
    "deepseek_v3_2048_h800": (671_026_419_200, 2048, 16_777_216, 62_914_560, 14.8e12),
}


def resolved(name: str) -> RunConfig:
    config = recipes.get(name)
    gpu = config.device != "cpu"
    facts = HardwareFacts(
        device="cuda" if gpu else "cpu",
        name="made up",
        total_memory=80 * 10**9,
        threads=8,
        peak_flops={},
        peak_source="made up",
    )
    split = SplitInfo(tokens=10**9, documents=10**6, bytes=4 * 10**9, shards=())
    data = Meta(
        vocab_size=config.model.vocab_size,
        dtype="<u4",
        bos_token_id=config.model.bos_token_id,
        eos_token_id=config.model.eos_token_id,
        tokenizer_sha256="",
        splits={"train": split, "held_out": split},
        source={},
    )
    return resolve(config, facts, data, ranks=config.layout.ranks).config


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipe_resolves_and_its_layout_has_no_problem(name: str) -> None:
    config = resolved(name)
    assert "auto" not in flatten(config).values()
    layout, seq_len = config.layout, number(config.train.seq_len)
    assert not list(layout.problems(config.model, ranks=layout.ranks, seq_len=seq_len))
    rows = layout.dp_degree * number(config.train.local_batch_size)
    assert number(config.train.global_batch_size) % rows == 0


@pytest.mark.parametrize("name", EXPECTED)
def test_parameters_ranks_and_tokens_are_those_announced(name: str) -> None:
    config = resolved(name)
    size, ranks, first, last, whole = EXPECTED[name]
    assert total(config.model) == size
    assert config.layout.ranks == ranks
    seq_len = number(config.train.seq_len)
    assert rows_at(config, 0) * seq_len == first
    assert rows_at(config, int(whole)) * seq_len == last
    assert planned_tokens(config) == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_schedule_exists_for_the_first_and_the_last_batch(name: str) -> None:
    config = resolved(name)
    for tokens in (0, 10**15):
        table = table_of(config, rows_at(config, tokens))
        assert table.ranks == config.layout.pp_degree


def test_v3_follows_the_reports_schedules() -> None:
    config = resolved("deepseek_v3_2048_h800")
    at = [10**12, 9 * 10**12, 143 * 10**11, 146 * 10**11, 147 * 10**11]
    rates = [learning_rate(config.train, 10**5, tokens) for tokens in at]
    assert rates == pytest.approx([2.2e-4, 2.2e-4, 2.2e-5, 2.2e-5, 7.3e-6])
    assert learning_rate(config.train, 1000, 0) == pytest.approx(1.1e-4)
    assert [config.loss.mtp_weight.at(t) for t in (0, 11 * 10**12)] == [0.3, 0.1]
    assert [config.loss.bias_update_speed.at(t) for t in (0, 144 * 10**11)] == [0.001, 0.0]
    assert rows_at(config, 469 * 10**9 + 10**6) == 15360
    assert config.layout.expert_dp_degree == 2


@pytest.mark.parametrize(
    ("name", "gpu", "spare"),
    [
        ("moonlight_16b_2xh200", "h200", 0.2),
        ("moonlight_16b_8xh100", "h100", 0.4),
        ("v2_lite_8xh100", "h100", 0.4),
        ("deepseek_v3_2048_h800", "h800", 0.0),  # of 80 GB; the card has 85.5
    ],
)
def test_everything_that_a_rank_keeps_fits_the_gpu(name: str, gpu: str, spare: float) -> None:
    config = resolved(name)
    found = footprints(config, table_of(config, rows_at(config, 0)))
    assert max(one.total for one in found) < (1 - spare) * hardware.get(gpu).hbm_bytes


def test_v3_keeps_what_its_docstring_says() -> None:
    config = resolved("deepseek_v3_2048_h800")
    table = table_of(config, rows_at(config, 0))
    most = max(footprints(config, table), key=lambda one: one.total)
    said = large.deepseek_v3_2048_h800.__doc__ or ""
    assert f"{most.total / 2**30:.1f} GiB ({most.total / 1e9:.1f} GB)" in said
    assert f"{most.bytes['activations'] / 2**30:.1f} of them activations" in said
    narrow = replace(config, precision=replace(config.precision, e5m6_attention=True))
    freed = most.bytes["activations"] - footprints(narrow, table)[1].bytes["activations"]
    assert f"free {freed / 2**30:.1f}" in " ".join(said.split())


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("moonlight_16b_2xh200", "h200"), ("moonlight_16b_8xh100", "h100"), ("v2_lite_8xh100", "h100")],
)
def test_weights_gradients_and_optimizer_fit_the_gpu_with_room_for_activations(name: str, gpu: str) -> None:
    config = resolved(name)
    layout = config.layout
    numels = {True: 0, False: 0}
    for param in parameters(config.model):
        numels["expert" in param.axes] += param.numel
    kept = 2 + 4  # bfloat16 weights, float32 gradients
    sharded = 4 + (2 if config.optimizer.name == "muon" else 4)  # masters, moments in bfloat16
    experts = numels[True] / layout.ep_degree * (kept + sharded / layout.expert_dp_degree)
    dense = numels[False] * (kept + sharded / layout.ranks_per_stage)
    assert experts + dense < 0.75 * hardware.get(gpu).hbm_bytes


def test_batch_grows_along_its_curve_and_every_row_is_used_once(
    trainer: Callable[[RunConfig], Trainer], nano: RunConfig
) -> None:
    config = apply(nano, ["train.batch_curve=2@128,linear:6@256,8", "train.lr=1e-3", "train.warmup_steps=0"])
    growing = trainer(config)
    positions, rows = [growing.position], []
    for _ in range(8):
        result = growing.step()
        rows.append(result.step_tokens // 32)
        positions.append(growing.position)
    assert rows == [2, 2, 2, 2, 4, 8, 8, 8]
    assert [after - before for before, after in itertools.pairwise(positions)] == rows
    assert growing.tokens == sum(rows) * 32


def test_run_resumed_in_the_middle_of_the_growth_goes_on_alike(
    trainer: Callable[[RunConfig], Trainer], nano: RunConfig, tmp_path: Path
) -> None:
    config = apply(nano, ["train.batch_curve=2@128,8"])
    straight, broken, again = trainer(config), trainer(config), trainer(config)
    losses = [straight.step().loss for _ in range(4)]
    for _ in range(3):
        broken.step()
    store = FolderStore(tmp_path)
    store.save(broken.saved())
    again.restore(store.open(3))
    assert again.step().loss == losses[3]


def test_batch_too_small_for_the_ranks_is_refused_with_both_numbers(nano: RunConfig) -> None:
    config = apply(nano, ["train.batch_curve=3@1K,8", "layout.dp_degree=2"])
    with pytest.raises(ConfigError, match=r"wants 3 rows after 0 tokens, .* multiples of 4"):
        rows_at(config, 0)
