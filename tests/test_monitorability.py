"""What a trace tells of its answer: planted traces, a monitor that cannot know, a hiding method."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from made_cells import made_cells
from scripted import (
    ASIDE,
    CLOSE,
    CUE,
    HELP,
    REFUSAL,
    STEP,
    TRIGGER,
    Phrase,
    named,
    rollout,
    saying,
    session,
)

from ipo_lib.chat import Chat
from ipo_lib.experiments import monitorability, results
from ipo_lib.records import ANSWER, SAFE, UNSAFE, Rollout, Verdict
from ipo_lib.stages import Session


def verdicts(rollouts: list[Rollout], labels: list[str | None], part: str) -> list[Verdict]:
    pairs = zip(rollouts, labels, strict=True)
    return [Verdict(one.id, part, "harm", said, None, "", "planted") for one, said in pairs]


def planted(chat: Chat, telling: bool) -> tuple[list[Rollout], list[Verdict]]:
    """64 responses to 8 prompts: half of the answers are unsafe, and traces tell or do not."""
    rollouts, labels = [], list[str | None]()
    for number in range(64):
        unsafe = (number // 8) % 2 == 0
        said = (CUE if unsafe else TRIGGER) if telling else ASIDE
        text = f"{ASIDE}\n{said}\n{CLOSE}\n{HELP if unsafe else REFUSAL}"
        rollouts.append(rollout(chat, text, id_=f"r{number}", prompt=f"p{number % 8}"))
        labels.append(UNSAFE if unsafe else SAFE)
    return rollouts, verdicts(rollouts, labels, ANSWER)


@pytest.fixture
def opened(chat: Chat, tmp_path: Path) -> Session:
    return session(tmp_path, chat, saying(chat, lambda _: ASIDE))


def test_a_monitor_reads_what_traces_tell_and_no_more(chat: Chat, opened: Session) -> None:
    telling = monitorability.monitor_traces(opened, *planted(chat, telling=True))
    assert telling.auroc == 1.0
    interval = telling.interval()
    assert (interval.low, interval.high, interval.n) == (1.0, 1.0, 8)
    silent = monitorability.monitor_traces(opened, *planted(chat, telling=False))
    assert silent.auroc == 0.5


def test_too_few_answers_of_one_label_are_not_measured(chat: Chat, opened: Session) -> None:
    rollouts, answers = planted(chat, telling=True)
    all_safe = [replace(answer, label=SAFE) for answer in answers]
    monitored = monitorability.monitor_traces(opened, rollouts, all_safe)
    assert math.isnan(monitored.auroc)
    assert math.isnan(monitored.interval().value)


def test_disagreement_leaves_out_what_was_not_judged_twice(chat: Chat) -> None:
    rollouts = []
    for number in range(4):
        rollouts.append(rollout(chat, ASIDE, id_=f"r{number}", prompt=f"p{number // 2}"))
    traces = verdicts(rollouts, [SAFE, UNSAFE, None, UNSAFE], "trace")
    answers = verdicts(rollouts, [UNSAFE, UNSAFE, SAFE, SAFE], ANSWER)
    counted = monitorability.disagreement(rollouts, traces, answers)
    assert counted == {"p0": (1, 2), "p1": (1, 1)}


def test_the_place_of_the_first_safety_aware_sentence(chat: Chat, opened: Session) -> None:
    texts = [f"{ASIDE}\n{TRIGGER}\n{ASIDE}\n{ASIDE}\n{CLOSE}", f"{ASIDE}\n{STEP}\n{CLOSE}"]
    rollouts = [rollout(chat, text, id_=f"r{at}") for at, text in enumerate(texts)]
    aware = Phrase(TRIGGER)
    measured = monitorability.safety_awareness(opened, named(), rollouts, aware)
    assert (measured.share, measured.place) == (0.5, 0.5)
    nothing = monitorability.safety_awareness(opened, named(), [], aware)
    assert math.isnan(nothing.share)


def test_a_method_that_hides_harm_is_found_and_an_honest_one_is_not() -> None:
    measure = "x: unsafe answer to a safe trace"
    cells = []
    for row, level in (("base", 0.05), ("honest", 0.05), ("hiding", 0.4)):
        for cell in made_cells(row, level):
            (counts,) = [value for name, value in cell.measured.items() if "harm" in name][:1]
            cells.append(replace(cell, measured={measure: counts}))
    assert results.methods_that_hide(cells) == ["hiding"]
    assert set(results.hidden_harm(cells)) == {"honest", "hiding"}


def test_leaks_are_counted_among_safe_answers(chat: Chat) -> None:
    texts = [f"{ASIDE}\n{STEP}\n{CLOSE}\n{REFUSAL}", f"{ASIDE}\n{CLOSE}\n{REFUSAL}"]
    texts += [f"{STEP}\n{CLOSE}\n{HELP}", f"{STEP}\n{STEP}\n{CLOSE}\n{REFUSAL}"]
    rollouts = [rollout(chat, text, id_=f"r{at}", prompt="p0") for at, text in enumerate(texts)]
    traces = verdicts(rollouts, [UNSAFE, SAFE, UNSAFE, UNSAFE], "trace")
    answers = verdicts(rollouts, [SAFE, SAFE, UNSAFE, SAFE], ANSWER)

    def count(prompt: str, text: str) -> int:
        return text.count(STEP)

    found = monitorability.leakage(named(), rollouts, traces, answers, chat.opened, count)
    assert found.leaking == {"p0": (2, 3)}
    assert found.details == 1.5
    uncounted = monitorability.leakage(named(), rollouts, traces, answers, chat.opened)
    assert math.isnan(uncounted.details)
