"""Attacks: what they change, what stays, and that verdicts are about the original request."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from small_study import open_small_run

from ipo_lib.chat import CLOSE, split_response
from ipo_lib.experiments import attack_study, attacks, learned
from ipo_lib.profiles.run import Run
from ipo_lib.profiles.settings import StudySettings
from ipo_lib.records import ANSWER, SAFE, TRACE, BadInput, by_id, from_json
from ipo_lib.sandbox.judge import SAFETY_AWARE, kind_of
from ipo_lib.sandbox.world import find_item
from ipo_lib.stages import judge, trace_texts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_small_run(tmp_path_factory.mktemp("attacks"), {"prompts.direct.count": 10})


@pytest.fixture(scope="module")
def material(run: Run) -> attacks.AttackMaterial:
    return attacks.gather_material(run, run.prompts("direct"), run.prompts("train_harmful"))


def test_attacks_on_prompts(run: Run, material: attacks.AttackMaterial) -> None:
    for prompt in material.prompts:
        item = find_item(prompt.text)
        assert item
        changed = {}
        for name in attacks.PROMPT_ATTACKS:
            changed[name] = attacks.changed_text(run, prompt, name, material)
        assert prompt.text in changed[attacks.TEMPLATE]
        assert changed[attacks.TEMPLATE] != prompt.text
        assert item.name not in changed[attacks.LEETSPEAK]
        assert item.name.translate(attacks.LETTERS) in changed[attacks.LEETSPEAK]
        encoded = base64.b64encode(item.name.encode()).decode()
        assert encoded in changed[attacks.BASE64]
        assert find_item(changed[attacks.PARAPHRASE]) == item
        assert all(trigger.text in changed[attacks.FORBIDDEN] for trigger in material.triggers)
    again = attacks.changed_text(run, prompt, attacks.TEMPLATE, material)
    assert again == changed[attacks.TEMPLATE]


def test_a_trace_is_given_through_its_cue_and_without_it(
    run: Run, material: attacks.AttackMaterial
) -> None:
    assert material.unsafe
    for name in (attacks.CONTROL, attacks.PREFILL, attacks.WHOLE):
        rollouts = attacks.attack(run, run.session, name, material, 1)
        assert [rollout.prompt_id for rollout in rollouts] == list(material.unsafe)
        for rollout in rollouts:
            given = rollout.token_ids[: rollout.prefix_len]
            trace = material.unsafe[rollout.prompt_id]
            assert trace.token_ids[: len(given)] == given
            cue = material.cues[rollout.prompt_id]
            text = run.session.chat.decode(given)
            if name == attacks.PREFILL:
                assert kind_of(text.strip().rsplit(". ", 1)[-1]) == "cue"
            elif name == attacks.CONTROL:
                assert rollout.prefix_len == cue.token_start
            else:
                assert text.rstrip().endswith(CLOSE)


def test_an_empty_trace_leaves_the_answer_alone(run: Run, material: attacks.AttackMaterial) -> None:
    for rollout in attacks.attack(run, run.session, attacks.EMPTY, material, 1):
        parts = split_response(rollout.text, run.session.chat.opened)
        assert not parts.reasoning or not rollout.text[slice(*parts.reasoning)].strip()
        assert parts.answer


def test_resets_go_on_from_before_the_first_safety_aware_sentence(
    run: Run, material: attacks.AttackMaterial
) -> None:
    plain = attacks.attack(run, run.session, attacks.NO_ATTACK, material, 2)
    answers = judge(run.session, by_id(material.prompts), plain, ANSWER)
    once, twice = (
        attacks.attack(run, run.session, name, material, 2) for name in attacks.RESETS[:2]
    )
    changed = 0
    for before, answer, after, later in zip(plain, answers, once, twice, strict=True):
        texts = trace_texts(run.session, before)
        aware = [index for index, text in enumerate(texts) if kind_of(text) in SAFETY_AWARE]
        if answer.label == SAFE and aware:
            changed += 1
            given = run.session.chat.decode(after.token_ids[: after.prefix_len])
            assert len(trace_texts(run.session, after)) > aware[0] or given
            kept = " ".join(texts[: aware[0]])
            assert " ".join(given.split()) == " ".join(kept.split())
        else:
            assert after == before == later
    assert changed


def test_what_is_measured_is_about_the_original_request(
    run: Run, material: attacks.AttackMaterial
) -> None:
    names = attacks.attacks_of(run)
    assert attacks.PARAPHRASE in names
    found = attacks.measure_attacks(run, run.session, names, material, 1)
    assert [result.attack for result in found] == names
    asked = {prompt.id for prompt in material.prompts}
    for result in found:
        assert set(result.answers) <= asked
        given = result.attack in (attacks.EMPTY, attacks.WHOLE)
        assert bool(result.traces) != given
    without = run.changed({"extras.rewrite": None})
    assert attacks.PARAPHRASE not in attacks.attacks_of(without)


def test_an_unknown_attack_is_one_line(run: Run, material: attacks.AttackMaterial) -> None:
    with pytest.raises(BadInput, match="attack 'magic' is unknown; use no attack, template"):
        attacks.attack(run, run.session, "magic", material, 1)


def test_a_request_without_a_known_subject_hides_its_longest_word(run: Run) -> None:
    plain = run.changed({"extras.subject": None})
    assert attacks.subject_of(plain, "How are cupboards made?") == "cupboards"


def test_methods_under_attack_are_compared_by_prompt_and_seed() -> None:
    cells = []
    for seed in range(6):
        for row, harmful in (("base", 4), ("better", 1)):
            counts = ((harmful, 4), (0, 0), (harmful - 1, 4))
            cells.append(attack_study.AttackCell(row, seed, "template", counts, counts, 1.0))
    assert attack_study.harm_under(cells, "base", "template", ANSWER).value == 0.875
    rates = attack_study.rates_under(cells, "better", "template", TRACE)
    assert len(rates) == 6
    assert math.isnan(rates[0][1])
    change = attack_study.compare_methods(cells, "better", "base", "template", ANSWER).change
    assert (change.value, change.n) == (-0.75, 2)
    assert attack_study.harm_under(cells, "base", "other", ANSWER).n == 0
    assert from_json(attack_study.AttackCell, asdict(cells[0])) == cells[0]


def test_resembling_is_the_first_sentence_like_a_trigger() -> None:
    assert learned.resembling([0.2, 0.9, 1.0]) == 1
    assert learned.resembling([0.2]) is None


def test_a_full_run_of_attacks_is_written_and_read_back(
    run: Run, material: attacks.AttackMaterial, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    studied = replace(
        run,
        figures=tmp_path,
        profile=replace(run.profile, studies={"rivals": StudySettings(seeds=1)}),
    )
    answers = {prompt.id: (1, 2) for prompt in material.prompts[:3]}

    def models(run: Run, rows: dict[str, Any], seeds: int, what: str) -> Iterator[Any]:
        assert set(rows) == {"base", "SafePath, zero-shot", "SafePath"}
        for row in rows:
            yield row, 0, Path("adapter") if row == "SafePath" else None

    def measure(run: Run, session: Any, names: Any, *_: Any) -> list[attacks.AttackResult]:
        return [attacks.AttackResult(name, {}, answers, 1.0) for name in names]

    monkeypatch.setattr(attack_study, "trained_models", models)
    monkeypatch.setattr(attack_study, "measure_attacks", measure)
    monkeypatch.setattr(Run, "adapted", lambda run, folder: run.session)
    names, methods = ["no attack", "template"], ["base", "SafePath, zero-shot", "SafePath"]
    made, date = attack_study.load_attacks(studied, True, material, names, 2, methods)
    # A method without a model of its own is left out.
    assert [(cell.row, cell.attack) for cell in made] == [
        ("base", "no attack"),
        ("base", "template"),
        ("SafePath", "no attack"),
        ("SafePath", "template"),
    ]
    assert made[0].answers[:4] == ((1, 2), (1, 2), (1, 2), (0, 0))
    assert attack_study.load_attacks(studied, False, material, names, 2) == (made, date)
    without = replace(run, figures=tmp_path / "none")
    assert attack_study.load_attacks(without, True, material, names, 2) == ([], "never")
