from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# The engine process and the server under test are fresh interpreters that import `fake_engine` by name.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from small_tokenizer import save_tokenizer
from tokenizer_fixture import tokenizer_folder

__all__ = ["tokenizer_folder"]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from running import Running


@pytest.fixture(scope="session")
def server(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The HTTP server round the fake engine, which counts upwards from the last prompt token."""
    import running

    log = tmp_path_factory.mktemp("server") / "log"
    with running.fake_server(tokenizer_folder, log) as started:
        yield started


@pytest.fixture(scope="session")
def nano_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `nano` preset with random weights, in the Hugging Face layout, with tokenizer and chat template."""
    from benthic.model.checkpoint import save_pretrained
    from benthic.model.initialise import initialise
    from benthic.model.network import DeepSeek
    from benthic.spec import presets

    folder = tmp_path_factory.mktemp("checkpoint") / "nano"
    model = DeepSeek(presets.get("nano"))
    initialise(model, seed=0)
    save_pretrained(model, folder)
    save_tokenizer(folder)
    return folder
