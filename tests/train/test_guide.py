"""The page about training shows settings and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benthic.cli.settings import apply
from benthic.train import recipes

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "training.md"


def test_every_setting_of_the_page_can_be_set() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"--set ([\w.]+=\S+?)(?=`|\s)", text)
    assert len(shown) >= 12
    apply(recipes.tiny_cpu(), [setting for setting in shown if setting != "section.field=value"])


@pytest.mark.parametrize("recipe", re.findall(r"benthic train (\w+) ", PAGE.read_text(encoding="utf-8")))
def test_every_recipe_of_the_page_exists(recipe: str) -> None:
    assert recipes.get(recipe).train.steps > 0
