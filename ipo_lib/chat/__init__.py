"""How a model is spoken to: its chat template, its token ids, and the two parts of its response.

1. ``Chat.prompt_ids`` fills a prompt into the model's chat template and encodes it, with a
   *prefill*: text that the model's response begins with, such as ``<think>``.
2. ``Chat.decode`` and ``Chat.offsets`` lead from ids back to text, byte by byte, so that a
   character of the text can be found among the tokens.
3. ``split_response`` finds the reasoning trace and the answer in a response.

Nothing outside this package knows of ``<think>``, templates, BOS or EOS. It loads no torch.
"""

from __future__ import annotations

import codecs
import datetime
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ipo_lib.chat.limits import within
from ipo_lib.chat.quoting import QuotingEncoder
from ipo_lib.chat.response import CLOSE, OPEN, Parts, is_cut_off, part_text, split_response
from ipo_lib.records import BadInput, Ids, Prompt

__all__ = [
    "CLOSE",
    "OPEN",
    "Chat",
    "Parts",
    "is_cut_off",
    "part_text",
    "read_json",
    "split_response",
]

TEMPLATE_DATE = datetime.date(2024, 7, 26)  # "today" in a template: a prompt must not change
TEMPLATE_SECONDS = 10.0  # in which a template has to render its first prompt
PROBE = "How tall is a lighthouse"  # a question by which a template is checked
DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Chat:
    """How the model in a folder is spoken to.

    Args:
        folder: of the model, with tokenizer.json and a chat template.
        prefill: text that follows the generation prompt, as if the model had written it.
        system: text of a system turn; None: no such turn.
        variables: what the template may ask for, such as ``{"enable_thinking": False}``.
        guard: a model that only judges. Its text is never cut, so that any tokenizer will do, and
            it may have no template.

    Raises:
        BadInput: the folder is corrupt, or has no byte-level tokenizer, template or
            end-of-sequence token; or the template loses or doubles a text.

    Attributes:
        opened: whether prompts end in an open ``<think>``.
        eos_ids: the ids that end a response: the end of a turn first, then that of a document.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        prefill: str = "",
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        guard: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.prefill = prefill
        self.system = system
        self.variables = dict(variables or {})
        self._bytes_by_token: dict[int, bytes] = {}
        self._unproven = True  # the template has rendered nothing yet
        self._tokenizer = self._read_tokenizer(any_vocabulary=guard)
        settings = read_json(self.folder / "tokenizer_config.json")
        named = read_json(self.folder / "special_tokens_map.json")
        self._special_tokens = {**_special_tokens(named), **_special_tokens(settings)}
        self._quoting = QuotingEncoder(self._tokenizer)
        self.eos_ids = self._read_eos_ids()
        self._template_source = self._read_template(settings)
        self.opened = False
        if not guard:
            after = self._check_template()
            self.opened = _opens_trace(after + prefill)

    def _read_tokenizer(self, any_vocabulary: bool) -> Any:
        tokenizer = _read_file(self.folder / "tokenizer.json", Tokenizer.from_str)
        _require(
            tokenizer,
            f"{self.folder}: no tokenizer.json; "
            "name a model folder that holds one (a fast tokenizer)",
        )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _require(
            any_vocabulary or "ByteLevel" in str(tokenizer.decoder),
            f"{self.folder}: cuts need a byte-level vocabulary; "
            "use a Llama 3, Qwen, SmolLM or R1 model",
        )
        return tokenizer

    def _read_eos_ids(self) -> Ids:
        """The end tokens that the folder names: the tokenizer's, which ends a turn, comes first."""
        turn_end = self._tokenizer.token_to_id(self._special_tokens.get("eos_token", ""))
        ends = {turn_end}
        for name in ("generation_config.json", "config.json"):
            ids = read_json(self.folder / name).get("eos_token_id")
            ends.update(ids if isinstance(ids, list) else [ids])
        ends.discard(None)
        _require(
            ends,
            f"{self.folder}: no end-of-sequence token; set eos_token_id in generation_config.json",
        )
        return tuple(sorted(ends, key=lambda token: (token != turn_end, token)))

    def _read_template(self, settings: Mapping[str, Any]) -> str:
        """The source of the default template, "" where there is none."""
        template = _read_file(self.folder / "chat_template.jinja", str)
        template = template or settings.get("chat_template") or ""
        if not isinstance(template, list):
            return str(template)
        for named in template:
            if named["name"] == "default":
                return str(named["template"])
        return ""

    def _check_template(self) -> str:
        """Check that the template keeps every text; return what it puts after the user's turn."""
        _require(
            self._template_source,
            f"{self.folder}: no chat template; add chat_template.jinja or use an instruct model",
        )
        # 1. Both turns are there.
        before, probe, after = self._render_prompt(PROBE).rpartition(PROBE)
        _require(
            probe, f"{self.folder}: the chat template drops the user turn; correct the template"
        )
        _require(
            (self.system or "").strip() in before,
            f"{self.folder}: the chat template drops the system turn; correct the template",
        )
        # 2. The trace is opened once.
        opened_twice = _opens_trace(after) and self.prefill.lstrip().startswith(OPEN)
        _require(
            not opened_twice,
            f"{self.folder}: the chat template opens {OPEN} itself; drop it from {self.prefill!r}",
        )
        # 3. The prefill is encoded as it is.
        text = self.decode(self.encode(before + probe + after + self.prefill))
        _require(
            text.endswith(self.prefill),
            f"{self.folder}: the tokenizer alters the prefill {self.prefill!r}; "
            "write it another way",
        )
        return after

    def fingerprint(self) -> dict[str, Any]:
        """What decides the ids of a prompt and where an answer ends, as plain JSON values."""
        tokenizer = (self.folder / "tokenizer.json").read_bytes()
        variables = {"variables": self.variables} if self.variables else {}
        return {
            "tokenizer": sha256(tokenizer).hexdigest(),
            "template": sha256(self._template_source.encode()).hexdigest(),
            "prefill": self.prefill,
            "system": self.system,
            **variables,
            "date": TEMPLATE_DATE.isoformat(),
            "special": self._special_tokens,
            "eos": sorted(self.eos_ids),
        }

    # Text to ids

    def trace_start_ids(self, text: str) -> Ids:
        """The tokens of a response whose trace begins with ``text``."""
        return self.encode(text if self.opened else f"{OPEN}\n{text}")

    def prompt_ids(self, prompt: Prompt) -> Ids:
        """User turn, generation prompt and prefill, encoded in one piece.

        No BOS is added to what the template renders.
        """
        return self.encode(self._render_prompt(prompt.text) + self.prefill)

    def turns_ids(self, *turns: str) -> Ids:
        """Encode turns of a user and an assistant in alternation, and the generation prompt.

        Control tokens inside the turns are ordinary text: only the template begins and ends a
        turn.
        """
        _require(self._template_source, f"{self.folder}: no chat template; add chat_template.jinja")
        rendered = self.turns_text(turns)
        if not any(map(self._quoting.has_control_tokens, turns)):
            return self.encode(rendered)
        # 1. Fill the template with a mark in place of each turn, to know what is its own text.
        name = sha256(repr(turns).encode()).hexdigest()
        marks = [f"turn{place}of{name}" for place in range(len(turns))]
        frame = self.turns_text(marks)
        # 2. Put the turns in place of the marks, as they are or stripped.
        for texts in (turns, [text.strip() for text in turns]):
            pieces = _replace_marks(frame, dict(zip(marks, texts, strict=True)))
            if "".join(text for text, _ in pieces) == rendered:
                return self.encode_quoted(pieces)
        # 3. A template that alters its turns in another way: break their control tokens by a space.
        broken_turns = [*map(self._quoting.break_control_tokens, turns)]
        return self.encode(self.turns_text(broken_turns))

    def turns_text(self, turns: Sequence[str]) -> str:
        """The text that ``turns_ids`` encodes."""
        messages: list[dict[str, Any]] = []
        for role, text in zip(itertools.cycle(("user", "assistant")), turns, strict=False):
            messages.append({"role": role, "content": text})
        return self._render(messages)

    def encode_quoted(self, pieces: Sequence[tuple[str, bool]]) -> Ids:
        """Encode a text that is given in pieces.

        In a *quoted* piece (True) control tokens are ordinary text; in the others they are what
        they are. Without any in a quoted piece the ids are those of the whole text.
        """
        quoted_texts = [text for text, quoted in pieces if quoted]
        if not any(map(self._quoting.has_control_tokens, quoted_texts)):
            return self.encode("".join(text for text, _ in pieces))
        return self._quoting.encode(pieces)

    def following_ids(self, before: str, text: str) -> Ids:
        """The ids of ``text`` where ``before`` precedes it.

        Some vocabularies encode a text otherwise where it begins.
        """
        head, whole = self.encode(before), self.encode(before + text)
        return whole[len(head) :] if whole[: len(head)] == head else self.encode(text)

    def encode(self, text: str) -> Ids:
        """The ids of ``text``; nothing is added."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    # Ids to text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, with special tokens; broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", "replace")

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """``len(ids) + 1`` offsets into ``decode(ids)``: token i begins at offset i.

        A character split over several tokens belongs to the token that completes it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        ends = [0]
        for token in ids:
            ends.append(ends[-1] + len(decoder.decode(self._bytes_of(token))))
        ends[-1] += len(decoder.decode(b"", final=True))
        return ends

    def closes(self, ids: Sequence[int]) -> bool:
        """Whether the last id completes ``</think>``.

        The tag may be one token or several, and its end may be fused with what follows.
        """
        last = self._bytes_of(ids[-1]) if ids else b""
        if b">" not in last:
            return False
        tail = b"".join(map(self._bytes_of, ids[-len(CLOSE) :]))
        earliest = len(tail) - len(last) - len(CLOSE) + 1  # the tag must end in the last token
        return tail.find(CLOSE.encode(), max(0, earliest)) >= 0

    def _bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; none where it lies beyond the vocabulary."""
        if token not in self._bytes_by_token:
            piece = self._tokenizer.id_to_token(token) or ""
            # An added token stands for itself; it may hold characters that stand for no byte.
            byte_level = all(character in BYTE_BY_CHARACTER for character in piece)
            self._bytes_by_token[token] = (
                bytes(BYTE_BY_CHARACTER[character] for character in piece)
                if byte_level
                else piece.encode()
            )
        return self._bytes_by_token[token]

    # The template

    def _render_prompt(self, text: str) -> str:
        """System turn, user turn with this text, and generation prompt."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return self._render(messages)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        """Fill the template with messages and a generation prompt, as transformers does."""
        from transformers.utils.chat_template_utils import render_jinja_template

        source = DATE_CALL.sub(_fixed_date, self._template_source)
        _require(
            "strftime_now(" not in source,
            f"{self.folder}: the chat template prints the date in a format that is not fixed; "
            "write the format in quotes",
        )
        values = {"chat_template": source, **self._special_tokens, **self.variables}

        def render() -> Any:
            return render_jinja_template([messages], add_generation_prompt=True, **values)

        try:
            # A stranger's template may never end, and may raise any error of Python.
            rendered = within(TEMPLATE_SECONDS, render) if self._unproven else render()
        except TimeoutError:
            raise BadInput(
                f"{self.folder}: the chat template does not end within {TEMPLATE_SECONDS:.0f} s; "
                "correct it"
            ) from None
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"{self.folder}: the chat template fails ({reason:.200}); correct it or drop "
                "`system`"
            ) from error
        self._unproven = False
        texts, _ = rendered  # one text for each list of messages
        return str(texts[0])


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object in a model folder, {} where there is no such file; BadInput: it is corrupt."""
    content: dict[str, Any] = _read_file(file, lambda text: {**json.loads(text)})
    return content


def _read_file(file: Path, parse: Callable[[str], Any]) -> Any:
    """What a file of a model folder holds, {} where there is no such file."""
    try:
        return parse(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except Exception as error:  # tokenizers raises nothing narrower
        raise BadInput(
            f"{file}: corrupt or unreadable ({error}); put an intact copy there"
        ) from error


def _require(condition: object, message: str) -> None:
    if not condition:
        raise BadInput(message)


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, such as ``bos_token``."""
    tokens = {}
    for name, token in settings.items():
        if name.endswith("_token") and isinstance(token, str | dict):
            tokens[name] = token if isinstance(token, str) else token["content"]
    return tokens


def _fixed_date(call: re.Match[str]) -> str:
    """What a template's call ``strftime_now("...")`` says on TEMPLATE_DATE, as a string literal."""
    return repr(TEMPLATE_DATE.strftime(call[2]))


def _opens_trace(text: str) -> bool:
    """Whether a text ends inside a trace."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def _replace_marks(frame: str, text_by_mark: Mapping[str, str]) -> list[tuple[str, bool]]:
    """Cut a text at its marks: the text between them (False), and each mark's own text (True)."""
    parts = re.split(f"({'|'.join(map(re.escape, text_by_mark))})", frame)
    return [(text_by_mark.get(part, part), part in text_by_mark) for part in parts]


def _byte_by_character() -> dict[str, int]:
    """The byte for which each character of a byte-level vocabulary stands.

    Printable bytes are written as themselves, the others as the characters from 256 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    bytes_ = {chr(byte): byte for byte in printable}
    bytes_.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return bytes_


BYTE_BY_CHARACTER = _byte_by_character()
