from __future__ import annotations

import pytest

from benthic.cli.settings import apply
from benthic.errors import ConfigError
from benthic.train import recipes
from benthic.train.curve import Curve


def test_settings_reach_every_type_of_field() -> None:
    config = apply(
        recipes.nano_test(),
        [
            "train.lr=1e-4",
            "train.steps=1_000",
            "train.seq_len=auto",
            "loss.mtp_weight=0.3@10T,0.1",
            "recompute=attention, experts",
            "data.mask_documents=off",
            "model.q_lora_rank=none",
            'model.rope_scaling={"factor": 4}',
            "optimizer.moment_dtype=bfloat16",
            "train.steps=7",
        ],
    )
    assert (config.train.lr, config.train.steps, config.train.seq_len) == (1e-4, 7, "auto")
    assert config.loss.mtp_weight == Curve.parse("0.3@10T,0.1")
    assert config.recompute == ("attention", "experts")
    assert config.data.mask_documents is False
    assert config.model.q_lora_rank is None
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 4.0
    assert config.optimizer.moment_dtype == "bfloat16"


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("field", ["train.max_norm", "optimizer.weight_decay", "train.timeout_s"])
def test_numbers_that_are_not_finite_are_refused(field: str, word: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}={word}: '{word}' is not a finite number"):
        apply(recipes.nano_test(), [f"{field}={word}"])


def test_all_wrong_settings_are_reported_at_once() -> None:
    wrong = [
        "train.lrr=2",
        "train.steps=many",
        "foo",
        "modl.hidden_size=3",
        "train.schedule=cosin",
        "train=3",
        "train.lr.x=3",
        "data.mask_documents=perhaps",
        "recompute=atention",
    ]
    with pytest.raises(ConfigError) as caught:
        apply(recipes.nano_test(), wrong)
    message = str(caught.value)
    assert len(message.splitlines()) == len(wrong)
    for words in (
        "unknown config field 'train.lrr'. Did you mean 'train.lr'?",
        "'many' is not an integer",
        "--set foo: is no setting",
        "Did you mean 'model.hidden_size'?",
        "'cosin' is not 'constant' or 'cosine' or 'curve'",
        "train is a section",
        "unknown config field 'train.lr.x'",
        "'perhaps' is not true or false",
        "'atention' is not 'attention' or 'dispatch' or 'experts' or 'combine'",
    ):
        assert words in message


def test_settings_that_only_fit_together_are_applied_together() -> None:
    config = apply(
        recipes.nano_test(), ["model.n_group=4", "model.topk_group=2", "model.n_routed_experts=16"]
    )
    assert (config.model.n_group, config.model.n_routed_experts) == (4, 16)


def test_contradictory_model_is_refused_with_its_fields() -> None:
    with pytest.raises(ConfigError, match="n_group"):
        apply(recipes.nano_test(), ["model.n_group=3"])
