r"""Sentences of a trace, as spans of characters and of tokens.

CSR is measured at sentence ends, and an intervention replaces a sentence. So a sentence is a span
of the text, never a copy of it, and the spans lose nothing:

1. ``CANDIDATE`` finds where a sentence may end: end marks, line breaks, think tags.
2. ``PROTECTED`` finds spans in which none ends: code, TeX, brackets.
3. At a full stop, the word before and the character after decide (``segmentation.yml``).
4. The newlines after a sentence belong to it, the spaces to the next one. So a cut seldom falls
   inside a token.
5. ``locate_sentences`` gives each sentence its tokens, by the offsets of the tokens.

All patterns run in linear time: a run is entered at its first character only, and a bracket is
given up at the next one of its kind.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import yaml

from ipo_lib.records import BadInput, Sentence

PROTECTED = re.compile(
    r"""(?<!`)(?P<fence>`{3,}+).*?(?<!`)(?P=fence)(?!`)    # code; an unclosed fence is plain lines
      | ^(?P<tilde>~{3,}+).*?^(?P=tilde)(?!~)
      | (?<!`)`(?!`)[^`\n]++`(?!`) | (?<!`)``(?!`)(?:[^`\n]|`(?!`))++``(?!`)    # inline code
      | \\\$                                        # an escaped dollar opens nothing
      | \$\$[^$]++\$\$ | \$(?=\S)[^$\n]++(?<=\S)\$(?!\d)    # TeX by dollars; "$5 and $10" is money
      | (?<!\\)\\\[(?:[^\\]|\\[^\[\]])*+\\\] | (?<!\\)\\\((?:[^\\]|\\[^()])*+\\\)
      | \((?:[^()\n]++|\([^()\n]*+\))*+\) | \[[^\[\]\n]*+\]
      | 《[^《》\n]*+》 | （[^（）\n]*+）                # Chinese titles and brackets""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
CANDIDATE = re.compile(
    r"""(?P<stop>(?<![.!?…؟।])[.!?…؟।]++(?:["'”’»)\]}*_$]|\\[)\]]|\[\d+\])*+)(?=[^\S\n]+(?P<next>\S))
      | (?P<wide>(?<![。！？])[。！？]++[”’」』）"')\]]*+)(?!\s*\n)  # no space follows
      | (?P<line>\n(?:\s*\n)?)
      | (?P<tag></?think>(?:\s*\n)?)""",
    re.VERBOSE,
)
# What alone is no sentence: blank, a bullet, heading or quotation sign, "1.", "(a)", "**2.**",
# "Step 3:".
MARKER = re.compile(
    r"""[\s\#>*_+•–-]*+(?:(?:Step|Part|Case|Option|Question|Phase|Rule|Point)\s)?
        (?:\(?(?:\d{1,3}(?:\.\d{1,2})*|[A-Za-z]|[ivxIVX]{2,5})[.):]++)?[*_]*\s*""",
    re.VERBOSE,
)
MARKER_LENGTH = 40  # no longer stretch is compared with MARKER, so that no text is read twice
WORD_LENGTH = 32  # the word before a full stop and its neighbour are looked for so far back
GOES_ON = frozenset(",;:.!?)]}…=+%&|/–—-")  # after a stop and a space: the sentence goes on
OPENERS = "\"'“‘«([{*_"
CLOSERS = "\"'”’»)]}*_"
FULL_STOP, LINE_ENDS = ".", ".!?…:;。！？"
ITEM = re.compile(r"(?<!\S)\d{1,3}$")  # the number of an item of a list inside a line
INITIALS = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]|[A-Z]")
CONTENT = re.compile(r"\S")

WORDS = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text("utf-8"))
TITLES = frozenset(WORDS["titles"].split())
BEFORE_NUMBER = frozenset(WORDS["before_number"].split())
MAY_END = frozenset(WORDS["may_end"].split())
BEFORE_LOWER = TITLES | BEFORE_NUMBER | MAY_END | set(WORDS["before_lower"].split())
STARTER = re.compile(rf"""["'“‘(*_]*(?:{"|".join(WORDS["starters"].split())})\b""")


def split_sentences(text: str) -> list[tuple[int, int]]:
    """The sentences of a text as (start, end) character spans, which together are the whole text.

    No span is empty. List items, headings and think tags are sentences of their own.
    """
    protected = [match.span() for match in PROTECTED.finditer(text)]
    passed = 0  # so many protected spans end before the candidate
    cuts = [0]
    for match in CANDIDATE.finditer(text):
        cut, last = match.end(), cuts[-1]
        while passed < len(protected) and protected[passed][1] <= cut:
            passed += 1
        if passed < len(protected) and protected[passed][0] < cut:
            continue  # inside a protected span
        if match["tag"]:
            # The spaces before a tag go to the right, with it.
            before_spaces = last + len(text[last : match.start()].rstrip(" \t"))
            cuts += [place for place in (before_spaces, cut) if place > last]
        elif cut - last <= MARKER_LENGTH and MARKER.fullmatch(text, last, cut):
            continue
        elif match["wide"] or (match["line"] and not _is_wrapped(text, match, last)):
            cuts.append(cut)
        elif match["stop"] == ".)" and (item := _item(text, match.start(), last)):
            cuts += [item] if item > last else []  # "2.)" begins its sentence
        elif match["stop"]:
            bracket = protected[passed - 1] if passed else (0, 0)
            if not _is_aside(text, match, last, bracket) and _ends_sentence(text, match, last):
                cuts.append(cut)
    if cuts[-1] < len(text):
        cuts.append(len(text))
    return list(pairwise(cuts))


def locate_sentences(
    text: str, offsets: Sequence[int], start: int = 0, end: int | None = None
) -> list[Sentence]:
    """The sentences of ``text[start:end]`` with their tokens.

    A token belongs to the sentence that holds its first non-space character. A token of whitespace
    belongs to the sentence of its first character, and an empty one (a byte fragment) to that of
    the next token. A sentence that gets no token joins the one before, the first the one after, so
    that no two cuts are equal.

    Args:
        text: the decoded tokens.
        offsets: token i is ``text[offsets[i]:offsets[i + 1]]``; one more than there are tokens.
        start: first character of the region.
        end: last character + 1; None: the end of the text.

    Raises:
        BadInput: offsets or region do not fit the text.
    """
    end = len(text) if end is None else end
    if not offsets or offsets[0] != 0 or offsets[-1] != len(text):
        raise BadInput(
            f"offsets {list(offsets[:1])}..{list(offsets[-1:])}: "
            f"must run from 0 to the length {len(text)}"
        )
    if not 0 <= start <= end <= len(text):
        raise BadInput(f"region {start}:{end}: must lie within the text's 0:{len(text)}")
    located: list[Sentence] = []
    char_start, token_start = start, _first_token(text, offsets, start)
    for _, stop in split_sentences(text[start:end]):
        char_end = start + stop
        token_end = _first_token(text, offsets, char_end)
        if token_end > token_start:
            index = len(located)
            located.append(Sentence(index, char_start, char_end, token_start, token_end))
        elif located:
            located[-1] = replace(located[-1], char_end=char_end)
        else:
            continue
        char_start, token_start = char_end, token_end
    return located


def _first_token(text: str, offsets: Sequence[int], place: int) -> int:
    """Index of the first token whose first non-space character (else its first) is not before."""
    if place >= offsets[-1]:
        return len(offsets) - 1
    index = bisect_left(offsets, place)
    if offsets[index] > place and text[offsets[index - 1] : place].isspace():
        return index if text[place : offsets[index]].isspace() else index - 1
    return index


def _is_wrapped(text: str, match: re.Match[str], last: int) -> bool:
    """Whether a newline only wraps a line.

    It does if it is single, lower case follows, and no heading, end mark or colon comes before.
    """
    content = CONTENT.search(text, match.end())
    if match["line"] != "\n" or not content or not content[0].islower() or text[last] == "#":
        return False
    before = text[max(last, match.start() - WORD_LENGTH) : match.start()]
    return not before.rstrip().rstrip(CLOSERS).endswith(tuple(LINE_ENDS))


def _item(text: str, stop: int, last: int) -> int | None:
    """Where the number of a list's item begins that ends at ``stop``; None: there is none."""
    item = ITEM.search(text, max(last, stop - 4), stop)
    return item and item.start()


def _is_aside(text: str, match: re.Match[str], last: int, bracket: tuple[int, int]) -> bool:
    """Whether the end mark stands in brackets after other words of the same sentence."""
    start, end = bracket
    if not start <= match.start() < end or text[start] not in "([":
        return False
    return CONTENT.search(text, last, start) is not None


def _ends_sentence(text: str, match: re.Match[str], last: int) -> bool:
    """Whether the sentence ends at these end marks."""
    # 1. By what follows.
    following, stop = match.start("next"), match.start()
    next_mark = match["next"]
    first_letter = text[following + 1 : following + 2] if next_mark in "([" else next_mark
    lower = first_letter.islower()
    if next_mark in GOES_ON or (lower and match["stop"] != FULL_STOP):
        return False
    if match["stop"].rstrip(CLOSERS + "$\\") != FULL_STOP:
        return True

    # 2. At a full stop, by the word before.
    words = text[max(last, stop - WORD_LENGTH) : stop].split()
    word = words[-1].lstrip(OPENERS) if words else ""
    name = word.lower()
    if lower:  # writing without capitals: "i see. so it is"
        return len(word) > 1 and word.isalpha() and name not in BEFORE_LOWER
    if name in TITLES or name in BEFORE_NUMBER:
        return name not in TITLES and not first_letter.isdigit()
    if name == "v" and len(words) > 1 and words[-2][0].isupper():  # a case: "Brown v. Board"
        return bool(STARTER.match(text, following))

    # 3. An initial ends a sentence only before a word that begins one; a variable may: "set A."
    after_word = len(words) > 1 and not words[-2][0].isupper()
    variable = len(word) == 1 and after_word and text[following + 1 : following + 2] != FULL_STOP
    initial = INITIALS.fullmatch(word) and not variable
    return not (initial or name in MAY_END) or bool(STARTER.match(text, following))
