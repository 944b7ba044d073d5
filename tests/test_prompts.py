"""Prompt sets: what is there is read as it is, what is wrong is named in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ipo_lib.prompts import PromptSet, load_prompts, split_words
from ipo_lib.records import BadInput, Prompt

ROWS = [
    {"id": f"r{at}", "prompt": f"Question {at}?", "kind": "ab"[at % 2], "score": str(at // 2)}
    for at in range(6)
]


def jsonl(folder: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def one_line(spec: PromptSet, *says: str) -> None:
    with pytest.raises(BadInput) as error:
        load_prompts("mine", spec)
    assert "\n" not in str(error.value)
    for part in says:
        assert part in str(error.value)


def texts(found: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in found]


def test_jsonl_and_csv_give_the_same_prompts(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(
        "id,prompt,kind,score\n" + "".join(",".join(row.values()) + "\n" for row in ROWS)
    )
    left, right = (
        load_prompts("mine", PromptSet(4, file=file, category="kind"))
        for file in (jsonl(tmp_path), str(path))
    )
    assert texts(left) == [row["prompt"] for row in ROWS[:4]]
    assert left[0] == Prompt("mine-r0", "Question 0?", str(tmp_path / "set.jsonl"), True, "a")
    assert [(p.id, p.text, p.harm, p.category) for p in left] == [
        (p.id, p.text, p.harm, p.category) for p in right
    ]


def test_fewer_rows_than_asked_are_all_taken(tmp_path: Path) -> None:
    assert len(load_prompts("mine", PromptSet(100, file=jsonl(tmp_path)))) == 6


def test_columns_filter_and_harm(tmp_path: Path) -> None:
    spec = PromptSet(2, harm=False, file=jsonl(tmp_path), text="kind", where={"score": "1"})
    found = load_prompts("mine", spec)
    assert texts(found) == ["a", "b"]
    assert [p.id for p in found] == ["mine-r2", "mine-r3"]
    assert {p.harm for p in found} == {False}
    assert texts(load_prompts("mine", PromptSet(3, file=jsonl(tmp_path), where={"kind": "b"}))) == [
        "Question 1?",
        "Question 3?",
        "Question 5?",
    ]


def test_without_an_id_column_rows_are_numbered(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    assert [p.id for p in load_prompts("mine", PromptSet(2, file=jsonl(tmp_path, rows)))] == [
        "mine-0",
        "mine-1",
    ]


def test_more_prompts_keep_the_first_ones(tmp_path: Path) -> None:
    file = jsonl(tmp_path)
    assert (
        load_prompts("mine", PromptSet(2, file=file))
        == load_prompts("mine", PromptSet(5, file=file))[:2]
    )
    world = {"function": "ipo_lib.sandbox.world:prompts"}
    assert (
        load_prompts("direct", PromptSet(3, **world))
        == load_prompts("direct", PromptSet(7, **world))[:3]
    )


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_prompts("mine", PromptSet(6, file="~/set.jsonl"))) == 6


def test_bad_sets_are_named_in_one_line(tmp_path: Path) -> None:
    file = jsonl(tmp_path)
    one_line(PromptSet(1), "mine", "exactly one of known, file, hub and function")
    one_line(PromptSet(1, file=file, hub="a/b@c"), "exactly one of")
    one_line(PromptSet(1, file=str(tmp_path / "no.jsonl")), "no.jsonl", "missing")
    one_line(PromptSet(1, file=str(tmp_path)), str(tmp_path))
    one_line(PromptSet(0, file=file), "count 0")
    one_line(PromptSet(1, file=file, text="question"), "'question'", "id, prompt, kind, score")
    one_line(PromptSet(1, file=file, where={"kind": "z"}), "empty", "kind", "z")
    one_line(PromptSet(6, file=file, id="kind"), "'kind' repeats")
    one_line(PromptSet(1, file=jsonl(tmp_path, [])), "empty")
    one_line(PromptSet(1, hub="org/name"), "revision", "org/name@<commit>")
    one_line(PromptSet(1, function="ipo_lib.sandbox.world"), "module:name")
    one_line(PromptSet(1, function="ipo_lib.sandbox.world:nothing"), "module:name")
    one_line(PromptSet(1, function="no.such.module:prompts"), "module:name")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    one_line(PromptSet(2, file=str(tmp_path / "broken.jsonl")), "broken.jsonl", "line 2", "JSON")


def test_files_that_are_no_table_are_one_line(tmp_path: Path) -> None:
    for name in ("latin.jsonl", "latin.csv"):
        (tmp_path / name).write_bytes(b'{"prompt": "caf\xe9"}\n')
        one_line(PromptSet(2, file=str(tmp_path / name)), name, "UTF-8")
    (tmp_path / "list.jsonl").write_text('{"prompt": "a"}\n[1, 2]\n')
    one_line(PromptSet(2, file=str(tmp_path / "list.jsonl")), "list.jsonl", "line 2")


def test_a_byte_order_mark_is_no_part_of_the_table(tmp_path: Path) -> None:
    for name, text in (("set.csv", "prompt\na\n"), ("set.jsonl", '{"prompt": "a"}\n')):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        assert texts(load_prompts("mine", PromptSet(1, file=str(tmp_path / name)))) == ["a"]


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(
        json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert texts(load_prompts("mine", PromptSet(1, file=str(path)))) == ["a\u2028b\u0085c"]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n\n')
    assert texts(load_prompts("mine", PromptSet(5, file=str(path)))) == ["a", "b"]


def test_a_hub_set_is_read_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, **options: Any) -> list[dict[str, str]]:
        asked.append((name, options))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = load_prompts("mine", PromptSet(2, hub="org/name@abc", split="test"))
    assert [p.id for p in found] == ["mine-r0", "mine-r1"]
    assert found[0].source == "org/name@abc"
    assert asked == [("org/name", {"revision": "abc", "split": "test"})]


def test_a_gated_or_missing_hub_set_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, **options: Any) -> None:
        raise OSError("401 Client Error.\nCannot access gated repo")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refused))
    one_line(PromptSet(2, hub="org/name@abc"), "org/name@abc", "401", "access")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("मुझे हिन्दी सिखाओ", ("मुझे", "हिन्दी", "सिखाओ")),
        ("Ｈｏｗ do_I?", ("how", "do_i")),
        ("cafe\u0301", ("café",)),
        ("x² 3D", ("x2", "3d")),
    ],
)
def test_words_are_folded_and_whole_in_any_script(text: str, words: tuple[str, ...]) -> None:
    assert split_words(text) == words
