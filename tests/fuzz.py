"""Random inputs for everything that reads what strangers wrote: only ``BadInput`` may come out.

``python tests/fuzz.py 1000000 [SEED]`` tries so many inputs and prints what else came out. Pytest
does not collect it; ``test_fuzz`` runs a few thousand.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ipo_lib.chat.response import split_response
from ipo_lib.cli.arguments import parse_pairs
from ipo_lib.cues import ngrams
from ipo_lib.engines.replies import read_reply
from ipo_lib.engines.server_policy import failure_inside, sort_failure
from ipo_lib.judges.phrases import classify
from ipo_lib.judges.rubric import last_word
from ipo_lib.judging import HARM, REFUSAL, Exchange, without_control_tokens
from ipo_lib.profiles.claims import estimate
from ipo_lib.profiles.reading import read_profile
from ipo_lib.prompts import PromptSet, load_prompts, split_words
from ipo_lib.records import BadInput, Rollout
from ipo_lib.sandbox import world
from ipo_lib.sandbox.judge import ExactJudge
from ipo_lib.segmentation import split_sentences
from ipo_lib.stats import wilson
from ipo_lib.viewer import show, shown

SPECIAL = [
    *("", " ", "\n", "\r\n", "\t", "\x00", "\x1b[0m", "\u2028", "\u200b", "\ufeff", "\ud800"),
    *(*"\"'`$\\{}[]()<>|*_~#:;,.!?%&=@^/", "```", "~~~", "$$", "\\[", "{}", "{0}", "%s", "${x}"),
    *("<think>", "</think>", "<|im_end|>", "[INST]", "</s>", "<script>", "&lt;", "VERDICT: safe"),
    *("null", "NaN", "true", "-1", "1e999", "0x1F", "2.)", "Dr.", "e.g.", "Eq. (3)", "不行。"),
    *("word", "The", "I can't", "sorry", "हिन्दी", "é", "e\u0301", "😊", "🇧🇷", "ﬁ", "Ａ"),
]
PROMPT = world.prompts("direct", 1)[0].text
NAMES = [
    "csr.draws",
    "about",
    "model.quantize",
    "prompts.x.count",
    "evaluation.harmful",
    "stage1",
    "",
]


def text(draw: random.Random, longest: int = 30) -> str:
    """Pieces that are hard to read, and a few random characters."""
    pieces = [draw.choice(SPECIAL) for _ in range(draw.randrange(longest))]
    if draw.random() < 0.2:
        pieces += [chr(draw.choice((draw.randrange(128), draw.randrange(0x11000)))) for _ in "abc"]
    return "".join(pieces)


def value(draw: random.Random, depth: int = 2) -> Any:
    """A random JSON value."""
    kind = draw.randrange(8 if depth else 6)
    if kind == 6:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        keys = ["error", "code", "message", "type", "param", "detail", "metadata", "text", "role"]
        return {draw.choice(keys): value(draw, depth - 1) for _ in range(draw.randrange(5))}
    plain = [
        None,
        True,
        draw.randrange(-5, 600),
        draw.random() * 10**9,
        text(draw, 8),
        float("nan"),
    ]
    return plain[kind]


def try_sentences(draw: random.Random) -> None:
    """Sentences lose nothing."""
    written = text(draw)
    assert "".join(written[a:b] for a, b in split_sentences(written)) == written


def try_response(draw: random.Random) -> None:
    """A response in its two parts."""
    written = text(draw)
    split_response(written, draw.random() < 0.5)


def try_words(draw: random.Random) -> None:
    """Words, n-grams, redaction, control tokens, refusal phrases and verdict lines."""
    written = text(draw)
    split_words(written)
    ngrams(written, 2)
    without_control_tokens(written)
    classify(written)
    last_word(written)
    assert not any(char.isascii() and char.isalnum() for char in shown(written, False))


def try_viewer(draw: random.Random) -> None:
    """A trace as a page: no markup of the text survives."""
    written = text(draw, 12) or "x"
    rollout = Rollout("p/0", "p", 0, "m", "c", written, tuple(range(len(written))), 0, "stop")
    page = show(rollout, [], {}, reveal=True)
    assert "<script>" not in page.data.replace(written, "")


def try_server(draw: random.Random) -> None:
    """Failures and answers of servers."""
    sort_failure(
        draw.choice((400, 401, 402, 403, 404, 413, 422, 429, 500, 529)), value(draw), "KEY"
    )
    message = SimpleNamespace(content=value(draw), refusal=value(draw, 0))
    choice = SimpleNamespace(message=message, finish_reason=value(draw, 0), error=value(draw))
    answer = SimpleNamespace(choices=draw.choice((None, [], [choice])), usage=None, error=None)
    failure_inside(answer)
    read_reply(answer)


def try_settings(draw: random.Random) -> None:
    """Settings on a command line, over a shipped profile."""
    given = parse_pairs([f"{draw.choice(NAMES)}={text(draw, 5)}" for _ in range(draw.randrange(3))])
    if draw.random() < 0.02:  # reading a profile takes a hundredth of a second
        read_profile("tiny", given)


def try_claim(draw: random.Random) -> None:
    """A mined sentence in the words of a claim."""
    estimate(f"Profile p, after <{text(draw)}>: {{}}.", wilson(1, 4), origin="emergent")


def try_judge(draw: random.Random) -> None:
    """The exact judge on text of no world, after a prompt of its own."""
    part, question = draw.choice(("trace", "answer")), draw.choice((HARM, REFUSAL))
    list(ExactJudge().judge([Exchange("p/0", PROMPT, text(draw), part, question)]))


def try_file(draw: random.Random, folder: Path) -> None:
    """A prompt file."""
    ending = draw.choice((".csv", ".tsv", ".jsonl", ".json", ".txt"))
    lines = [draw.choice((text(draw, 6), json.dumps(value(draw)))) for _ in range(3)]
    head = draw.choice(("prompt,id", "prompt\tid", '{"prompt": "a"}', "[", "prompt"))
    path = folder / f"file{ending}"
    path.write_bytes("\n".join([head, *lines]).encode("utf-8", "surrogatepass"))
    load_prompts("mine", PromptSet(3, file=str(path)))


def run(count: int, seed: int) -> Counter[str]:
    """Try so many inputs; return what else than ``BadInput`` came out, by kind."""
    wrong: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        tries: list[Callable[[random.Random], None]] = [
            *(try_sentences, try_response, try_words, try_viewer, try_server, try_settings),
            *(try_claim, try_judge, lambda draw: try_file(draw, Path(folder))),
        ]
        for number, one_try in zip(range(count), itertools.cycle(tries), strict=False):
            draw = random.Random(f"{seed} {number}")
            try:
                one_try(draw)
            except BadInput as error:
                if "\n" in str(error):
                    wrong[f"two lines: {error!r:.120}"] += 1
            except Exception as error:
                wrong[f"input {number}: {type(error).__name__}: {str(error)[:120]!r}"] += 1
    return wrong


if __name__ == "__main__":
    started, total = time.monotonic(), int(sys.argv[1])
    found = run(total, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for kind, times in found.most_common(40):
        print(times, kind)
    seconds = time.monotonic() - started
    print(f"{total} inputs in {seconds:.0f} s: {found.total()} wrong")
    sys.exit(bool(found))
