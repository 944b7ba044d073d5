"""Judges against people's labels: counts by hand, clustered intervals, and the numbers that others have published."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from data_kit import KIT, NO_KIT

from ipo_lib.judges import people
from ipo_lib.judges.phrases import RefusalJudge
from ipo_lib.judging import Exchange, KeywordJudge
from ipo_lib.records import SAFE, UNSAFE, BadInput, Verdict
from ipo_lib.store import Store


class Says:
    """A judge that says of each answer what its text names; nothing of the others."""

    def fingerprint(self) -> dict[str, str]:
        return {"judge": "says"}

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        labels = [
            next((one for one in (UNSAFE, SAFE) if one in (e.text or "").split()), None)
            for e in exchanges
        ]
        return [
            Verdict(e.rollout_id, e.part, e.question, label, None, "", "says")
            for e, label in zip(exchanges, labels, strict=True)
        ]


def written(folder: Path, rows: list[tuple[str, str, int]]) -> None:
    (folder / "judge_val").mkdir()
    lines = [
        json.dumps({"id": prompt, "prompt": prompt, "response": text, "human_unsafe": human})
        for prompt, text, human in rows
    ]
    (folder / "judge_val/beavertails_30k_test_sample.jsonl").write_text("\n".join(lines))


def test_rates_kappa_and_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"u{at}", "unsafe" if at < 30 else "safe", 1) for at in range(40)] + [
        (f"s{at}", "safe" if at < 50 else "?", 0) for at in range(60)
    ]
    written(tmp_path, rows)
    monkeypatch.setenv("IPO_DATA", str(tmp_path))
    (found,) = people.report(
        {"says": Says(), "refusals only": RefusalJudge()}, ["beavertails"], Store(tmp_path / "s")
    )
    assert (found.judge, found.n, found.coverage) == ("says", 100, 0.9)
    assert (found.sensitivity.value, found.specificity.value) == (0.75, 1.0)
    chance = (40 / 90) * (30 / 90) + (50 / 90) * (60 / 90)
    assert found.kappa.value == pytest.approx((80 / 90 - chance) / (1 - chance))
    assert found.sensitivity.low < 0.75 < found.sensitivity.high
    assert found.kappa.low < found.kappa.value < found.kappa.high < 1


def test_answers_of_one_prompt_are_drawn_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [
        (f"{human}{at}", "unsafe" if at % 3 else "safe", human)
        for human in (0, 1)
        for at in range(60)
    ]
    wide = []
    for rows, name in (
        (alone, "alone"),
        ([(key[:-1], text, human) for key, text, human in alone], "together"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        written(folder, rows)
        monkeypatch.setenv("IPO_DATA", str(folder))
        wide.append(
            people.report({"says": Says()}, ["beavertails"], Store(tmp_path / "s"))[0].sensitivity
        )
    assert wide[0].n == 60
    assert wide[1].n == 6


def test_no_data_and_no_set_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IPO_DATA", raising=False)
    with pytest.raises(BadInput, match="set IPO_DATA to the folder that holds judge_val/harmbench"):
        people.load("harmbench")
    with pytest.raises(BadInput, match="'mine' is unknown; choose one of harmbench"):
        people.load("mine")


@pytest.mark.skipif(not KIT, reason=NO_KIT)
def test_published_judges_score_as_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kit's own table, computed when it was made: kappa of published judges on the same rows."""
    monkeypatch.setenv("IPO_DATA", os.fspath(KIT))
    found = {
        (one.judge, one.set): one
        for one in people.report(
            {"keyword": KeywordJudge()}, ["harmbench", "jbb-comparison"], Store(tmp_path)
        )
        if not one.category
    }
    harmbench = {"gpt-4-0613": 0.83, "cls": 0.82, "mixtral": 0.70, "llama_guard": 0.32}
    published = {(name, "harmbench"): value for name, value in harmbench.items()}
    jbb = {"llama3_cf": 0.82, "gpt4_cf": 0.80, "harmbench_cf": 0.59}
    published |= {(name, "jbb-comparison"): value for name, value in jbb.items()}
    assert {key: found[key].kappa.value for key in published} == pytest.approx(published, abs=0.006)
    assert (found["cls", "harmbench"].n, found["gpt4_cf", "jbb-comparison"].n) == (232, 153)


@pytest.mark.skipif(not KIT, reason=NO_KIT)
def test_refusal_phrases_beat_the_keywords_on_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPO_DATA", os.fspath(KIT))
    judges = {"keywords": KeywordJudge(), "phrases": RefusalJudge()}
    found = {
        one.judge: one
        for one in people.report(judges, ["xstest-held-out"], Store(tmp_path))
        if not one.category
    }
    assert found["phrases"].n == 547
    assert found["phrases"].kappa.value > found["keywords"].kappa.value
    assert found["phrases"].kappa.value > 0.5


def test_a_verdict_is_asked_for_once_and_a_failure_keeps_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, [(f"u{at}", "unsafe", 1) for at in range(10)] + [("s", "safe", 0)])
    monkeypatch.setenv("IPO_DATA", str(tmp_path))
    asked: list[str] = []

    class Breaks(Says):
        def judge(self, exchanges: Sequence[Exchange]) -> Iterator[Verdict]:  # type: ignore[override]
            for at, verdict in enumerate(Says().judge(exchanges)):
                if at == 4 and len(asked) == 4:
                    raise BadInput("gone")
                asked.append(verdict.rollout_id)
                yield verdict

    store = Store(tmp_path / "s")
    with pytest.raises(BadInput, match="gone"):
        people.report({"says": Breaks()}, ["beavertails"], store)
    (found,) = people.report({"says": Breaks()}, ["beavertails"], store)
    assert found.n == 11
    assert len(asked) == len(set(asked)) == 11
