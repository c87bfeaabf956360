"""Grammars in the engine: which tokens may come next, for the requests that have one.

Shape suffixes: S rows that sample this step, L rows with a grammar, V vocabulary, W 32-bit words of a mask.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from benthic.errors import AdmissionError
from benthic.kernels.reference.sampling import NO_TOKEN
from benthic.serve.transit import to_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor


logger = logging.getLogger("benthic.serve.engine")


class Grammars:
    """Compiles grammars against one vocabulary, which is read by `warm_up`, or when the first grammar comes.

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

    def warm_up(self) -> None:
        """Read the vocabulary now: 129,280 tokens take a second, for which nobody's tokens should wait."""
        try:
            self._read()
        except AdmissionError as error:
            logger.warning("requests with structured output will be refused: %s", error)

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

    @property
    def any(self) -> bool:
        """Whether some request has a grammar."""
        return bool(self._matchers)

    def apply(self, logits_SV: Tensor, request_ids: Sequence[str]) -> dict[int, LLMatcher]:
        """Set to minus infinity, in place, what the grammars do not allow next; return those by row.

        Cost: about 50 us a row on the host, then one gather and one scatter of the rows with a grammar.
        """
        found = {row: self._matchers[each] for row, each in enumerate(request_ids) if each in self._matchers}
        if not found:
            return found
        masks = [matcher.compute_bitmask() for matcher in found.values()]
        words_LW = np.frombuffer(b"".join(masks), dtype=np.int32).reshape(len(found), -1)
        word_LW = to_device(words_LW.copy(), logits_SV.device)
        allowed_LV = ((word_LW.unsqueeze(-1) >> self._bit_32) & 1).bool().flatten(1)[:, : logits_SV.shape[1]]
        row_L = to_device(np.array(list(found), dtype=np.int64), logits_SV.device)
        logits_SV[row_L] = logits_SV[row_L].masked_fill(~allowed_LV, -torch.inf)
        return found


def accept(following: Mapping[int, LLMatcher], tokens: list[int]) -> dict[int, str]:
    """Move every grammar past its row's token; what went wrong by row, whose token becomes `NO_TOKEN`."""
    failures: dict[int, str] = {}
    for row, matcher in following.items():
        if tokens[row] == NO_TOKEN or matcher.consume_token(tokens[row]):
            continue
        failures[row] = f"the grammar could not be followed further: {matcher.get_error()[:200]}"
        tokens[row] = NO_TOKEN
    return failures
