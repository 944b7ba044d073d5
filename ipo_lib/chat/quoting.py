"""Texts in which control tokens are ordinary text: what a user or a model wrote, quoted to a judge.

A *control token* has a meaning for the model: it ends a turn, or opens a trace. A text that spells
one out must not act as one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from ipo_lib.records import Ids

BRACKETED = re.compile(r"[<\[].*[>\]]", re.DOTALL)  # other added tokens are mere words or spaces


class QuotingEncoder:
    """Encodes a text in pieces, some of which are quoted."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def has_control_tokens(self, text: str) -> bool:
        """Whether a text spells out a control token."""
        return bool(self._pattern.search(text))

    def break_control_tokens(self, text: str) -> str:
        """The text with a space after the first character of each control token."""
        return self._pattern.sub(_with_space, text)

    def encode(self, pieces: Sequence[tuple[str, bool]]) -> Ids:
        """The ids of a text; in its quoted pieces (True) control tokens are ordinary text."""
        ids: list[int] = []
        ordinary = ""  # text without control tokens that is not encoded yet
        for text, quoted in pieces:
            position = 0
            for token, start, end in [] if quoted else self._find_control_tokens(text):
                ids.extend(self._encode_ordinary(ordinary + text[position:start]))
                ids.append(token)
                ordinary = ""
                position = end
            ordinary += text[position:]
        return (*ids, *self._encode_ordinary(ordinary))

    def _find_control_tokens(self, text: str) -> list[tuple[int, int, int]]:
        """The control tokens in a text: id, first character, and the one after the last."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._control_tokens:
                tokens.append((token, start, end))
        return tokens

    def _encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which nothing is a control token."""
        # The tokenizer's option covers special tokens alone; others are cut after a character.
        cuts = [match.start() + 1 for match in self._unmarked_pattern.finditer(text)]
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self._ordinary_tokenizer.encode(text[start:end], add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def _control_tokens(self) -> dict[int, Any]:
        """By id, the special tokens of the vocabulary and others in angle or square brackets."""
        control_tokens = {}
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            if added.special or BRACKETED.fullmatch(added.content):
                control_tokens[token] = added
        return control_tokens

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Matches a control token."""
        return _any_of([added.content for added in self._control_tokens.values()])

    @functools.cached_property
    def _unmarked_pattern(self) -> re.Pattern[str]:
        """Matches a control token not marked as special, such as a tag of reasoning."""
        unmarked = [added for added in self._control_tokens.values() if not added.special]
        return _any_of([added.content for added in unmarked])

    @functools.cached_property
    def _ordinary_tokenizer(self) -> Any:
        """The same tokenizer, for which special tokens are ordinary text."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """A pattern for any of these texts, the longest first; without texts it matches nothing."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _with_space(match: re.Match[str]) -> str:
    return f"{match[0][0]} {match[0][1:]}"
