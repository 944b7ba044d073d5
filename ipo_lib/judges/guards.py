"""Guard models as judges.

1. ``guards.yml`` says what each guard reads, which answers it may give, and which label each means.
2. The guard reads an exchange, and the probability of each of these answers is computed. Nothing is
   drawn.
3. A label's probability is the sum over its answers. The likeliest label is the verdict, unless all
   answers together have too little probability: then the guard would have said something else.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.chat import Chat, read_json
from ipo_lib.engines import hub
from ipo_lib.engines.openai_api import Server
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.engines.vllm import ServerSampler
from ipo_lib.judging import HARM, Exchange
from ipo_lib.records import UNSAFE, BadInput, Ids, Verdict, from_json, to_json
from ipo_lib.sampling import Request, Sampler, Sampling

GUARDS_FILE = Path(__file__).with_name("guards.yml")
PLAIN_SAMPLING = Sampling(temperature=1.0, top_p=1.0)  # the model's own probabilities
PROMPT, RESPONSE = "{prompt}", "{response}"


@dataclass(frozen=True)
class Guard:
    """A guard model as data."""

    hub: str  # its name on the hub
    about: str
    answers: Mapping[str, Mapping[str, str]]  # by question: each answer and its label
    text: str = ""  # its input with {prompt} and {response}; empty: its chat template's
    mass: float = 0.5  # least probability of all answers together
    trace: float = math.nan  # F1 on reasoning, where published


@functools.cache
def load_guards() -> dict[str, Guard]:
    """The guards of ``guards.yml`` by name."""
    data = yaml.safe_load(GUARDS_FILE.read_text("utf-8"))
    return {name: from_json(Guard, settings) for name, settings in data.items()}


@dataclass(frozen=True)
class GuardJudge:
    """A guard as a judge.

    ``p`` of its verdicts is the share of "unsafe" in the probability of its answers, ``raw`` the
    probability of each label. An exchange gets the label None where its text does not fit, the
    guard does not answer its question, or the guard would have said something else.
    """

    name: str
    guard: Guard
    chat: Chat
    sampler: Sampler
    context: float = math.inf  # tokens that the model can read

    def fingerprint(self) -> dict[str, Any]:
        """What the guard reads, how its answers are read, and the model that answers."""
        data = to_json(self.guard)
        return {
            "judge": "guard",
            **{name: data[name] for name in ("text", "answers", "mass")},
            "control_tokens": "text",
            "sampler": self.sampler.fingerprint(),
        }

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[Verdict]:
        """One verdict per exchange.

        The answers to one exchange are scored one after the other, so that a model in this process
        reads the exchange once for all of them.
        """
        context = self.context
        if isinstance(self.sampler, ServerSampler):
            context = min(context, self.sampler.server.context())
        requests = [self._requests(exchange, context) for exchange in exchanges]
        flat = [request for group in requests for request in group]
        scores = iter(self.sampler.score(flat, PLAIN_SAMPLING) if flat else ())
        for exchange, group in zip(exchanges, requests, strict=True):
            probabilities = [math.prod(next(scores)) for _ in group]
            yield self._verdict(exchange, probabilities)

    def prompt_ids(self, exchange: Exchange) -> Ids:
        """What the guard reads of an exchange, where control tokens are ordinary text."""
        text = exchange.text or ""
        if not self.guard.text:
            return self.chat.turns_ids(exchange.prompt, text)
        before, _, rest = self.guard.text.partition(PROMPT)
        between, _, after = rest.partition(RESPONSE)
        prompt_pieces = [(before, False), (exchange.prompt, True)]  # (text, whether it is quoted)
        response_pieces = [(between, False), (text, True), (after, False)]
        return self.chat.encode_quoted(prompt_pieces + response_pieces)

    def _requests(self, exchange: Exchange, context: float) -> list[Request]:
        """One request per answer; none if there is nothing to judge or an answer does not fit."""
        if not exchange.text:
            return []
        prompt = self.prompt_ids(exchange)
        requests = []
        for answer in self.guard.answers.get(exchange.question, {}):
            answer_ids = self._answer_ids(answer)
            if len(prompt) + len(answer_ids) >= context:
                return []
            requests.append(Request(exchange.rollout_id, prompt, answer_ids, 0))
        return requests

    def _answer_ids(self, answer: str) -> Ids:
        """The ids of an answer as it follows what the guard reads."""
        before = self.guard.text.replace(RESPONSE, "x").replace(PROMPT, "x")
        return self.chat.following_ids(before or self.chat.turns_text(["x", "x"]), answer)

    def _verdict(self, exchange: Exchange, probabilities: Sequence[float]) -> Verdict:
        """The verdict from the probabilities of the question's answers; none: not judged."""
        if not probabilities:
            return exchange.verdict(None, "", self.name)
        # Several answers may mean the same label.
        sums: dict[str, float] = defaultdict(float)
        labels = self.guard.answers[exchange.question].values()
        for label, probability in zip(labels, probabilities, strict=True):
            sums[label] += probability
        total = sum(sums.values())
        raw = ", ".join(f"{label} {share:.4f}" for label, share in sums.items())
        if total < self.guard.mass:
            return exchange.verdict(None, raw, self.name)
        verdict = exchange.verdict(max(sums, key=sums.__getitem__), raw, self.name)
        if exchange.question != HARM:
            return verdict
        return replace(verdict, p=sums[UNSAFE] / total)


def guard(
    name: str,
    revision: str = "",
    folder: str = "",
    server: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> GuardJudge:
    """A guard of ``guards.yml`` as a judge, in this process or behind a server.

    Args:
        name: in ``guards.yml``.
        revision: commit on the hub, from which it is taken without a ``folder``.
        folder: of the model; behind a server only its tokenizer is needed.
        server: settings of a ``Server``; None: in this process.
        device, dtype, quantize: as in ``TransformersSampler``.

    Raises:
        BadInput: the guard is unknown or cannot be had.
    """
    if name not in load_guards():
        raise BadInput(f"guard {name!r} is unknown; choose one of {', '.join(load_guards())}")
    spec = load_guards()[name]
    place = folder or hub.folder(spec.hub, revision, chat_only=bool(server))
    chat = Chat(Path(place).expanduser(), guard=True)
    context = read_json(chat.folder / "config.json").get("max_position_embeddings", math.inf)
    sampler: Sampler
    if server:
        sampler = ServerSampler(from_json(Server, dict(server)), chat)
    else:
        options: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize}
        sampler = TransformersSampler(chat.folder, chat, **options)
    return GuardJudge(name, spec, chat, sampler, context)
