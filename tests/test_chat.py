from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TURN, tiny_tokenizer

from ipo_lib.chat import Chat, Parts, part_text, split_response
from ipo_lib.records import ANSWER, BOTH, CONTINUATION, TRACE, BadInput, Prompt, Rollout

PROMPT = Prompt("p", "How tall is a lighthouse? <think>", "test", False)
OPEN, CLOSE = "<think>", "</think>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("text"), template="qwen3", tags="text")


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    return Chat(folder, prefill="<think>\n")


def test_prompt_is_what_transformers_renders_with_one_bos(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT.text}]
    expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids = Chat(folder, system="Be brief.").prompt_ids(PROMPT)
    assert list(ids) == expected
    assert ids.count(0) == 1
    assert theirs("x")["input_ids"][0] == 0


@pytest.mark.parametrize("tags", ["single", "text"])
@pytest.mark.parametrize(
    ("template", "prefill", "opened"),
    [
        ("r1", "", True),
        ("qwen3", "", False),
        ("qwen3", "<think>\n", True),
        ("qwen3", "<think>\n\n</think>\n\n", False),
        ("r1", "Okay", True),
        ("qwen3", "Sure", False),
    ],
)
def test_opened(tmp_path: Path, template: str, prefill: str, opened: bool, tags: str) -> None:
    chat = Chat(tiny_tokenizer(tmp_path, template=template, tags=tags), prefill=prefill)
    assert chat.opened is opened
    assert chat.decode(chat.prompt_ids(PROMPT)).endswith(prefill)
    assert (len(chat.encode("</think>")) == 1) is (tags == "single")


def test_system_prompt_that_mentions_the_tag_opens_nothing(folder: Path) -> None:
    assert not Chat(folder, system="Write your thoughts after <think>").opened


@pytest.mark.parametrize(
    ("options", "chat_options", "message"),
    [
        ({"template": None}, {}, "no chat template"),
        ({"template": "r1"}, {"prefill": "<think>\n"}, "opens <think> itself"),
        (
            {"template": "{{ messages[-1]['content'] }}"},
            {"system": "Be brief."},
            "drops the system turn",
        ),
        ({"template": "hello"}, {}, "drops the user turn"),
        ({"template": "{{ raise_exception('no system') }}"}, {}, "no system"),
        ({"template": "{% if %}"}, {}, "template fails"),
    ],
)
def test_bad_folders_get_one_line(
    tmp_path: Path, options: dict, chat_options: dict, message: str
) -> None:
    tiny_tokenizer(tmp_path, **options)
    with pytest.raises(BadInput, match=message) as caught:
        Chat(tmp_path, **chat_options)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_tokenizer_or_other_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        Chat(tmp_path)
    file = tiny_tokenizer(tmp_path) / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder": None}))
    with pytest.raises(BadInput, match="byte-level"):
        Chat(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]
)
@pytest.mark.parametrize("content", [b'{"eos_token_id": 1', b"[1, 2]", b'{"\xff": 1}', b""])
def test_a_corrupt_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tiny_tokenizer(tmp_path) / name).write_bytes(content)
    with pytest.raises(BadInput, match="intact copy") as caught:
        Chat(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_template_in_settings_and_date_pinned(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, template=None)
    file = tmp_path / "tokenizer_config.json"
    template = TURN + "{{ strftime_now('%d %b %Y') }}{% generation %}!{% endgeneration %}"
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
    for source in (template, named):
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": source}))
        chat = Chat(tmp_path)
        assert chat.decode(chat.prompt_ids(PROMPT)).endswith("26 Jul 2024!")


def test_ends_are_the_union_of_what_the_folder_says(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    chat = Chat(tmp_path)
    assert (chat.eos_ids, chat.fingerprint()["eos"]) == ((1, 7, 9), [1, 7, 9])


def test_the_end_of_a_turn_comes_before_the_end_of_a_document(tmp_path: Path) -> None:
    """As in Llama 3, whose generation_config.json lists <|end_of_text|> (lower) and <|eot_id|>.

    <|eot_id|> is the tokenizer's eos_token.
    """
    tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1, 7]}')
    chat = Chat(tmp_path)
    assert (chat.eos_ids, chat.fingerprint()["eos"]) == ((1, 0, 7), [0, 1, 7])


def test_fingerprint_moves_with_what_matters(folder: Path, tmp_path: Path) -> None:
    chats = [
        Chat(folder),
        Chat(folder, prefill="A"),
        Chat(folder, system="B"),
        Chat(tiny_tokenizer(tmp_path)),
    ]
    texts = [json.dumps(chat.fingerprint(), sort_keys=True) for chat in chats]
    assert len(set(texts)) == 4
    assert json.dumps(Chat(folder).fingerprint(), sort_keys=True) == texts[0]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_text_survives_and_offsets_are_exact(chat: Chat, text: str) -> None:
    ids = chat.encode(text)
    assert chat.decode(ids) == text
    check_offsets(chat, ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 390), max_size=30))
def test_any_ids_decode_as_the_tokenizer_does_and_offsets_are_exact(
    chat: Chat, ids: list[int]
) -> None:
    assert chat.decode(ids) == chat._tokenizer.decode(ids, skip_special_tokens=False)
    check_offsets(chat, ids)


def check_offsets(chat: Chat, ids: list[int] | tuple[int, ...]) -> None:
    text, offsets = chat.decode(ids), chat.offsets(ids)
    assert len(offsets) == len(ids) + 1
    assert offsets[0] == 0
    assert offsets[-1] == len(text)
    assert offsets == sorted(offsets)
    for cut, offset in enumerate(offsets):
        head = chat.decode(ids[:cut])
        assert head.startswith(text[:offset])
        if not head.endswith("\ufffd"):
            assert head == text[:offset]


def test_characters_split_over_tokens(chat: Chat) -> None:
    ids = chat.encode("a\U0001f600b")
    assert len(ids) == 6
    assert chat.offsets(ids) == [0, 1, 1, 1, 1, 2, 3]
    assert chat.offsets(ids[:3]) == [0, 1, 1, 2]
    assert chat.decode(ids[:3]) == "a\ufffd"


def test_offsets_take_linear_time(chat: Chat) -> None:
    import time

    ids = chat.encode("The lighthouse \U0001f600 keeper. " * 400)
    seconds = []
    for part in (ids[: len(ids) // 8], ids):
        start = time.perf_counter()
        chat.offsets(part)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 40 * seconds[0] + 0.05


@pytest.mark.parametrize("tags", ["single", "text"])
@pytest.mark.parametrize("around", [("", ""), ("x", ""), ("x", ">"), ("<", "\n\nThe")])
def test_closes_at_the_first_completing_token_only(
    tmp_path: Path, tags: str, around: tuple[str, str]
) -> None:
    chat = Chat(tiny_tokenizer(tmp_path, tags=tags))
    ids = chat.encode(around[0] + "</think>" + around[1])
    cuts = range(len(ids) + 1)
    first = next(cut for cut in cuts if "</think>" in chat.decode(ids[:cut]))
    assert [cut for cut in cuts if chat.closes(ids[:cut])] == [first]
    assert not chat.closes(chat.encode("</thin>"))
    assert not chat.closes(())


def test_closes_when_fused_with_a_newline(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, tags="text")
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["k>ĊĊ"] = fused = len(data["model"]["vocab"])
    file.write_text(json.dumps(data))
    chat = Chat(tmp_path)
    ids = (*chat.encode("</thin"), fused)
    assert chat.decode(ids) == "</think>\n\n"
    assert chat.closes(ids)
    assert not chat.closes(ids[:-1])


@pytest.mark.parametrize(
    ("text", "opened", "trace", "answer", "closed", "flags"),
    [
        (f"a b{CLOSE}c", True, "a b", "c", True, ()),
        (f"{OPEN}\na{CLOSE}\n\nc", False, "\na", "\n\nc", True, ()),
        ("only an answer", False, None, "only an answer", True, ()),
        ("cut off", True, "cut off", None, False, ()),
        (f"{OPEN}cut off", False, "cut off", None, False, ()),
        (f"{OPEN}\n\n{CLOSE}\n\nc", False, None, "\n\nc", True, ()),
        (f"{OPEN}a{CLOSE}c", True, "a", "c", True, ("doubled",)),
        (f"a{OPEN}b{CLOSE}c", True, f"a{OPEN}b", "c", True, ("doubled",)),
        (f"{OPEN}{OPEN}a{CLOSE}c", False, f"{OPEN}a", "c", True, ("doubled",)),
        (f"a{CLOSE}b{CLOSE}c", True, "a", f"b{CLOSE}c", True, ("doubled",)),
        (f"Sure. {OPEN}a{CLOSE}c", False, "a", "c", True, ("preamble",)),
        (f"a{CLOSE}c", False, "a", "c", True, ("unopened",)),
        (f"a{CLOSE}c{OPEN}", False, "a", f"c{OPEN}", True, ("unopened",)),
        (f"a{CLOSE}", True, "a", None, True, ()),
        (f"a{CLOSE} \n", True, "a", None, True, ()),
        ("", True, None, None, False, ()),
        ("", False, None, None, True, ()),
    ],
)
def test_split(text, opened, trace, answer, closed, flags) -> None:  # type: ignore[no-untyped-def]
    parts = split_response(text, opened)
    read = [text[slice(*span)] if span else None for span in (parts.reasoning, parts.answer)]
    assert (read, parts.closed, parts.flags) == ([trace, answer], closed, flags)


@given(
    pieces=st.lists(st.sampled_from([OPEN, CLOSE, "a", " ", "\n", "<", "é"]), max_size=8),
    opened=st.booleans(),
)
def test_split_never_overlaps(pieces: list[str], opened: bool) -> None:
    text = "".join(pieces)
    parts = split_response(text, opened)
    assert isinstance(parts, Parts)
    if parts.reasoning:
        assert CLOSE not in text[slice(*parts.reasoning)]
    if parts.reasoning and parts.answer:
        assert parts.reasoning[1] + len(CLOSE) == parts.answer[0]
    if not parts.closed:
        assert parts.answer is None
        assert CLOSE not in text


def rollout(chat: Chat, text: str, prefix_len: int = 0) -> Rollout:
    return Rollout("r", "p", prefix_len, chat.encode(text), text, "stop", 0, "s")


def texts_of_parts(response: Rollout, opened: bool, *parts: str) -> list[str | None]:
    return [part_text(response, part, opened) for part in parts]


def test_part_text(chat: Chat) -> None:
    whole = rollout(chat, f"I wait.\n{CLOSE}\n\nSixty metres.", prefix_len=2)
    offsets = chat.offsets(whole.token_ids)
    texts = [part_text(whole, part, True, offsets) for part in (TRACE, ANSWER, BOTH)]
    assert texts == ["I wait.", "Sixty metres.", "I wait.\n\nSixty metres."]
    continuation = chat.decode(whole.token_ids[2:]).strip()
    assert part_text(whole, CONTINUATION, True, offsets) == continuation
    cut = rollout(chat, "I wait")
    expected = ["I wait", None, None, "I wait"]
    assert texts_of_parts(cut, True, TRACE, ANSWER, BOTH, CONTINUATION) == expected
    plain = rollout(chat, "Sixty.")
    assert texts_of_parts(plain, False, TRACE, ANSWER, BOTH) == [None, "Sixty.", "Sixty."]
    with pytest.raises(BadInput, match="tracee"):
        part_text(whole, "tracee", True)


def test_using_chat_loads_no_torch_and_the_check_can_fail(folder: Path) -> None:
    use = f"from ipo_lib.chat import Chat; chat = Chat({str(folder)!r})"
    modules = modules_after(f"{use}; chat.offsets(chat.encode('abc')); chat.fingerprint()")
    assert "torch" not in modules
    assert "tokenizers" in modules


def modules_after(code: str) -> set[str]:
    """The modules that a new process has loaded after some code."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
