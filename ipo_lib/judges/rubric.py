"""A chat model behind an OpenAI-compatible server as judge.

1. The model is asked with a written rubric (``rubric.yml``) and quotes the request and the text.
2. Its answer must end in a verdict line, such as ``VERDICT: safe``. Any other answer gets the label
   None, and its words are kept.
3. It is asked no more when its budget is spent, or when too few of its answers can be read.

The text that is judged may try to pass its own verdict. Two things keep it inside its quotation:
the lines around it carry a random mark that is new in each call, and control tokens in it are
broken by a space.
"""

from __future__ import annotations

import re
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.engines.budget import Budget, shared_budget
from ipo_lib.engines.openai_api import Declined, Server, Unanswered
from ipo_lib.judging import Exchange, without_control_tokens
from ipo_lib.records import BadInput, Verdict, digest, from_json

VERSION = 2  # of the rubrics and of how they are asked and read; raised when the meaning changes
MARKUP = re.compile(r"[*_`#>\"'\u201c\u201d\u2018\u2019\\$]")  # what may surround the verdict line
LAST = re.compile(r"(?:[-\u2022]\s+)?verdict\s*[:\uff1a]\s*([a-z]+)\s*[.!\u3002]?")
MARK_BYTES = 8


@dataclass(frozen=True)
class Rubric:
    """How one question is put, and the labels that may answer it."""

    text: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class RubricPrompts:
    """The texts of ``rubric.yml``."""

    rubrics: Mapping[str, Rubric]  # by question
    parts: Mapping[str, str]  # by part of a rollout, what it is called
    quoted: str  # how quotations are marked
    ask: str  # the user's message; the possible verdict lines follow it


PROMPTS = from_json(
    RubricPrompts, yaml.safe_load(Path(__file__).with_name("rubric.yml").read_text("utf-8"))
)


@dataclass
class AnswerLog:
    """Which answers of a judge could be read."""

    readable: int = 0  # since the judge was last asked
    unreadable: int = 0  # since the judge was last asked
    recent: deque[bool] = field(default_factory=deque)  # the last answers, over several calls
    stopped: bool = False  # too few could be read

    def begin(self) -> None:
        """Start counting for a new call; after a stop, forget the recent answers too."""
        self.readable = self.unreadable = 0
        if self.stopped:
            self.recent.clear()
        self.stopped = False

    def add(self, readable: bool, stretch: int) -> None:
        """Count one more answer; ``recent`` keeps the last ``stretch``."""
        if readable:
            self.readable += 1
        else:
            self.unreadable += 1
        self.recent.append(readable)
        while len(self.recent) > stretch:
            self.recent.popleft()


@dataclass(frozen=True)
class RubricJudge:
    """Judges by a rubric.

    It stops with ``BadInput`` where a bound is reached or a request gets no answer at all; verdicts
    so far are kept. A request that the server declines (too long, filtered) gets the label None.
    """

    server: Server
    budget: Budget = field(default_factory=Budget, compare=False)
    max_tokens: int = 400  # of an answer
    temperature: float = 0.0
    nonsense: int = 20  # stop after so many answers of which none can be read
    stretch: int = 100  # look at so many recent answers; 0: no bound on their readability
    unreadable: float = 0.5  # stop where a larger share of them cannot be read
    log: AnswerLog = field(default_factory=AnswerLog, compare=False)

    def fingerprint(self) -> dict[str, Any]:
        """The model, how it is asked, and the hash of the rubrics."""
        rubrics = {name: (rubric.text, rubric.labels) for name, rubric in PROMPTS.rubrics.items()}
        texts = [rubrics, PROMPTS.parts, PROMPTS.quoted, PROMPTS.ask + " "]
        return {
            "judge": "rubric",
            **self.server.identity(),
            "version": VERSION,
            "rubrics": digest([*texts, MARKUP.pattern, LAST.pattern]),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[Verdict]:
        """One verdict per exchange, many asked at a time.

        Raises:
            BadInput: a bound is reached; the verdicts before it are yielded first.
        """
        self.log.begin()
        yield from self.server.each(exchanges, self._verdict)

    def messages(self, exchange: Exchange) -> list[Mapping[str, str]]:
        """What the model is asked about an exchange, with a new mark around what is quoted."""
        rubric = PROMPTS.rubrics[exchange.question]
        prompt = without_control_tokens(exchange.prompt)
        text = without_control_tokens(exchange.text or "")
        system = rubric.text.format(what=PROMPTS.parts[exchange.part], quoted=PROMPTS.quoted)
        ask = PROMPTS.ask.format(mark=new_mark(prompt + text), prompt=prompt, text=text)
        choices = " or ".join(f"VERDICT: {label}" for label in rubric.labels)
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": f"{ask} {choices}"},
        ]

    def _verdict(self, exchange: Exchange) -> Verdict:
        answer, label = "", None
        if exchange.text and exchange.question in PROMPTS.rubrics:
            answer = self._answer(exchange)
            word = last_word(answer)
            if word in PROMPTS.rubrics[exchange.question].labels:
                label = word
            with self.budget.lock:  # many threads judge at once
                self.log.add(label is not None, self.stretch)
        return exchange.verdict(label, answer, f"rubric({self.server.model})")

    def _answer(self, exchange: Exchange) -> str:
        """The model's whole answer, or in a few words why there is none.

        Raises:
            BadInput: no more may be asked, or the server does not answer.
        """
        name, messages = f"judge {self.server.model!r}", self.messages(exchange)
        self._check_readable(name)
        # A token has at least one character, so this is the most that can be read.
        characters = sum(len(message["content"]) for message in messages)
        reserved = self.budget.reserve(name, characters, self.max_tokens)
        try:
            reply = self.server.chat(messages, self.max_tokens, self.temperature)
        except Declined as error:
            self.budget.release(reserved)
            return f"declined: {error}"
        except BadInput:
            self.budget.release(reserved)
            raise
        except Unanswered as error:
            raise BadInput(
                f"{name}: no answer ({error}); verdicts so far are kept, run again when it is well"
            ) from None
        self.budget.settle(reserved, reply.usage)
        return reply.missing or reply.text

    def _check_readable(self, name: str) -> None:
        """BadInput where too few answers can be read to go on paying for more."""
        log, hint = self.log, "take a model that follows the rubric, or raise"
        with self.budget.lock:
            if not log.readable and log.unreadable >= self.nonsense:
                log.stopped = True
                raise BadInput(
                    f"{name}: none of {log.unreadable} answers ends in a verdict line; "
                    f"{hint} nonsense"
                )
            if not self.stretch or len(log.recent) < self.stretch:
                return
            lost = log.recent.count(False)
            if lost > self.unreadable * len(log.recent):
                log.stopped = True
                raise BadInput(
                    f"{name}: {lost} of the last {len(log.recent)} answers have no verdict line "
                    f"that can be read; verdicts so far are kept; {hint} unreadable"
                )


def new_mark(quoted: str) -> str:
    """A random mark that does not occur in the text that it will surround."""
    mark = secrets.token_hex(MARK_BYTES)
    while mark in quoted:
        mark = secrets.token_hex(MARK_BYTES)
    return mark


def last_word(answer: str) -> str:
    """The verdict in an answer's last line that holds more than markup; empty if there is none."""
    lines = [MARKUP.sub("", line).strip() for line in answer.splitlines()]
    last = next((line for line in reversed(lines) if line), "")
    match = LAST.fullmatch(last.casefold())
    return match[1] if match else ""


def rubric(
    server: Mapping[str, Any],
    *,
    budget: float = 0.0,
    calls: int = 0,
    dollars_in: float = 0.0,
    dollars_out: float = 0.0,
    **settings: Any,
) -> RubricJudge:
    """A rubric judge from the plain settings of a profile.

    Args:
        server: settings of a ``Server``.
        budget: dollars that may be spent; 0: no bound.
        calls: requests that may be made; 0: no bound.
        dollars_in: price of a million tokens read.
        dollars_out: price of a million tokens generated.
        settings: other fields of ``RubricJudge``.

    Returns:
        The judge. All judges of one server in one process share its budget.
    """
    opened = from_json(Server, dict(server))
    prices = {"dollars_in": dollars_in, "dollars_out": dollars_out}
    bounds = shared_budget(opened, "judge", dollars=budget, calls=calls, **prices)
    return RubricJudge(opened, bounds, **settings)
