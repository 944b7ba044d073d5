"""Guard models: one class reads what a guard is from data (``guards.yml``) and weighs its possible answers by probability."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.chat import Chat, parsed
from ipo_lib.engines import hub
from ipo_lib.engines.openai_api import Server
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.engines.vllm import ServerSampler
from ipo_lib.judging import HARM, Exchange
from ipo_lib.records import UNSAFE, BadInput, Ids, Verdict, from_json, to_json
from ipo_lib.sampling import Request, Sampler, Sampling

KNOWN = Path(__file__).with_name("guards.yml")
WEIGHED = Sampling(temperature=1.0, top_p=1.0)
PROMPT, RESPONSE = "{prompt}", "{response}"


@dataclass(frozen=True)
class Guard:
    """What a guard model reads and says. ``text``: its input with ``{prompt}`` and ``{response}``; empty: a user's and an
    assistant's turn in its own chat template. ``answers``: by question, each answer that is weighed and its label. ``mass``: the
    probability that all of them together must have, or the guard said something else. ``trace``: F1 on reasoning, where known."""

    hub: str
    about: str
    answers: Mapping[str, Mapping[str, str]]
    text: str = ""
    mass: float = 0.5
    trace: float = math.nan


@functools.cache
def known() -> dict[str, Guard]:
    """The guards of ``guards.yml``."""
    return {
        name: from_json(Guard, one)
        for name, one in yaml.safe_load(KNOWN.read_text("utf-8")).items()
    }


@dataclass(frozen=True)
class GuardJudge:
    """A guard as a judge. ``p`` is the share of unsafe among its weighed answers, ``raw`` the label's probabilities; a text that
    does not fit, a question it does not answer and an answer outside the weighed ones get None."""

    name: str
    guard: Guard
    chat: Chat
    sampler: Sampler
    context: float = math.inf

    def fingerprint(self) -> dict[str, Any]:
        """What the guard reads and how its answers are weighed, and the model that answers."""
        data = to_json(self.guard)
        return {
            "judge": "guard",
            **{name: data[name] for name in ("text", "answers", "mass")},
            "control_tokens": "text",
            "sampler": self.sampler.fingerprint(),
        }

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[Verdict]:
        """One verdict an exchange. Its answers are asked for one after the other, so that a model in this process reads the
        exchange once for all of them."""
        served = (
            self.sampler.server.context() if isinstance(self.sampler, ServerSampler) else math.inf
        )
        context = min(self.context, served)
        asked = [
            (e, self.prompt_ids(e) if e.text else (), self.guard.answers.get(e.question, {}))
            for e in exchanges
        ]
        encoded = {
            answer: self._answer_ids(answer)
            for answer in dict.fromkeys(itertools.chain(*(own for *_, own in asked)))
        }
        weighed = [{answer: encoded[answer] for answer in answers} for _, _, answers in asked]
        requests = [
            [
                Request(e.rollout_id, ids, answer, 0)
                for answer in own.values()
                if ids and len(ids) + len(answer) < context
            ]
            for (e, ids, _), own in zip(asked, weighed, strict=True)
        ]
        flat = [one for own in requests for one in own]
        scores = iter(self.sampler.score(flat, WEIGHED) if flat else ())
        for (e, _, answers), own in zip(asked, requests, strict=True):
            chances = [math.prod(next(scores)) for _ in own]
            yield self.verdict(
                e, dict(zip(answers, chances, strict=True)) if len(chances) == len(answers) else {}
            )

    def prompt_ids(self, e: Exchange) -> Ids:
        """What the guard reads of an exchange; control tokens in the prompt and the response are ordinary text."""
        if not self.guard.text:
            return self.chat.turns_ids(e.prompt, e.text or "")
        before, _, rest = self.guard.text.partition(PROMPT)
        between, _, after = rest.partition(RESPONSE)
        pieces = [
            (before, False),
            (e.prompt, True),
            (between, False),
            (e.text or "", True),
            (after, False),
        ]
        return self.chat.encode_quoted(pieces)

    def _answer_ids(self, answer: str) -> Ids:
        """The ids of an answer where it follows what the guard reads."""
        before = self.guard.text.replace(RESPONSE, "x").replace(
            PROMPT, "x"
        ) or self.chat.turns_text(["x", "x"])
        return self.chat.following_ids(before, answer)

    def verdict(self, e: Exchange, chances: Mapping[str, float]) -> Verdict:
        """The likeliest label, where the weighed answers hold enough of the probability."""
        sums: dict[str, float] = defaultdict(float)
        for answer, chance in chances.items():
            sums[self.guard.answers[e.question][answer]] += chance
        total = sum(sums.values())
        sure = total >= self.guard.mass
        label = max(sums, key=sums.__getitem__) if sure else None
        p = sums[UNSAFE] / total if sure and e.question == HARM else None
        raw = ", ".join(f"{name} {chance:.4f}" for name, chance in sums.items())
        return Verdict(e.rollout_id, e.part, e.question, label, p, raw, self.name)


def guard(
    name: str,
    revision: str = "",
    folder: str = "",
    server: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> GuardJudge:
    """A guard of ``guards.yml`` as a judge: in this process from ``folder`` or the hub at ``revision``, or behind a ``server``
    (its settings), where only its tokenizer is needed here. BadInput: the guard is unknown or cannot be had."""
    if name not in known():
        raise BadInput(f"guard {name!r} is unknown; choose one of {', '.join(known())}")
    own = known()[name]
    place = folder or hub.folder(own.hub, revision, chat_only=bool(server))
    chat = Chat(Path(place).expanduser(), guard=True)
    context = parsed(chat.folder / "config.json").get("max_position_embeddings", math.inf)
    sampler: Sampler = (
        TransformersSampler(chat.folder, chat, device=device, dtype=dtype, quantize=quantize)
        if not server
        else (ServerSampler(from_json(Server, dict(server)), chat))
    )
    return GuardJudge(name, own, chat, sampler, context)
