"""Tables that users give: a row is read as it is meant, or one line says what is wrong where."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ipo_lib.prompts import PromptSet, load_prompts
from ipo_lib.prompts.tables import read_rows
from ipo_lib.records import BadInput

TEXTS = [
    "plain",
    'with "quotes", and a comma',
    "two\nlines",
    "None",
    "nan",
    "null",
    "1e3",
    "nø\u2028",
]


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def read(file: str, **settings: Any) -> list[str]:
    prompts = load_prompts("mine", PromptSet(**{"count": 99, "file": file, **settings}))
    return [prompt.text for prompt in prompts]


def as_csv(texts: list[str], delimiter: str = ",") -> str:
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    return "\n".join(
        [f"id{delimiter}prompt", *(f"{n}{delimiter}{q}" for n, q in enumerate(quoted))]
    )


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "txt"])
def test_every_format_gives_the_same_texts(tmp_path: Path, ending: str, packed: str) -> None:
    rows = [{"id": number, "prompt": text} for number, text in enumerate(TEXTS)]
    contents = {
        "csv": as_csv(TEXTS),
        "tsv": as_csv(TEXTS, "\t"),
        "json": "\n " + json.dumps(rows, indent=1),
    }
    lines = "\n".join(map(json.dumps, rows))
    file = written(tmp_path, f"set.{ending}{packed}", contents.get(ending, lines))
    assert read(file) == TEXTS


def test_parquet_gives_the_same_texts(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    parquet.write_table(pyarrow.table({"prompt": TEXTS}), path)
    assert read(str(path)) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}', ["line 2", "'prompt'", "empty"]),
        ("a.jsonl", '{"prompt": NaN}', ["line 1", "empty"]),
        ("a.jsonl", '{"prompt": 12}', ["line 1", "12", "no text"]),
        ("a.jsonl", '{"prompt": true}', ["line 1", "no text"]),
        ("a.jsonl", '{"prompt": {"text": "x"}}', ["line 1", "no text"]),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', ["line 2", "no column 'prompt'", "text"]),
        ("a.jsonl", '{"prompt": " \\n"}', ["line 1", "empty"]),
        ("a.jsonl", '{"prompt": "a"}\n"b"', ["line 2", "no JSON object"]),
        ("a.json", '[{"prompt": "a"}, 3]', ["element 2", "no JSON object"]),
        ("a.json", '[{"prompt": "a"}', ["no JSON array"]),
        ("a.csv", "id,prompt\n1,one\n2\n", ["line 3", "1 cells", "header has 2"]),
        ("a.csv", "id,prompt\n1,one, two\n", ["line 2", "3 cells", "quotation marks"]),
        ("a.csv", "id,prompt\n1,\n", ["line 2", "'prompt'", "empty"]),
        ("a.csv", 'id,prompt\n1,"one\n2,two\n', ["line 2", "unexpected end of data"]),
        ("a.csv", 'id,prompt\n1,"one" more\n', ["line 2", "expected after"]),
        ("a.csv", "prompt,prompt\na,b\n", ["two columns are called 'prompt'"]),
        ("a.tsv", "id\tprompt\n1\n", ["line 2", "1 cells"]),
        ("a.csv.gz", "id,prompt\n1\n", ["line 2", "1 cells"]),
        ("a.parquet", b"PAR1 and no more", ["Parquet"]),
        ("a.jsonl", b'{"prompt": "caf\xe9"}', ["UTF-8"]),
        ("a.csv", "id,prompt\n1,x\n".encode("utf-16"), ["UTF-8"]),
    ],
)
def test_a_wrong_cell_or_row_is_one_line_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, says: list[str]
) -> None:
    file = written(tmp_path, name, content)
    with pytest.raises(BadInput) as caught:
        read(file)
    for part in (name, *says):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_packed_file_is_one_line(tmp_path: Path) -> None:
    path = Path(written(tmp_path, "a.jsonl.gz", '{"prompt": "a"}\n' * 5000))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="cannot be unpacked"):
        read(str(path), count=9999)


def test_a_conversation_of_one_turn_is_its_user_s_message(tmp_path: Path) -> None:
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How?"}]
    shared = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    rows = [{"prompt": said}, {"prompt": shared}]
    assert read(written(tmp_path, "a.json", json.dumps(rows))) == ["How?", "Why?"]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "2 messages"),
        ([{"role": "assistant", "content": "a"}], "0 messages"),
        (["a", "b"], "no conversation"),
        ([{"role": "user", "content": None}], "is empty"),
        ([], "0 messages"),
    ],
)
def test_any_other_list_is_one_line(tmp_path: Path, messages: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        read(written(tmp_path, "a.json", json.dumps([{"prompt": messages}])))


def test_a_long_prompt_and_a_long_file_are_read(tmp_path: Path) -> None:
    long = "word " * 60_000
    assert read(written(tmp_path, "a.csv", f'id,prompt\n1,"{long}"\n')) == [long]
    file = written(tmp_path, "b.jsonl", json.dumps({"prompt": "x" * 1000}) + "\n")
    content = Path(file).read_bytes()
    with Path(file).open("ab") as more:
        for _ in range(30):
            more.write(content * 1000)  # 30 MB
    tracemalloc.start()
    assert len(read(file, count=5, id="none")) == 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_an_empty_id_is_the_row_s_number(tmp_path: Path) -> None:
    rows = [{"id": None, "prompt": "a"}, {"id": "", "prompt": "b"}, {"prompt": "c"}]
    file = written(tmp_path, "a.json", json.dumps(rows))
    prompts = load_prompts("mine", PromptSet(9, file=file, category="kind"))
    assert [prompt.id for prompt in prompts] == ["mine-0", "mine-1", "mine-2"]
    assert {prompt.category for prompt in prompts} == {""}


def test_places_are_lines_even_where_cells_have_several(tmp_path: Path) -> None:
    file = written(tmp_path, "a.csv", 'id,prompt\n1,"two\nlines"\n\n2,b\n')
    places = [place.rpartition(", ")[2] for place, _ in read_rows(Path(file))]
    assert places == ["line 2", "line 5"]
