"""The tokenizer's folder, for every conftest whose servers need one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from small_tokenizer import save_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder
