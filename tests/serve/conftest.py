from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# The engine process and the server under test are fresh interpreters that import `fake_engine` by name.
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from collections.abc import Iterator

    from running import Running

SPECIAL = ["<bos>", "<eos>", "<|user|>", "<|assistant|>"]
LINES = [
    "the quick brown fox jumps over the lazy dog",
    "def add(a, b):\n    return a + b\n",
    "Grüße, 世界! 🌊",
]
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' and loop.index0 > 0 %}"
    "{{ raise_exception('system must come first') }}"
    "{% endif %}"
    "<|{{ 'assistant' if message.role == 'assistant' else 'user' }}|>{{ message.content }}"
    "{% endfor %}"
    "{% if shout %}!!!{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, vocab_size: int = 310) -> None:
    """A byte-level BPE tokenizer and a chat template, in the Hugging Face layout."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 20, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


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
