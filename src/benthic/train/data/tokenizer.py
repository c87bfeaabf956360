"""Byte-level BPE: trained here, or any Hugging Face tokenizer folder; always saved as such a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from benthic.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

BOS: Final = "<|begin_of_text|>"
EOS: Final = "<|end_of_text|>"
FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_BYTES: Final = 256

# A line break takes the indentation after it along, so that "how deep" is one token; digits come one by one.
_SPLIT: Final = (
    r"(?:\r?\n)+[ \t]*|'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n\n"
    "{% else %}Assistant: {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with the ids that begin and end a document.

    `vocab_size` counts every id up to the highest, added tokens included; `sha256` is of `tokenizer.json`.
    `bos_token_id` is None for tokenizers that have no such token.
    """

    path: Path
    rules: tokenizers.Tokenizer
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int
    sha256: str

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as one document: begin, text, end."""
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        encodings = self.rules.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*begin, *encoding.ids, self.eos_token_id] for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Token ids of the beginning of a document: begin, text."""
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*begin, *self.rules.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without begin and end tokens."""
        return self.rules.decode(list(ids), skip_special_tokens=True)


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learn a byte-level BPE of `vocab_size` tokens: begin 0, end 1, the 256 bytes, then merges.

    Raises:
        DataError: `vocab_size` leaves no room for the bytes, or the texts are empty or have too few distinct
            pairs to fill it.
    """
    smallest = _BYTES + 2
    if vocab_size < smallest:
        msg = f"vocab_size={vocab_size} is below {smallest}: 256 bytes, begin and end. Raise it."
        raise DataError(msg)
    rules = _rules()
    counted = _Counted(texts)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rules.train_from_iterator(counted, trainer=trainer)
    if counted.seen == 0:
        msg = "the corpus has 0 documents: there is nothing to learn a tokenizer from."
        raise DataError(msg)
    if rules.get_vocab_size() < vocab_size:
        msg = (
            f"{counted.seen} documents gave {rules.get_vocab_size()} tokens, but vocab_size={vocab_size} was "
            "asked for. Give more text or a smaller --vocab-size."
        )
        raise DataError(msg)
    return rules


def save(rules: tokenizers.Tokenizer, folder: Path, *, model_max_length: int) -> Tokenizer:
    """Write a folder that `transformers.AutoTokenizer` and servers load, with a simple chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    rules.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "chat_template": _CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return load(folder)


def load(folder: Path) -> Tokenizer:
    """Open any Hugging Face tokenizer folder that has a `tokenizer.json`.

    Raises:
        DataError: no such file, it cannot be read, or no end-of-text token is named.
    """
    rules = load_rules(folder)
    settings = _settings(folder)
    eos = _token_id(rules, settings, "eos_token")
    if eos is None:
        msg = f"{folder}/tokenizer_config.json names no eos_token; documents could not be told apart."
        raise DataError(msg)
    return Tokenizer(
        path=folder,
        rules=rules,
        vocab_size=max(rules.get_vocab().values()) + 1,
        bos_token_id=_token_id(rules, settings, "bos_token"),
        eos_token_id=eos,
        sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
    )


def load_rules(folder: Path) -> tokenizers.Tokenizer:
    """The `tokenizer.json` of a folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        msg = f"{folder} is no tokenizer: it has no tokenizer.json. Make one with `benthic data tokenizer`."
        raise DataError(msg)
    try:
        rules = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every malformed file
        msg = f"{file} is no readable tokenizer: {error}"
        raise DataError(msg) from error
    return rules


def copy(source: Path, target: Path) -> None:
    """Copy the files that make up a tokenizer folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class _Counted:
    """Passes texts on and counts them, for a message when there were none."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.seen = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.seen += 1
            yield text


def _rules() -> tokenizers.Tokenizer:
    rules = tokenizers.Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rules.decoder = decoders.ByteLevel()
    rules.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return rules


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        msg = f"{file} is not JSON: {error}"
        raise DataError(msg) from error


def _token_id(rules: tokenizers.Tokenizer, settings: dict[str, Any], name: str) -> int | None:
    token = settings.get(name)
    if isinstance(token, dict):  # an AddedToken written out
        token = token.get("content")
    return None if token is None else rules.token_to_id(token)
