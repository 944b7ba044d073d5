"""The two parts of a response: the reasoning trace, and the answer after ``</think>``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ipo_lib.records import ANSWER, BOTH, CONTINUATION, TRACE, BadInput, Rollout

OPEN, CLOSE = "<think>", "</think>"
DOUBLED = "doubled"  # a tag occurs twice
PREAMBLE = "preamble"  # text before <think>
UNOPENED = "unopened"  # </think> without <think>

Span = tuple[int, int]  # first character, and the one after the last


@dataclass(frozen=True)
class Parts:
    """Where trace and answer of a response are, as character spans."""

    reasoning: Span | None  # None: there is nothing to read
    answer: Span | None
    closed: bool  # no trace is left open
    flags: tuple[str, ...] = ()  # DOUBLED, PREAMBLE, UNOPENED


def split_response(text: str, opened: bool) -> Parts:
    """Split a response at the first ``</think>``; ``opened``: its prompt ends in an open trace."""
    head, close, tail = text.partition(CLOSE)
    before, tag, inside = head.partition(OPEN)
    if not (opened or tag or close):  # no trace at all
        return Parts(None, _readable(text, 0, len(text)), closed=True)
    # <think> begins the trace, unless the prompt has opened one and text of it came before.
    starts_at_tag = tag and not (opened and before.strip())
    start = len(head) - len(inside) if starts_at_tag else 0
    flags = []
    if text.count(OPEN) + opened > 1 or text.count(CLOSE) > 1:
        flags.append(DOUBLED)
    if not opened and tag and before.strip():
        flags.append(PREAMBLE)
    if close and not (opened or tag):
        flags.append(UNOPENED)
    return Parts(
        reasoning=_readable(text, start, len(head)),
        answer=_readable(text, len(text) - len(tail), len(text)),
        closed=bool(close),
        flags=tuple(flags),
    )


def _readable(text: str, start: int, end: int) -> Span | None:
    """The span, or None where it holds only white space."""
    return (start, end) if text[start:end].strip() else None


def part_text(rollout: Rollout, part: str, opened: bool, offsets: Sequence[int] = ()) -> str | None:
    """The text of a part without tags, as a judge reads it; None where there is none.

    Args:
        rollout: the response.
        part: TRACE, ANSWER, BOTH (None without an answer), or CONTINUATION (what follows the
            prefix that was given).
        opened: whether the prompt ends in an open trace.
        offsets: of the tokens in the text (``Chat.offsets``); only CONTINUATION needs them.
    """
    if part == CONTINUATION:
        start = offsets[rollout.prefix_len] if rollout.prefix_len else 0
        return rollout.text[start:].strip() or None
    if part not in (TRACE, ANSWER, BOTH):
        choices = f"{TRACE}, {ANSWER}, {BOTH} or {CONTINUATION}"
        raise BadInput(f"part {part!r}: choose {choices}")
    parts = split_response(rollout.text, opened)
    trace = _stripped(rollout.text, parts.reasoning)
    answer = _stripped(rollout.text, parts.answer)
    if part == TRACE:
        return trace or None
    if part == ANSWER or not answer:
        return answer or None
    return f"{trace}\n\n{answer}".strip()


def _stripped(text: str, span: Span | None) -> str:
    return text[slice(*span)].strip() if span else ""


def is_cut_off(rollout: Rollout, part: str, opened: bool) -> bool:
    """Whether a part ended before the model ended it: what it would have become is not known.

    A trace is whole when it was closed; an answer when the response ended; a continuation when
    either did. Where the model writes no trace at all, the response stands for both parts.
    """
    if rollout.finish == "length" and part in (ANSWER, BOTH, CONTINUATION):
        return True
    if part != TRACE or rollout.finish == "think" or CLOSE in rollout.text:
        return False
    has_trace = opened or OPEN in rollout.text
    return has_trace or rollout.finish == "length"
