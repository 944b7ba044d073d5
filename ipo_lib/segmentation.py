"""Sentences of a trace: lossless character spans, and token spans by the offsets of the tokens. CSR (Eq. 1) is counted
at sentence ends and a sentence is replaced (section 3.3), so it is a span, never a string: newlines stay left and
spaces go right, which keeps cuts off the inside of usual tokens. ``CANDIDATE`` finds where a sentence may end,
``PROTECTED`` the spans it may not end in; the word before and the character after decide. Every pattern is linear in
the text: a run is entered at its first character only, and a bracket is given up at the next one of its kind."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from ipo_lib.records import BadInput, Sentence

PROTECTED = re.compile(
    r"""(?<!`)`{3,}+.*?`{3,}+                       # code fence; an unclosed one is plain lines
      | (?<!`)`[^`\n]++`                            # inline code
      | \\\$                                        # an escaped dollar opens nothing
      | \$\$[^$]++\$\$ | \$(?=\S)[^$\n]++(?<=\S)\$(?!\d)    # TeX by dollars; "$5 and $10" is money
      | (?<!\\)\\\[(?:[^\\]|\\[^\[\]])*+\\\] | (?<!\\)\\\((?:[^\\]|\\[^()])*+\\\)
      | \((?:[^()\n]++|\([^()\n]*+\))*+\) | \[[^\[\]\n]*+\]""",
    re.VERBOSE | re.DOTALL,
)
CANDIDATE = re.compile(
    r"""(?P<stop>(?<![.!?…؟।])[.!?…؟।]++(?:["'”’»)\]}*_$]|\\[)\]]|\[\d+\])*+)(?=[^\S\n]+(?P<next>\S))
      | (?P<wide>(?<![。！？])[。！？]++[”’」』）》"')\]]*+)(?!\s*\n)   # Chinese and Japanese put no space
      | (?P<line>\n(?:\s*\n)?)
      | (?P<tag></?think>(?:\s*\n)?)""",
    re.VERBOSE,
)
# What alone is no sentence: blank, a bullet, heading or quotation sign, "1.", "(a)", "**2.**", "Step 3:".
MARKER = re.compile(
    r"""[\s\#>*_+•–-]*+(?:(?:Step|Part|Case|Option|Question|Phase|Rule|Point)\s)?
        (?:\(?(?:\d{1,3}(?:\.\d{1,2})*|[A-Za-z]|[ivxIVX]{2,5})[.):]++)?[*_]*\s*""",
    re.VERBOSE,
)
MARKER_LENGTH = 40  # a longer stretch is not looked at, so that no text is read twice
WORD_LENGTH = 32  # how far back the word before a full stop and its neighbour are looked for
GOES_ON = frozenset(
    ",;:.!?)]}…=+%&|/–—-"
)  # after a full stop and a space these carry the sentence on
OPENERS = "\"'“‘«([{*_"
FULL_STOP, LINE_ENDS = ".", ".!?…:;。！？"
TITLES, BEFORE_NUMBER, MAY_END, BEFORE_LOWER = (
    frozenset(words.split())
    for words in (
        "mr mrs ms mx dr prof st mt gen sen rep gov capt cpt lt col sgt cmdr adm rev hon pres fr messrs "
        "e.g eg i.e ie cf vs viz approx esp incl resp ca",  # never the last word
        "no nos fig figs eq sec art vol ch pp p pt ed jan feb mar apr jun jul aug sep sept oct nov dec",
        "inc ltd corp co bros jr sr al ph.d dept est ave blvd",  # these may end one, as may initials, U.S. and p.m.
        "etc max min avg std misc tel temp",
    )
)
BEFORE_LOWER |= TITLES | BEFORE_NUMBER | MAY_END
INITIALS = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]|[A-Z]")
STARTER = re.compile(
    r"""["'“‘(*_]*(?:The|This|That|These|Those|It|He|She|They|We|You|I|There|Here|But|So|And|Or|Then|If|In|On|At|As|For|However
    |Also|Maybe|Perhaps|Now|Let|What|When|Where|Why|How|Who|Which|Since|Because|While|Although|Another|First|Second|Third|Finally
    |Next|Therefore|Thus|Hence|Wait|Hmm|Okay|Ok|Yes|No|Not|Instead|Is|Are|Do|Does|Can|Could|Should|Would|Will|My|Your|Our|Their
    |His|Her|Its|Alternatively|Actually|Additionally|Specifically|Given|Under|To|By|With|From|After|Before|Some|Many|Most|Both
    |Each|Even|Just|Still|Yet|Plus|Overall)\b""",
    re.VERBOSE,
)
CONTENT = re.compile(r"\S")


def split(text: str) -> list[tuple[int, int]]:
    """The sentences of any text as (start, end) character spans: contiguous, nonempty, together the whole text.
    A sentence owns the newlines after it and the spaces before it; list items, headings and think tags stand alone."""
    cuts, guard, guarded = [0], 0, [match.span() for match in PROTECTED.finditer(text)]
    for match in CANDIDATE.finditer(text):
        cut, last = match.end(), cuts[-1]
        while guard < len(guarded) and guarded[guard][1] <= cut:
            guard += 1
        if guard < len(guarded) and guarded[guard][0] < cut:
            continue
        if match["tag"]:
            blank = last + len(
                text[last : match.start()].rstrip(" \t")
            )  # spaces go right, with the tag
            cuts += [place for place in (blank, cut) if place > cuts[-1]]
        elif cut - last <= MARKER_LENGTH and MARKER.fullmatch(text, last, cut):
            continue
        elif match["wide"] or (match["line"] and not _wrapped(text, match, last)):
            cuts.append(cut)
        elif match["stop"]:
            held = guarded[guard - 1] if guard else (0, 0)
            aside = (
                held[0] <= match.start() < held[1]
                and text[held[0]] in "(["
                and CONTENT.search(text, last, held[0])
            )
            if not aside and _ends(text, match, last):
                cuts.append(cut)
    cuts += [len(text)] if cuts[-1] < len(text) else []
    return list(pairwise(cuts))


def sentences(
    text: str, offsets: Sequence[int], start: int = 0, end: int | None = None
) -> list[Sentence]:
    """The sentences of ``text[start:end]`` with their tokens; token i is ``text[offsets[i]:offsets[i + 1]]``. A token belongs to
    the sentence that holds its first non-space character; one of only whitespace to the sentence of its first character; one of
    no character (a byte fragment) to that of the next. Spans are contiguous and hold every token. A sentence that gets no token
    joins the one before (the first: the one after), so that no two cuts are equal. BadInput: offsets or region do not fit."""
    end = len(text) if end is None else end
    if not offsets or offsets[0] != 0 or offsets[-1] != len(text):
        raise BadInput(
            f"offsets {list(offsets[:1])}..{list(offsets[-1:])}: must run from 0 to the length {len(text)}"
        )
    if not 0 <= start <= end <= len(text):
        raise BadInput(f"region {start}:{end}: must lie within the text's 0:{len(text)}")
    found: list[Sentence] = []
    char, token = start, _first_token(text, offsets, start)
    for _, stop in split(text[start:end]):
        after = _first_token(text, offsets, start + stop)
        if after > token:
            found.append(Sentence(len(found), char, start + stop, token, after))
        elif found:
            found[-1] = Sentence(
                len(found) - 1, found[-1].char_start, start + stop, found[-1].token_start, token
            )
        else:
            continue
        char, token = start + stop, after
    return found


def _first_token(text: str, offsets: Sequence[int], place: int) -> int:
    """The first token whose first non-space character (else its first) is at ``place`` or later."""
    if place >= offsets[-1]:
        return len(offsets) - 1
    index = bisect_left(offsets, place)
    if offsets[index] > place and text[offsets[index - 1] : place].isspace():
        return index if text[place : offsets[index]].isspace() else index - 1
    return index


def _wrapped(text: str, match: re.Match[str], last: int) -> bool:
    """Whether the newline is a hard wrap: single, before lower case, after no heading, end mark or colon."""
    content = CONTENT.search(text, match.end())
    if match["line"] != "\n" or not content or not content[0].islower() or text[last] == "#":
        return False
    before = (
        text[max(last, match.start() - WORD_LENGTH) : match.start()].rstrip().rstrip("\"'”’»)]}*_")
    )
    return not before.endswith(tuple(LINE_ENDS))


def _ends(text: str, match: re.Match[str], last: int) -> bool:
    """Whether the sentence ends at these end marks, judged by what follows and, at a full stop, the word before."""
    follow, stop = match.start("next"), match.start()
    lower = (text[follow + 1 : follow + 2] if match["next"] in "([" else match["next"]).islower()
    if match["next"] in GOES_ON or (lower and match["stop"] != FULL_STOP):
        return False
    if match["stop"].rstrip("\"'”’»)]}*_$\\") != FULL_STOP:
        return True
    words = text[max(last, stop - WORD_LENGTH) : stop].split()
    word = words[-1].lstrip(OPENERS) if words else ""
    name = word.lower()
    if lower:  # writing without capitals: "i see. so it is"
        return len(word) > 1 and word.isalpha() and name not in BEFORE_LOWER
    if name in TITLES or name in BEFORE_NUMBER:
        return name not in TITLES and not match["next"].isdigit()
    variable = (
        len(words) > 1 and not words[-2][0].isupper() and text[follow + 1 : follow + 2] != FULL_STOP
    )  # "set A."
    initial = INITIALS.fullmatch(word) and not (len(word) == 1 and variable)
    return not (initial or name in MAY_END) or bool(STARTER.match(text, follow))
