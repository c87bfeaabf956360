"""The checkpoint's tokenizer, read from `tokenizer.json` without loading a tensor library.

Every token stands for fixed bytes, so decoding is joining bytes: that is what makes streaming exact
(`benthic.serve.detokenize`) and gives each log-probability its token's bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tokenizers

from benthic.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        bytes_of: the bytes each id stands for; ids that the tokenizer does not know are absent.
        special_ids: ids that are control symbols rather than text.
        special_tokens: name to text, as chat templates use them (`bos_token`, `eos_token`, …).
        chat_template: Jinja source; None when the checkpoint has none.
        strip_first_space: SentencePiece family: the space before the first word is not part of the text.
        bos_id: put before every prompt that does not begin with it; None puts none.
    """

    backend: tokenizers.Tokenizer
    bytes_of: dict[int, bytes]
    special_ids: frozenset[int] = frozenset()
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    strip_first_space: bool = False
    bos_id: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

        Raises:
            DataError: no `tokenizer.json`, or one that cannot be read or decoded byte by byte.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            msg = f"{folder} has no tokenizer.json. Save the tokenizer there in the `tokenizers` format."
            raise DataError(msg)
        try:
            source = json.loads(path.read_text(encoding="utf-8"))
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            msg = f"{path} cannot be read as a tokenizer: {error}"
            raise DataError(msg) from error
        backend.no_padding()
        backend.no_truncation()
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        add_bos = bool(config.get("add_bos_token")) and "bos_token" in special_tokens
        return cls(
            backend=backend,
            bytes_of=_byte_table(backend, source.get("decoder"), path),
            special_ids=frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special),
            special_tokens=special_tokens,
            chat_template=_chat_template(folder, config),
            strip_first_space=_strips_first_space(source.get("decoder")),
            bos_id=backend.token_to_id(special_tokens["bos_token"]) if add_bos else None,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids.

        Releases the interpreter lock (as the library's `encode` does not: measured with a 1 MB text, which
        stalled every other thread for half a second), so that it can run beside the event loop.
        """
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if add_special_tokens and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        hidden = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join(self.bytes_of.get(i, b"") for i in ids if i not in hidden).decode(errors="replace")
        return text.removeprefix(" ") if self.strip_first_space else text

    def text_of(self, token: int) -> str:
        """One token as text, special tokens included; part of a character shows as U+FFFD."""
        return self.bytes_of.get(token, b"").decode(errors="replace")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not JSON: {error}"
        raise DataError(msg) from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The `*_token` entries, which are text or an object with `content`."""
    names = (name for name in config if name.endswith("_token"))
    entries = {name: config[name] for name in names}
    texts = {n: e.get("content") if isinstance(e, dict) else e for n, e in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template of its own file, or of the config (there a text, or a list of named ones)."""
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]
    return [decoder]


def _strips_first_space(decoder: dict[str, Any] | None) -> bool:
    steps = _decoder_steps(decoder)
    strips = any(s["type"] == "Strip" and s["content"] == " " and s["start"] == 1 for s in steps)
    metaspace = any(s["type"] == "Metaspace" and s.get("prepend_scheme") != "never" for s in steps)
    return strips or metaspace


def _byte_table(
    backend: tokenizers.Tokenizer, decoder: dict[str, Any] | None, path: Path
) -> dict[int, bytes]:
    """The bytes of every token.

    Byte-level BPE writes each byte as one printable character; the SentencePiece family writes a space as
    U+2581 and single bytes as `<0xAB>`.
    """
    kinds = {step["type"] for step in _decoder_steps(decoder)}
    vocab = backend.get_vocab(with_added_tokens=True)
    if kinds == {"ByteLevel"}:
        alphabet = _byte_level_alphabet()
        return {i: _byte_level_bytes(token, alphabet) for token, i in vocab.items()}
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        added = set(backend.get_added_tokens_decoder())
        return {
            i: token.encode() if i in added else _sentencepiece_bytes(token) for token, i in vocab.items()
        }
    msg = (
        f"{path} decodes with {sorted(kinds) or 'nothing'}, but only byte-level BPE and the SentencePiece "
        "family can be streamed exactly. Retrain or convert the tokenizer."
    )
    raise DataError(msg)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the other 68 follow from U+0100."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level_bytes(token: str, alphabet: dict[str, int]) -> bytes:
    """A token with any character outside the alphabet stands for its own text."""
    try:
        return bytes(alphabet[char] for char in token)
    except KeyError:
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
