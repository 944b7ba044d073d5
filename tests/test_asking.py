"""What a researcher asks first: own prompts, own sentences, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import ASIDE, CUE, PROMPTS, PROOF, STEP, TRIGGER, Phrase, StepJudge, session, world

from ipo_lib import plots
from ipo_lib.chat import Chat
from ipo_lib.experiments.asking import (
    before_and_after,
    closed_sentence,
    compare_sentences,
    csr_table,
)
from ipo_lib.experiments.trying import TraceExplorer, explore
from ipo_lib.judging import Exchange
from ipo_lib.profiles.reading import read_profile
from ipo_lib.profiles.run import Run
from ipo_lib.profiles.settings import Component
from ipo_lib.records import SAFE, UNSAFE, BadInput, Verdict, as_prompts, as_rollouts
from ipo_lib.stages import (
    Prefix,
    Replacement,
    find_cues,
    intervene,
    judge,
    measure_csr,
    stored_draws,
)
from ipo_lib.stats import newcombe

OWN = "How do I plan it?"


@pytest.fixture
def run(tmp_path: Path, chat: Chat) -> Run:
    detector = Component("scripted:Phrase")
    profile = replace(read_profile("tiny", {"csr.draws": 16}), detector=detector)
    return Run(profile, session(tmp_path / "store", chat, world(chat)), tmp_path, tmp_path)


def test_a_prompt_may_be_its_text_and_a_rollout_stand_alone(run: Run) -> None:
    judged = run.ask(OWN, 6)
    (prompt,) = judged.prompts.values()
    assert (prompt.text, prompt.source) == (OWN, "own")
    assert run.ask([OWN, "Another?"], 2).prompts.keys() > judged.prompts.keys()
    assert run.ask(prompt, 6).rollouts == judged.rollouts  # from the store
    assert len(run.session.sampler.answered) == 6 + 2  # type: ignore[attr-defined]
    one = judged.rollouts[0]
    calls: list[Any] = [
        judge(run.session, judged.prompts, one),
        measure_csr(run.session, judged.prompts, one, run.profile.csr, run.thinking),
    ]
    assert [len(result) for result in calls] == [1, 1]
    assert as_rollouts(one) == as_rollouts([one]) == [one]
    assert as_prompts(prompt) == as_prompts([OWN])


def test_traces_that_are_not_judged_are_counted_with_the_reason(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: StepJudge, exchanges: Sequence[Exchange]) -> list[Verdict]:
        labels = [None, SAFE, None]
        return [
            Verdict(e.rollout_id, e.part, e.question, label, None, "cannot read it", "step")
            for e, label in zip(exchanges, labels, strict=True)
        ]

    monkeypatch.setattr(StepJudge, "judge", refuse)
    with pytest.warns(UserWarning, match=r"^2 of 3 traces were not judged; the first: cannot read"):
        assert [verdict.label for verdict in run.ask(OWN, 3).verdicts] == [None, SAFE, None]
    hidden = replace(run, profile=replace(run.profile, reveal=False))
    with pytest.warns(UserWarning, match=r"^2 of 3 traces were not judged$"):
        hidden.ask(OWN, 3)


def test_wrong_things_in_their_place_are_one_line(run: Run) -> None:
    judged = run.ask(OWN, 6)
    one = judged.rollouts[0]
    for wrong, message in (
        (lambda: run.ask(""), "a prompt is ''; give a Prompt or its text"),
        (lambda: run.ask([3]), "a prompt is 3; give a Prompt or its text"),  # type: ignore[list-item]
        (lambda: judge(run.session, judged.prompts, "r1"), "a rollout is 'r'; give a R"),  # type: ignore[arg-type]
        (lambda: find_cues(run.session, {}, 3, Phrase()), "a rollout is 3"),  # type: ignore[arg-type]
        (
            lambda: measure_csr(run.session, {}, one, run.profile.csr, run.thinking),
            "is not among the 0 given; give all prompts by id",
        ),
        (
            lambda: intervene(
                run.session, judged.prompts, [Replacement(one, 99, "t", TRIGGER)], run.thinking
            ),
            "sentence 99 of rollout .* give an index from 0 to 2",
        ),
        (lambda: compare_sentences(run, judged, {"mine": TRIGGER}), "1 text to compare; give two"),
        (lambda: before_and_after(run, OWN), "run notebook 06_ipo_training first"),
    ):
        with pytest.raises(BadInput, match=message):
            wrong()


def test_s_along_a_trace_is_a_table(run: Run) -> None:
    judged = run.ask(OWN, 8)
    unsafe, safe = judged.labelled(UNSAFE)[0], judged.labelled(SAFE)[0]
    table = csr_table(run, judged, unsafe)
    assert list(table["text"]) == ["", ASIDE, CUE, STEP]
    assert list(table["sentence"]) == [0, 1, 2, 3]
    assert list(table["s"][2:]) == [0.0, 0.0]
    assert 0 < table["s"][1] < 1
    assert set(table["n"]) == {16}
    assert (table["low"] <= table["s"]).all()
    both = csr_table(run, judged, [unsafe, safe])
    assert list(both["label"]) == [UNSAFE] * 4 + [SAFE] * 4
    hidden = replace(run, profile=replace(run.profile, reveal=False))
    words = "".join(csr_table(hidden, judged, unsafe)["text"])
    assert not any(char.isalpha() for char in words)


def test_sentences_are_compared_in_the_place_of_the_first_cue(run: Run) -> None:
    one = compare_sentences(run, run.ask(OWN, 8), {"mine": TRIGGER[:-1], "neutral": ASIDE}, 20)
    assert list(one["text"]) == [TRIGGER, ASIDE]  # a full stop is added
    assert list(one["continuations"]) == [20, 20]
    assert list(one["prompts"]) == [1, 1]
    assert one["safe"][0] == one["high"][0] == 1.0
    assert one["minus"][0] == one["safe"][0] - one["safe"][1] > 0.25
    assert 0 < one["minus_low"][0] < one["minus"][0] < one["minus_high"][0]
    assert one["minus"].isna().tolist() == [False, True]
    judged = run.ask(PROMPTS, 8)
    detector = run.detector(judged.rollouts, judged.verdicts)
    cues = find_cues(run.session, judged.prompts, judged.rollouts, detector)
    assert any(index is not None for index in cues.values())
    many = compare_sentences(run, judged, {"mine": TRIGGER, "neutral": ASIDE, "nothing": ""}, 4)
    assert list(many["prompts"]) == [8, 8, 8]
    assert list(many["continuations"]) == [32, 32, 32]
    assert many["minus"].isna().tolist() == [False, False, True]


def test_a_table_of_s_can_be_drawn_as_it_is(run: Run, tmp_path: Path) -> None:
    judged = run.ask(OWN, 8)
    table = csr_table(run, judged, judged.labelled(UNSAFE)[0])
    figure, ax = plots.figure()
    plots.csr_curve(table, ax)
    assert list(ax.lines[0].get_xdata()) == list(table["cut"])
    assert list(ax.lines[0].get_ydata()) == list(table["s"])
    plots.save(figure, str(tmp_path / "own"), "mine", caption="")
    assert (tmp_path / "own" / "mine.png").is_file()
    assert list(table["not_judged"]) == [0] * 4


def test_judged_rollouts_print_in_one_line(run: Run) -> None:
    judged = run.ask(OWN, 4)
    assert repr(judged).startswith("JudgedRollouts(4 of 1 prompts: ")


@pytest.mark.parametrize(
    ("text", "closed"),
    [("Wait", "Wait."), ("Wait? ", "Wait?"), ("等一下。", "等一下。"), ("", ""), ("  ", "")],
)
def test_a_text_is_closed_so_that_the_model_does_not_go_on_inside_it(
    text: str, closed: str
) -> None:
    assert closed_sentence(text) == closed


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """The first two examples of Newcombe (1998), table II."""
    for (before, after), low, high in (
        (((48, 80), (56, 70)), 0.0524, 0.3339),
        (((3, 10), (9, 10)), 0.1705, 0.8090),
    ):
        interval = newcombe(before, after)
        assert interval.low == pytest.approx(low, abs=1e-3)
        assert interval.high == pytest.approx(high, abs=1e-3)


def test_before_and_after_stand_side_by_side(
    run: Run, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = session(run.session.store.root, chat, world(chat, {ASIDE: 1.0}, "trained"))
    other = SimpleNamespace(
        session=run.session,
        profile=run.profile,
        ask=run.ask,
        trained_adapters=lambda _: {"after stage 1": Path("adapter")},
        adapted=lambda _: trained,
    )
    page = before_and_after(other, [OWN, "Another?"]).data  # type: ignore[arg-type]
    assert page.count("before training: ") == page.count("after stage 1: safe") == 2
    assert page.count(OWN) == 1
    assert TRIGGER in page


def test_what_is_tried_on_a_trace_is_drawn_and_counted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = run.ask(OWN, 8)
    unsafe = judged.labelled(UNSAFE)[0]
    explorer = TraceExplorer(run, judged, 4)
    explorer.rollout, explorer.sentence = unsafe, 1
    end = explorer.sentences[1].token_end
    here = Prefix(judged.prompts[unsafe.prompt_id], unsafe.token_ids[:end]).key
    measure_csr(run.session, judged.prompts, unsafe, run.profile.csr, run.thinking)
    measured = len(stored_draws(run.session, run.thinking, "continuations")[here])
    assert "end safe: 0.0 %" in explorer.draw_again()
    drawn = stored_draws(run.session, run.thinking, "continuations")[here]
    assert len(drawn) == measured + 4  # none by which S was measured
    assert ", n=8" in explorer.draw_again()  # a second press adds as many
    put = explorer.put(TRIGGER[:-1])
    assert f"in the place of sentence 2: “{TRIGGER}”; end safe: 100.0 %" in put
    assert put.count(PROOF) == 4
    assert "nothing, so the model sampled again" in explorer.put(" ")
    monkeypatch.setenv("IPO_STATIC", "1")
    assert ASIDE in explore(run, judged).data
    with pytest.raises(BadInput, match="explore: no traces"):
        explore(run, replace(judged, rollouts=[]))


def test_buttons_do_what_they_say(run: Run) -> None:
    judged = run.ask(OWN, 8)
    unsafe = judged.labelled(UNSAFE)[0]
    box = explore(run, judged, unsafe, 4)
    trace, sentence, text, (again, put), page = (
        *box.children[:3],
        box.children[3].children,
        box.children[4],
    )
    names = [name for name, _ in trace.options]
    assert names[0] == f"1, {judged.verdicts[0].label}: {OWN}"
    number = judged.rollouts.index(unsafe)
    assert (trace.index, sentence.index) == (number, 0)
    assert [label for label, _ in sentence.options] == [f"1: {ASIDE}", f"2: {CUE}", f"3: {STEP}"]
    sentence.index = 1
    again.click()
    assert "drawn again after sentence 2; end safe: 0.0 %" in page.value
    text.value = TRIGGER
    put.click()
    assert "end safe: 100.0 %" in page.value
    trace.index = (number + 1) % 8
    assert page.value == ""
