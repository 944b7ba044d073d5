"""Prompt to ids, text to trace and answer: the only module that knows ``<think>``, templates, BOS, EOS. Torch-free."""

from __future__ import annotations

import codecs
import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from ipo_lib.records import ANSWER, BOTH, CONTINUATION, TRACE, BadInput, Ids, Prompt, Rollout

OPEN, CLOSE = "<think>", "</think>"
TEMPLATE_DATE = datetime.date(
    2024, 7, 26
)  # "today" for templates that print it: a prompt must not change overnight
PROBE = "How tall is a lighthouse"
BRACKETED = re.compile(
    r"[<\[].*[>\]]", re.DOTALL
)  # how added tokens look that are no mere words or spaces
FLAGS = (
    "doubled",
    "preamble",
    "unopened",
)  # a tag came twice, text before <think>, </think> without <think>
# Byte-level vocabularies write a printable byte as itself, the others as the characters from 256 on, in their order.
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE = {chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_SHOWN)))}
_BYTE |= {chr(byte): byte for byte in _SHOWN}


class Chat:
    """How a model folder is spoken to: template, ``prefill``, ``system`` turn; ``opened``: prompts end in an open ``<think>``.
    ``guard``: a model that only judges: its text is never cut, so that any tokenizer will do, and a template may be missing.
    BadInput: the folder is corrupt, lacks a byte-level tokenizer, template or EOS, or loses or doubles what is given."""

    def __init__(
        self,
        folder: Path | str,
        *,
        prefill: str = "",
        system: str | None = None,
        guard: bool = False,
    ) -> None:
        self.folder, self.prefill, self.system = Path(folder), prefill, system
        self._tokenizer, self._tokens = (
            parsed(self.folder / "tokenizer.json", Tokenizer.from_str),
            dict[int, bytes](),
        )
        _require(
            self._tokenizer,
            f"{folder}: no tokenizer.json; name a model folder that holds one (a fast tokenizer)",
        )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        exact = "ByteLevel" in str(self._tokenizer.decoder)
        _require(
            exact or guard,
            f"{folder}: cuts need a byte-level vocabulary; use a Llama 3, Qwen, SmolLM or R1 model",
        )
        settings = parsed(self.folder / "tokenizer_config.json")
        named = {
            key: one
            for key, one in settings.items()
            if key.endswith("_token") and isinstance(one, (str, dict))
        }
        self._special = {
            key: one if isinstance(one, str) else one["content"] for key, one in named.items()
        }
        found = [
            parsed(self.folder / name).get("eos_token_id")
            for name in ("generation_config.json", "config.json")
        ]
        own = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
        ends = {
            one
            for value in (own, *found)
            for one in (value if isinstance(value, list) else [value])
            if one is not None
        }
        self.eos_ids: Ids = tuple(
            sorted(ends, key=lambda one: (one != own, one))
        )  # the end of a turn first, a document's after
        _require(
            ends, f"{folder}: no end-of-sequence token; set eos_token_id in generation_config.json"
        )
        template = (
            parsed(self.folder / "chat_template.jinja", str) or settings.get("chat_template") or ""
        )
        templates = (
            template if isinstance(template, list) else [{"name": "default", "template": template}]
        )
        self._template = next(
            (str(one["template"]) for one in templates if one["name"] == "default"), ""
        )
        self.opened = False
        if guard:
            return
        _require(
            self._template,
            f"{folder}: no chat template; add chat_template.jinja or use an instruct model",
        )
        before, probe, after = self._render(PROBE).rpartition(PROBE)
        lost = "" if probe and (system or "").strip() in before else "system" if probe else "user"
        _require(not lost, f"{folder}: the chat template drops the {lost} turn; mend the template")
        doubled = after.rfind(OPEN) > after.rfind(CLOSE) and prefill.lstrip().startswith(OPEN)
        _require(
            not doubled,
            f"{folder}: the chat template opens {OPEN} itself; drop it from {prefill!r}",
        )
        kept = self.decode(self.encode(before + probe + after + prefill)).endswith(prefill)
        _require(
            kept, f"{folder}: the tokenizer alters the prefill {prefill!r}; write it another way"
        )
        self.opened = (after + prefill).rfind(OPEN) > (after + prefill).rfind(CLOSE)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the ids of a prompt and where an answer ends, as plain JSON values."""
        files = {
            "tokenizer": (self.folder / "tokenizer.json").read_bytes(),
            "template": self._template.encode(),
        }
        hashes = {name: sha256(content).hexdigest() for name, content in files.items()}
        given = {"prefill": self.prefill, "system": self.system, "date": TEMPLATE_DATE.isoformat()}
        return {**hashes, **given, "special": self._special, "eos": sorted(self.eos_ids)}

    def prompt_ids(self, prompt: Prompt) -> Ids:
        """User turn, generation prompt and prefill, encoded in one piece; no BOS but the one the template renders."""
        return self.encode(self._render(prompt.text) + self.prefill)

    def turns_ids(self, *turns: str) -> Ids:
        """Turns of a user and an assistant in alternation, and the generation prompt. Control tokens inside the turns are
        ordinary text: only the template begins and ends a turn."""
        _require(self._template, f"{self.folder}: no chat template; add chat_template.jinja")
        whole = self.turns_text(turns)
        if not any(map(self._control.search, turns)):
            return self.encode(whole)
        # The template is filled with marks in place of the turns, to know what is its own.
        marks = [
            f"turn{place}of{sha256(repr(turns).encode()).hexdigest()}"
            for place in range(len(turns))
        ]
        frame = self.turns_text(marks)
        for texts in (turns, tuple(text.strip() for text in turns)):
            pieces = _quoted(frame, dict(zip(marks, texts, strict=True)))
            if "".join(text for text, _ in pieces) == whole:
                return self.encode_quoted(pieces)
        # A template that alters its turns in another way: their control tokens are broken by a space.
        return self.encode(
            self.turns_text(
                [self._control.sub(lambda one: f"{one[0][0]} {one[0][1:]}", text) for text in turns]
            )
        )

    def turns_text(self, turns: Sequence[str]) -> str:
        """What ``turns_ids`` encodes."""
        roles = ("user", "assistant") * len(turns)
        return self._fill(
            [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        )

    def encode_quoted(self, pieces: Sequence[tuple[str, bool]]) -> Ids:
        """The ids of the pieces of a text, one after the other.

        In a *quoted* piece (True) control tokens are ordinary text; in the others they are what they
        are. Without any in a quoted piece the ids are those of the whole text.
        """
        if not any(quoted and self._control.search(text) for text, quoted in pieces):
            return self.encode("".join(text for text, _ in pieces))
        ids: list[int] = []
        plain = ""  # text that is not encoded yet, without control tokens of our own
        for text, quoted in pieces:
            done = 0
            for token, (start, end) in [] if quoted else self._control_tokens(text):
                ids += [*self._encode_plain(plain + text[done:start]), token]
                plain, done = "", end
            plain += text[done:]
        return (*ids, *self._encode_plain(plain))

    def _control_tokens(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """The control tokens in a text with their spans."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return [one for one in zip(found.ids, found.offsets, strict=True) if one[0] in self._added]

    def _encode_plain(self, text: str) -> Ids:
        """The ids of a text in which nothing is a control token."""
        ids: list[int] = []
        done = 0
        for one in self._loose.finditer(
            text
        ):  # not covered by the tokenizer's option: cut after the first character
            ids += self._plain.encode(text[done : one.start() + 1], add_special_tokens=False).ids
            done = one.start() + 1
        return (*ids, *self._plain.encode(text[done:], add_special_tokens=False).ids)

    @functools.cached_property
    def _added(self) -> dict[int, Any]:
        """The control tokens of the vocabulary: all special ones, and others in angle or square brackets."""
        every = self._tokenizer.get_added_tokens_decoder()
        return {
            token: one
            for token, one in every.items()
            if one.special or BRACKETED.fullmatch(one.content)
        }

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches a control token of the vocabulary."""
        return _any_of([one.content for one in self._added.values()])

    @functools.cached_property
    def _loose(self) -> re.Pattern[str]:
        """Matches a control token that is not marked as special, such as a tag of reasoning or of a tool."""
        return _any_of([one.content for one in self._added.values() if not one.special])

    @functools.cached_property
    def _plain(self) -> Any:
        """The same tokenizer, for which special tokens are ordinary text."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def following_ids(self, before: str, text: str) -> Ids:
        """The ids of ``text`` where ``before`` precedes it: some vocabularies mark the begin of a text, which it is not."""
        head, whole = self.encode(before), self.encode(before + text)
        return whole[len(head) :] if whole[: len(head)] == head else self.encode(text)

    def encode(self, text: str) -> Ids:
        """The ids of ``text``; nothing is added."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``: special tokens stay, nothing is cleaned up, broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """``len(ids) + 1`` offsets into ``decode(ids)``; a split character belongs to the token that completes it."""
        decoder, ends = codecs.getincrementaldecoder("utf-8")("replace"), [0]
        for token in ids:
            ends.append(ends[-1] + len(decoder.decode(self._bytes(token))))
        ends[-1] += len(decoder.decode(b"", final=True))
        return ends

    def closes(self, ids: Sequence[int]) -> bool:
        """Whether the last id completes ``</think>``: one token, the last of several, or fused with its neighbours."""
        last = self._bytes(ids[-1]) if ids else b""
        tail = b"".join(map(self._bytes, ids[-len(CLOSE) :])) if b">" in last else b""
        return tail.find(CLOSE.encode(), max(0, len(tail) - len(last) - len(CLOSE) + 1)) >= 0

    def _bytes(self, token: int) -> bytes:
        if token not in self._tokens:
            piece = (
                self._tokenizer.id_to_token(token) or ""
            )  # embeddings are padded beyond the vocabulary
            plain = all(
                char in _BYTE for char in piece
            )  # an added token may hold spaces, which stand for themselves
            self._tokens[token] = bytes(_BYTE[char] for char in piece) if plain else piece.encode()
        return self._tokens[token]

    def _render(self, text: str) -> str:
        return self._fill(
            [{"role": "system", "content": self.system}] * bool(self.system)
            + [{"role": "user", "content": text}]
        )

    def _fill(self, turns: Sequence[Mapping[str, str | None]]) -> str:
        from transformers.utils.chat_template_utils import (
            _compile_jinja_template as compiled,
        )  # sandboxed, cached

        values = {
            "tools": None,
            "documents": None,
            "strftime_now": TEMPLATE_DATE.strftime,
            **self._special,
        }
        try:
            return str(
                compiled(self._template).render(
                    messages=turns, add_generation_prompt=True, **values
                )
            )
        except TemplateError as error:
            raise BadInput(
                f"{self.folder}: the chat template fails ({error}); mend it or drop `system`"
            ) from error


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Matches each of these texts, the longest first; nothing where there is none."""
    ordered = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _quoted(frame: str, texts: Mapping[str, str]) -> list[tuple[str, bool]]:
    """A text with marks as pieces: what stands between the marks (False), and the text of each mark (True)."""
    parts = re.split(f"({'|'.join(map(re.escape, texts))})", frame)
    return [(texts.get(part, part), part in texts) for part in parts]


def _require(given: object, message: str) -> None:
    if not given:
        raise BadInput(message)


def parsed(file: Path, parse: Callable[[str], Any] = lambda text: {**json.loads(text)}) -> Any:
    """A file of a model folder, ``{}`` when it is not there; BadInput when it is corrupt."""
    try:
        return parse(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except Exception as error:  # tokenizers raises nothing narrower
        raise BadInput(
            f"{file}: corrupt or unreadable ({error}); put an intact copy there"
        ) from error


@dataclass(frozen=True)
class Parts:
    """Character spans, None where there is nothing to read; ``closed``: no trace is left open; flags are of FLAGS."""

    reasoning: tuple[int, int] | None
    answer: tuple[int, int] | None
    closed: bool
    flags: tuple[str, ...] = ()


def split(text: str, opened: bool) -> Parts:
    """Trace and answer of a rollout's text, split at the first ``</think>``; ``opened``: the prompt opened it."""
    head, close, tail = text.partition(CLOSE)
    before, tag, inside = head.partition(OPEN)
    plain = not (opened or tag or close)
    start = len(head) - len(inside) if tag and not (opened and before.strip()) else 0
    spans = (start, 0 if plain else len(head)), (0 if plain else len(text) - len(tail), len(text))
    reasoning, answer = (one if text[slice(*one)].strip() else None for one in spans)
    doubled = text.count(OPEN) + opened > 1 or text.count(CLOSE) > 1
    preamble, unopened = not opened and tag and before.strip(), close and not (opened or tag)
    flags = tuple(name for name, on in zip(FLAGS, (doubled, preamble, unopened), strict=True) if on)
    return Parts(reasoning, answer, bool(close) or plain, flags)


def part_text(rollout: Rollout, part: str, opened: bool, offsets: Sequence[int] = ()) -> str | None:
    """What a judge reads, without tags; None when the part does not exist. CONTINUATION needs the ``Chat.offsets``."""
    if part == CONTINUATION:
        return (
            rollout.text[offsets[rollout.prefix_len] if rollout.prefix_len else 0 :].strip() or None
        )
    _require(
        part in (TRACE, ANSWER, BOTH),
        f"part {part!r}: choose {TRACE}, {ANSWER}, {BOTH} or {CONTINUATION}",
    )
    parts = split(rollout.text, opened)
    trace, answer = (
        rollout.text[slice(*one)].strip() if one else "" for one in (parts.reasoning, parts.answer)
    )
    return {TRACE: trace, ANSWER: answer, BOTH: f"{trace}\n\n{answer}".strip() if answer else ""}[
        part
    ] or None


def cut_off(rollout: Rollout, part: str, opened: bool) -> bool:
    """Whether a part ended before the model ended it: what it would have become is not known.

    A trace is whole when it was closed; an answer when the response ended; a continuation when either did.
    Where the model writes no trace at all, the whole response stands for both parts.
    """
    if rollout.finish == "length" and part in (ANSWER, BOTH, CONTINUATION):
        return True
    if part != TRACE or rollout.finish == "think" or CLOSE in rollout.text:
        return False
    thinks = opened or OPEN in rollout.text
    return thinks or rollout.finish == "length"
