"""Grammars in the engine: which tokens may come next, for the requests that have one.

Shape suffixes: S rows that sample this step, L rows with a grammar, V vocabulary, W 32-bit words of a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from benthic.errors import AdmissionError
from benthic.serve.sample import NO_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor


class Grammars:
    """Compiles grammars against one vocabulary, which is read when the first grammar comes.

    Args:
        path: a `tokenizer.json`.
        vocab_size: of the model; it may be more than the tokenizer's.
        eos: tokens that may follow a complete output.
    """

    def __init__(self, path: Path, *, vocab_size: int, eos: tuple[int, ...]) -> None:
        self._path = path
        self._vocab_size = vocab_size
        self._eos = eos
        self._vocabulary: LLTokenizer | None = None

    @classmethod
    def from_folder(cls, folder: Path, *, vocab_size: int, eos: tuple[int, ...]) -> Grammars | None:
        """Of a checkpoint; None without a `tokenizer.json`."""
        path = folder / "tokenizer.json"
        return cls(path, vocab_size=vocab_size, eos=eos) if path.is_file() else None

    def matcher(self, grammar: str) -> LLMatcher:
        """A grammar at its beginning.

        Raises:
            AdmissionError: the vocabulary cannot be read, or the grammar not followed; the parser's words.
        """
        from llguidance import LLMatcher  # noqa: PLC0415 (engines without such requests do without it)

        matcher = LLMatcher(self._read(), grammar, log_level=0)
        if matcher.is_error():
            msg = f"the grammar cannot be followed: {matcher.get_error()[:300]}"
            raise AdmissionError(msg)
        return matcher

    def _read(self) -> LLTokenizer:
        from llguidance import LLTokenizer  # noqa: PLC0415

        if self._vocabulary is None:
            try:
                self._vocabulary = LLTokenizer(
                    str(self._path), n_vocab=self._vocab_size, eos_token=list(self._eos)
                )
            except ValueError as error:
                msg = f"{self._path} cannot be read as a vocabulary of {self._vocab_size} tokens: {error}"
                raise AdmissionError(msg) from error
        return self._vocabulary


def matcher_for(grammars: Grammars | None, grammar: str | None) -> LLMatcher | None:
    """A request's matcher; None for a request without a grammar.

    Raises:
        AdmissionError: the engine was built without a vocabulary, or the grammar cannot be followed.
    """
    if grammar is None:
        return None
    if grammars is None:
        msg = "structured output needs the model's vocabulary, but its folder has no tokenizer.json"
        raise AdmissionError(msg)
    return grammars.matcher(grammar)


class GrammarMasks:
    """Where each request stands in its grammar; rows without one cost a dictionary look-up."""

    def __init__(self, device: torch.device) -> None:
        self._matchers: dict[str, LLMatcher] = {}
        self._bit_32 = torch.arange(32, dtype=torch.int32, device=device)

    def admit(self, request_id: str, matcher: LLMatcher) -> None:
        """Follow a grammar from its beginning."""
        self._matchers[request_id] = matcher

    def release(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        self._matchers.pop(request_id, None)

    def apply(self, logits_SV: Tensor, request_ids: Sequence[str]) -> None:
        """Set to minus infinity, in place, what the grammars do not allow next.

        Cost: about 50 us a row on the host, then one gather and one scatter of the rows with a grammar.
        """
        rows = [row for row, request_id in enumerate(request_ids) if request_id in self._matchers]
        if not rows:
            return
        masks = [self._matchers[request_ids[row]].compute_bitmask() for row in rows]
        words_LW = np.frombuffer(b"".join(masks), dtype=np.int32).reshape(len(rows), -1)
        word_LW = torch.from_numpy(words_LW.copy()).to(logits_SV.device)
        allowed_LV = ((word_LW.unsqueeze(-1) >> self._bit_32) & 1).bool().flatten(1)[:, : logits_SV.shape[1]]
        row_L = torch.tensor(rows, device=logits_SV.device)
        logits_SV[row_L] = logits_SV[row_L].masked_fill(~allowed_LV, -torch.inf)

    def accept(self, request_ids: Sequence[str], tokens: list[int]) -> dict[int, str]:
        """Move every grammar past its row's token; what went wrong by row, whose token becomes `NO_TOKEN`."""
        failures: dict[int, str] = {}
        if not self._matchers:
            return failures
        for row, request_id in enumerate(request_ids):
            matcher = self._matchers.get(request_id)
            if matcher is None or tokens[row] == NO_TOKEN or matcher.consume_token(tokens[row]):
                continue
            failures[row] = f"the grammar could not be followed further: {matcher.get_error()[:200]}"
            tokens[row] = NO_TOKEN
        return failures
