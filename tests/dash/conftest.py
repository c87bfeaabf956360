from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# The servers of these tests are those of the API's.
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
sys.path.insert(0, str(Path(__file__).parent))

from tokenizer_fixture import tokenizer_folder

__all__ = ["tokenizer_folder"]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from running import Running


@pytest.fixture(scope="module")
def server(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server round the fake engine, whose steps take 5 ms."""
    import running

    log = tmp_path_factory.mktemp("server") / "log"
    with running.fake_server(tokenizer_folder, log, step_seconds=0.005) as started:
        yield started
