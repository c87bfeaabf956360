"""Whole configurations by name; each is a function, so that reading one shows everything it sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benthic.errors import UnknownFieldError
from benthic.spec import presets
from benthic.train import large
from benthic.train.config import (
    CheckpointConfig,
    EvaluateConfig,
    LogConfig,
    LoopConfig,
    LossConfig,
    RunConfig,
)
from benthic.train.curve import Curve

if TYPE_CHECKING:
    from collections.abc import Callable


def tiny_cpu() -> RunConfig:
    """The `tiny` model on two CPU cores: Python-looking text after two (AVX-512) to five minutes (AVX2)."""
    return RunConfig(
        model=presets.get("tiny"),
        train=LoopConfig(
            steps=500,
            seq_len=256,
            local_batch_size=4,
            global_batch_size=4,
            lr=3e-3,
            schedule="cosine",
            final_lr=0.05,
            warmup_steps=40,
        ),
        loss=LossConfig(mtp_weight=Curve.constant(0.1), bias_update_speed=Curve.constant(3e-3)),
        checkpoint=CheckpointConfig(every=200),
        evaluate=EvaluateConfig(every=200, max_tokens=32768),
        log=LogConfig(every=20, sample_tokens=160, sample_prompt="def __init__(self"),
        device="cpu",
    )


def nano_test() -> RunConfig:
    """The `nano` model for tests: 200 steps in seconds on one core."""
    return RunConfig(
        model=presets.get("nano"),
        train=LoopConfig(
            steps=200,
            seq_len=64,
            local_batch_size=2,
            global_batch_size=4,
            lr=3e-3,
            warmup_steps=10,
            threads=1,
        ),
        checkpoint=CheckpointConfig(every=20, export=False),
        evaluate=EvaluateConfig(every=0, max_tokens=2048),
        log=LogConfig(every=50, tensorboard=False, pictures=False),
        device="cpu",
    )


RECIPES: Final[dict[str, Callable[[], RunConfig]]] = {
    "tiny_cpu": tiny_cpu,
    "nano_test": nano_test,
    "pretrain_100m": large.pretrain_100m,
    "finetune": large.finetune,
    "moonlight_16b_2xh200": large.moonlight_16b_2xh200,
    "moonlight_16b_8xh100": large.moonlight_16b_8xh100,
    "v2_lite_8xh100": large.v2_lite_8xh100,
    "deepseek_v3_2048_h800": large.deepseek_v3_2048_h800,
}

_CONTINUED: Final = frozenset({"finetune", "moonlight_16b_2xh200"})


def continues(name: str) -> bool:
    """Whether a recipe is for weights that were trained before, so that random ones make no sense."""
    return _key(name) in _CONTINUED


def get(name: str) -> RunConfig:
    """The recipe called `name` (`-` and `_` are the same).

    Raises:
        UnknownFieldError: no such recipe; the message names the nearest one.
    """
    if _key(name) not in RECIPES:
        msg = "recipe"
        raise UnknownFieldError(msg, name, RECIPES)
    return RECIPES[_key(name)]()


def _key(name: str) -> str:
    return name.replace("-", "_")
