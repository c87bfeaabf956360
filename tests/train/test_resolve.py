from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from benthic.cli.settings import apply
from benthic.errors import BackendError, ConfigError, UnknownFieldError
from benthic.parallel.exchange_choice import Spot
from benthic.train import recipes
from benthic.train.config import ExchangeConfig, RunConfig
from benthic.train.data.shards import read_meta
from benthic.train.fields import flatten, from_json, to_json
from benthic.train.hardware import HardwareFacts, detect
from benthic.train.resolve import resolve

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipe_survives_json(name: str) -> None:
    config = recipes.get(name)
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UnknownFieldError, match="Did you mean 'tiny_cpu'"):
        recipes.get("tiny-cpus")


def test_resolved_config_has_no_auto_left_and_every_choice_has_a_reason(
    dataset: Path, facts: HardwareFacts
) -> None:
    config = apply(
        recipes.nano_test(), [f"train.{n}=auto" for n in ("seq_len", "local_batch_size", "threads")]
    )
    config = apply(config, ["train.global_batch_size=auto", "device=auto"])
    resolved = resolve(config, facts, read_meta(dataset))
    assert "auto" not in flatten(resolved.config).values()
    assert resolved.config.train.seq_len == config.model.max_position_embeddings == 256
    assert resolved.config.train.local_batch_size == 4096 // 256
    assert {c.field for c in resolved.choices} == {
        "device",
        "checkpoint.async_save",
        "precision.weights",
        "precision.matmul",
        "train.seq_len",
        "train.local_batch_size",
        "train.global_batch_size",
        "train.threads",
        "train.cuda_graph",
        "exchange.kind",
        "exchange.fp8",
    }
    assert all(choice.reason for choice in resolved.choices)


@pytest.mark.parametrize(
    ("settings", "ranks", "said"),
    [
        ((), 1, ""),
        (("layout.dp_degree=2", "layout.ep_degree=2"), 2, ""),
        (
            ("layout.dp_degree=2", "layout.ep_degree=2", "exchange.kind=all_to_all"),
            2,
            "all_to_all, asks the device how many",
        ),
        (("layout.cp_degree=2",), 2, "cp_degree=2 cuts documents"),
        (("offload=attention",), 1, "offload=attention brings activations"),
        (("device=cpu",), 1, "device=cpu has no CUDA graphs"),
    ],
    ids=str,
)
def test_steps_are_cuda_graphs_unless_the_host_is_needed(
    settings: tuple[str, ...], ranks: int, said: str, dataset: Path, facts: HardwareFacts
) -> None:
    device = "cpu" if "device=cpu" in settings else "cuda"
    found, meta = dataclasses.replace(facts, device=device), read_meta(dataset)
    config = apply(recipes.nano_test(), ["device=auto", "train.global_batch_size=16", *settings])
    resolved = resolve(config, found, meta, ranks=ranks)
    (choice,) = [each for each in resolved.choices if each.field == "train.cuda_graph"]
    assert resolved.config.train.cuda_graph is choice.value is (not said)
    off = apply(config, ["train.cuda_graph=false"])
    assert resolve(off, found, meta, ranks=ranks).config.train.cuda_graph is False
    if said:
        assert said in choice.reason
        with pytest.raises(ConfigError, match=f"train.cuda_graph=true, but .*{said}"):
            resolve(apply(config, ["train.cuda_graph=true"]), found, meta, ranks=ranks)


def test_checkpoints_are_written_beside_training_on_a_gpu_only(dataset: Path, facts: HardwareFacts) -> None:
    gpu, meta = dataclasses.replace(facts, device="cuda"), read_meta(dataset)
    config = apply(recipes.nano_test(), ["device=auto"])
    assert resolve(config, gpu, meta).config.checkpoint.async_save is True
    assert resolve(config, facts, meta).config.checkpoint.async_save is False
    off = apply(config, ["checkpoint.async_save=false"])
    assert resolve(off, gpu, meta).config.checkpoint.async_save is False


def test_the_exchange_is_chosen_for_the_ranks_that_share_experts(dataset: Path, facts: HardwareFacts) -> None:
    gpu, meta = dataclasses.replace(facts, device="cuda"), read_meta(dataset)
    config = apply(recipes.nano_test(), ["device=auto", "layout.dp_degree=2", "layout.ep_degree=2"])
    inside = resolve(config, gpu, meta, ranks=2)
    assert inside.config.exchange == ExchangeConfig(kind="nvlink", fp8=False)
    reason = next(c.reason for c in inside.choices if c.field == "exchange.kind")
    assert "write each other's memory" in reason
    assert "if every host has 8 GPUs" in reason
    apart = (Spot("a"), Spot("b"))
    assert resolve(config, gpu, meta, ranks=2, spots=apart).config.exchange.kind == "all_to_all"
    again = apply(config, ["recompute=combine"])
    assert resolve(again, gpu, meta, ranks=2).config.exchange.kind == "all_to_all"
    assert resolve(config, facts, meta, ranks=2).config.exchange.kind == "all_to_all"
    with pytest.raises(BackendError, match="'nvlink' cannot run here: the ranks are on 2 hosts"):
        resolve(apply(config, ["exchange.kind=nvlink"]), gpu, meta, ranks=2, spots=apart)


def test_tokens_travel_in_fp8_to_experts_elsewhere_that_multiply_in_it(
    dataset: Path, facts: HardwareFacts
) -> None:
    gpu, meta = dataclasses.replace(facts, device="cuda"), read_meta(dataset)
    config = apply(recipes.nano_test(), ["device=auto", "precision.matmul=fp8", "precision.weights=fp8"])
    assert resolve(config, gpu, meta).config.exchange.fp8 is False
    spread = apply(config, ["layout.dp_degree=2", "layout.ep_degree=2"])
    assert resolve(spread, gpu, meta, ranks=2).config.exchange.fp8 is True


def test_gpu_runs_on_bfloat16_weights_unless_told_otherwise(dataset: Path, facts: HardwareFacts) -> None:
    gpu = dataclasses.replace(facts, device="cuda")
    config = apply(recipes.nano_test(), ["device=auto"])
    assert resolve(config, gpu, read_meta(dataset)).config.precision.weights == "bfloat16"
    kept = resolve(apply(config, ["precision.weights=float32"]), gpu, read_meta(dataset)).config.precision
    assert (kept.weights, kept.matmul) == ("float32", "float32")


def test_automatic_microbatch_divides_the_global_batch(dataset: Path, facts: HardwareFacts) -> None:
    config = apply(
        recipes.nano_test(),
        ["train.local_batch_size=auto", "train.global_batch_size=14", "train.seq_len=256"],
    )
    assert resolve(config, facts, read_meta(dataset)).config.train.local_batch_size == 14
    config = apply(config, ["train.global_batch_size=34"])
    assert resolve(config, facts, read_meta(dataset)).config.train.local_batch_size == 2


def test_every_contradiction_is_reported_at_once_with_its_numbers(
    dataset: Path, facts: HardwareFacts
) -> None:
    config = apply(
        recipes.nano_test(),
        [
            "train.seq_len=512",
            "train.local_batch_size=3",
            "train.global_batch_size=8",
            "train.lr=-1",
            "train.warmup_steps=900",
            "train.schedule=curve",
            "optimizer.beta2=1.5",
            "model.vocab_size=300",
            "precision.weights=bfloat16",
            "precision.matmul=float32",
            "checkpoint.every=-1",
            "train.seed=99999999999999999999",
            "train.final_lr=5",
        ],
    )
    with pytest.raises(ConfigError) as caught:
        resolve(config, facts, read_meta(dataset))
    message = str(caught.value)
    for words in (
        "11 settings cannot be used",
        "train.seq_len=512 exceeds model.max_position_embeddings=256",
        "train.global_batch_size=8 is no multiple of train.local_batch_size=3. Set it to 6 or 9",
        "train.lr=-1.0",
        "train.warmup_steps=900 exceeds train.steps=200",
        "train.lr_curve is missing",
        "optimizer.beta2=1.5",
        "has 320 tokens, but model.vocab_size=300",
        "precision.weights=bfloat16 with precision.matmul=float32",
        "checkpoint.every=-1",
        "train.seed=99999999999999999999 does not fit into 64 bits",
        "train.final_lr=5.0 is the last rate over train.lr",
    ):
        assert words in message


def test_remainders_are_refused_where_weights_are_masters(dataset: Path, facts: HardwareFacts) -> None:
    wide = ["precision.weights=float32", "precision.matmul=float32", "optimizer.store_param_remainders=true"]
    with pytest.raises(ConfigError) as caught:
        resolve(apply(recipes.nano_test(), wide), facts, read_meta(dataset))
    for words in ("optimizer.store_param_remainders=true", "precision.weights=float32"):
        assert words in str(caught.value)


def test_token_ids_of_the_tokenizer_replace_those_of_the_preset(dataset: Path, facts: HardwareFacts) -> None:
    config = apply(recipes.nano_test(), ["model.bos_token_id=7", "model.eos_token_id=9"])
    resolved = resolve(config, facts, read_meta(dataset))
    assert (resolved.config.model.bos_token_id, resolved.config.model.eos_token_id) == (0, 1)
    assert any(c.field == "model.eos_token_id" and "tokenizer" in c.reason for c in resolved.choices)


def test_detected_cpu_says_how_its_peak_was_found() -> None:
    found = detect("cpu", threads=1)
    assert found.device == "cpu"
    assert found.peak_flops["float32"] > 1e8
    assert "measured here on 1 thread" in found.peak_source
