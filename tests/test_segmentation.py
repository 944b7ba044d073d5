"""The splitter loses nothing, cuts nothing protected, and agrees with boundaries set by hand."""

from __future__ import annotations

import hashlib
import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
from data_kit import KIT, NO_KIT
from hypothesis import given, settings
from hypothesis import strategies as st

from ipo_lib.records import BadInput, Sentence
from ipo_lib.segmentation import locate_sentences, split_sentences

MARKS = json.loads((Path(__file__).parent / "boundaries.json").read_text())
F1_FLOOR = 0.95

# Pieces of text that are hard to split: end marks, code and TeX, words before a full stop.
END_MARKS = [" ", "\n", "\n\n", "\t", "\r\n", "\u2028", *'.:;"”()[]…。', "...", "?!"]
CODE = ["`", "```", "```\n", "$", "$$", "\\[", "\\]", "\\(", "\\)", "\\$", "\\"]
LIST_MARKS = ["*", "**", "#", "- ", "1.", "(a)"]
WORDS = ["Dr", "e.g", "U.S", "A", "I", "The", "word", "3.14", "é", "好", "😊"]
OTHERS = ["<think>", "</think>", "\x00", "\ud800"]
PIECES = [*END_MARKS, *CODE, *LIST_MARKS, *WORDS, *OTHERS]
nasty = st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=80)


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


@settings(max_examples=600, deadline=None)
@given(nasty)
def test_lossless(text: str) -> None:
    spans = split_sentences(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
    for (_, end), (start, _) in pairwise(spans):
        assert end == start
        assert text[start] != "\n"  # newlines stay left ...
        assert text[end - 1] not in " \t"  # ... spaces go right


def test_empty() -> None:
    assert split_sentences("") == []
    assert locate_sentences("", [0]) == []


@pytest.mark.parametrize(
    "marked",
    [
        "Dr. Smith met Mr. Jones, e.g. in v1.2.3.| It was 3.14 then.| So... maybe not.| Hmm...| "
        "The end.",
        "At 5 p.m. on Monday, cf. Foo.| At 5 p.m.| The U.S. Army met J. K. Rowling and "
        "John F. Kennedy Jr. there.",
        "Apples, etc.| But pears.| Acme Inc. Holdings fell.| See No. 5 and Fig. 3.| No.| "
        "That is it.",
        "See https://a.b/c?d=1.2 and a.b.c.| Next.| He paid $5 in May.| They paid $6.50.| Done.",
        "Use `a. B` now.| Then $x = 3. Y$ holds.| Also \\(f. G\\) and $$a. B$$.| So.",
        "We get\n|\\[ a. B\nC! \\\\[2pt] D. E\n\\]\nwhere x is small.| Then.",
        "Run this:\n|```py\nx = 1. \n\n# Y! Z\n```\n|Done.| Right.",
        "An open fence:\n|```py\n|One. |Two.".replace("One. |", "One.| "),
        'He asked, "Is it?"| The man left.| "Really?" and so on.| She said "No.| I won\'t."| Then.',
        "Fine (see A. B).| Next (What?) Paul went.| Whole.| (A full one. Really.)| After.[1]| "
        "More.",
        "First:\n|1. Foo bar.| Baz.\n|2.\nQux\n|- lone\n\n|### 3. Title\n|"
        "   - **5**: Five things.| Six.\n|(a) Go.",
        "Step 1. Check it.| **2.** Do it.| **Bold.**| *It.*| Next",
        "A line that is\nwrapped softly.| Next\n|# head\n|lower,\n|Upper",
        "<think>\n|Okay.| </think>\n\n|Answer.| Bye| </think>| x",
        "\n\n Foo.  \n \n|Bar? |Baz".replace("? |", "?| "),
        "i see. so it is, approx. five. ok.".replace("see.", "see.|").replace("five.", "five.|"),
        "他说。|好的！|“是吗？”|然后。\n|Ok. Ω.".replace("Ok.", "Ok.|"),
        "No cut: this; that, Node.js 3. v",
    ],
)
def test_cases(marked: str) -> None:
    assert cut(marked.replace("|", "")) == marked.split("|")


RULES = """
A kettle boiled.| The cat slept.
Is it late?| The shop is shut.
Look there!!| A kite!?| It flies.
Our baker is Anna K. Holm.
Turn to p. 31.| Then rest.
See Eq. (7) for the sum.| It is small.
As Fig. [3] shows, it falls.| See pp. [12-19], too.
Read Sec. 2.1.| It is short.
Vol. 4 is lost.| Ch. 9 is not.
It stands under N°. 12.| Look there.
In Baker v. Miller they settled.| In Stone v. Reed they did not.
The speed is v.| Then it doubles.
The mill sold to Reed & Sons Ltd. in May.
It was built by Hall & Co.| It stands empty.
We climbed Mt. Storm and St. Olaf's hill.
She moved to the U.K. last spring.| Why not the E.U.?| Who knows.
At 7 a.m. Mrs. Holm woke.| At 9 p.m. she slept.
It weighs 2.50 kg.| The price is $4.75.| Pay it.
He fixed the roof (it had leaked for years.) and went home.
Write to a.holm@mail.example.org.| Or see www.example.org/a.b.html.| Thanks.
He said, "It rains." and left.
He said, "It rains."| She looked up.
It is known.[4]| It was shown before.[5, 6]
They waited....| Nobody came.
So it ... fell, I think.
1.) Boil the water| 2.) Add the tea| 3.) Wait
1. Boil the water.| 2. Add the tea.
We set a = 1. b = 2 follows.
Use ``x. Y`` twice.| Then stop.
Run `a. B` once.| Then stop.
外面下雨了。|我们在家吧！|好吗？|好。
他问：“现在几点？”|没人知道。
他在读《灯灭了！谁来？》这本书。|你读过吗？
灯灭了。|（没人看见。）|他走了。
门开了（真的！我听见了），风很大。|雪来了。
书名是《灯灭了。|没有写完。
水温是3.5度。|真的？！|对。
第一步：1.烧水。|2.放茶。
雨が降る。|傘を持つ。
बारिश हो रही है।| घर चलो।
هل وصلت؟| نعم وصلت.
"""


@pytest.mark.parametrize("marked", RULES.strip().splitlines())
def test_rules_of_sentences(marked: str) -> None:
    sentences = [sentence.strip() for sentence in cut(marked.replace("|", ""))]
    assert sentences == [sentence.strip() for sentence in marked.split("|")]


FENCES = ["````\n```\na. B\n```\nc. D\n````", "~~~\na = 1. B\nc. D\n~~~", "```\na. B\n\nC. D\n```"]


@pytest.mark.parametrize("code", FENCES)
def test_no_sentence_ends_inside_a_fence(code: str) -> None:
    assert cut(f"Run:\n{code}\nDone.") == ["Run:\n", f"{code}\n", "Done."]


@pytest.mark.parametrize(
    "unit",
    [
        "!",
        "! ",
        "(a",
        "(()",
        "```a ",
        "`` ",
        "$a ",
        "\\[",
        "\\(\\",
        "\\[\\",
        "\\(",
        "\n ",
        "1. ",
        "e.g. A ",
        ".)",
        "a (X.) B ",
        "。 ",
    ],
)
def test_time_is_linear(unit: str) -> None:
    began = time.process_time()
    split_sentences(unit * 40_000 + " " * 40_000)
    assert time.process_time() - began < 2  # the square of 40,000 steps takes minutes


@st.composite
def tokenised(draw: st.DrawFn) -> tuple[str, list[int], int, int]:
    """A text, offsets of random tokens (empty ones too: byte fragments), and a region."""
    text = draw(nasty)
    place = st.integers(0, len(text))
    offsets = [0, *sorted(draw(st.lists(place, max_size=60))), len(text)]
    start, end = sorted((draw(place), draw(place)))
    return text, offsets, *draw(st.sampled_from([(start, end), (0, len(text))]))


@settings(max_examples=600, deadline=None)
@given(tokenised())
def test_token_spans(drawn: tuple[str, list[int], int, int]) -> None:
    text, offsets, start, end = drawn
    found = locate_sentences(text, offsets, start, end)
    held = {}
    for sentence in found:
        assert sentence.token_start < sentence.token_end
        held |= dict.fromkeys(range(sentence.token_start, sentence.token_end), sentence)
    assert [sentence.index for sentence in found] == list(range(len(found)))
    if found:  # contiguous and covering, in characters and in tokens
        assert (found[0].char_start, found[-1].char_end) == (start, end)
        assert all(
            a.char_end == b.char_start and a.token_end == b.token_start for a, b in pairwise(found)
        )
    for token in range(len(offsets) - 1):
        piece = text[offsets[token] : offsets[token + 1]]
        first = offsets[token] + (len(piece) - len(piece.lstrip()) if piece.strip() else 0)
        if start <= first < end or (first == end == len(text) and start < end and token in held):
            owner = held[token]
            assert owner.char_start <= min(first, end - 1) < owner.char_end
        else:
            assert token not in held


def test_tokens_by_hand() -> None:
    pieces = ["Hi", ".", " ", "", "", "Ünd", " so", ".\n", "\n", "A", "? B", "!"]
    text, offsets = "".join(pieces), [0]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    found = locate_sentences(text, offsets)
    # " B!" begins inside the token "? B", which is the third sentence's; "!" is the fourth's.
    assert [(text[s.char_start : s.char_end], s.token_start, s.token_end) for s in found] == [
        *(("Hi.", 0, 2), (" Ünd so.\n\n", 2, 9), ("A?", 9, 11), (" B!", 11, 12))
    ]
    # Two sentences in one token: the second has none of its own and joins the first.
    assert locate_sentences("A? B", [0, 4]) == [Sentence(0, 0, 4, 0, 1)]
    assert locate_sentences(text, offsets, 3, 10)[0].token_start == 2


@pytest.mark.parametrize(
    ("offsets", "region"),
    [([], (0, 2)), ([0, 1], (0, 2)), ([1, 2], (0, 2)), ([0, 2], (0, 3)), ([0, 2], (2, 1))],
)
def test_bad_input(offsets: list[int], region: tuple[int, int]) -> None:
    with pytest.raises(BadInput, match="must"):
        locate_sentences("ab", offsets, *region)


def test_marks_hold_no_text() -> None:
    assert all(
        set(one) == {"row", "part", "half", "start", "end", "offsets"} for one in MARKS["excerpts"]
    )
    rows = {
        half: {one["row"] for one in MARKS["excerpts"] if one["half"] == half}
        for half in ("tune", "score")
    }
    assert not rows["tune"] & rows["score"]
    assert all(
        sum(len(one["offsets"]) for one in MARKS["excerpts"] if one["half"] == half) >= 150
        for half in rows
    )


@pytest.mark.skipif(not KIT, reason=NO_KIT)
@pytest.mark.parametrize("half", ["tune", "score"])
def test_agrees_with_the_marks(half: str) -> None:
    assert KIT
    data = (KIT / "train/star1.jsonl").read_bytes()
    assert hashlib.sha256(data).hexdigest() == MARKS["sha256"], "the marks were made on other bytes"
    texts = {row["id"]: row["response"] for row in map(json.loads, data.splitlines())}
    hits = extra = missed = 0
    for one in MARKS["excerpts"]:
        if one["half"] == half:
            found = {
                start
                for start, _ in split_sentences(texts[one["row"]])
                if one["start"] < start < one["end"]
            }
            hits += len(found & set(one["offsets"]))
            extra += len(found - set(one["offsets"]))
            missed += len(set(one["offsets"]) - found)
    assert 2 * hits / (2 * hits + extra + missed) >= F1_FLOOR, (
        f"{hits} right, {extra} spurious, {missed} missed"
    )
