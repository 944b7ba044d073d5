"""Searches on a scripted world through the real steps: both kinds of turn, and what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from doubles import ScriptedSampler
from scripted import (
    ASIDE,
    CLOSE,
    CUE,
    PROMPTS,
    PROOF,
    STEP,
    TRIGGER,
    named,
    rollout,
    session,
    world,
)

from ipo_lib import stages
from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.pairs import PairSettings
from ipo_lib.records import SAFE, UNSAFE, BadInput, Rollout, Rollouts
from ipo_lib.sampling import Completion, Request, Sampling
from ipo_lib.stages import Session
from ipo_lib.turning_points import curves, locate
from ipo_lib.turning_points.adaptive import SearchSettings, adaptive
from ipo_lib.turning_points.locate import LocatedTurns

THINK = Sampling(max_tokens=400, until="think")
CSR, SEARCH = CsrSettings(), SearchSettings(confirm=8)
LABELS = {"good": SAFE, "bad": UNSAFE}


@pytest.fixture
def good(chat: Chat) -> Rollout:
    """A safe trace of the scripted world; S is 0.5 until the second sentence settles it."""
    text = f"{ASIDE}\n{TRIGGER}\n{PROOF}\n{CLOSE}"
    return rollout(chat, text, id_="good", finish="think")


@pytest.fixture
def bad(chat: Chat) -> Rollout:
    """An unsafe trace of the scripted world."""
    text = f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}"
    return rollout(chat, text, id_="bad", prompt="p1", finish="think")


@pytest.fixture
def run(tmp_path: Path, chat: Chat) -> Session:
    return session(tmp_path, chat, world(chat))


def find(
    run: Session, rollouts: Rollouts, kind: str = SAFE, csr: CsrSettings = CSR
) -> LocatedTurns:
    labels = {r.id: UNSAFE if r.prompt_id == "p1" and kind == UNSAFE else SAFE for r in rollouts}
    return locate.find_turns(run, named(), rollouts, labels, kind, csr, SEARCH, THINK)


def copies(trace: Rollout, count: int) -> list[Rollout]:
    """The same trace as an answer to several prompts."""
    return [replace(trace, id=f"good{n}", prompt_id=f"p{n}") for n in range(count)]


def test_traces_hold_what_a_search_needs(run: Session, good: Rollout) -> None:
    known = locate.describe_traces(run, named(), [good], LABELS, THINK)["good"]
    spans = stages.trace_sentences(run, good)
    assert known.token_ids == good.token_ids
    assert known.ends == tuple(span.token_end for span in spans)
    turn = spans[1].token_start
    assert known.p[turn] == pytest.approx(0.5, abs=0.25)
    assert min(p for place, p in enumerate(known.p) if place != turn) > 0.9


@pytest.mark.parametrize("kind", [SAFE, UNSAFE])
def test_both_kinds_of_turn_are_found_and_stored(
    tmp_path: Path, chat: Chat, good: Rollout, bad: Rollout, kind: str
) -> None:
    trace = good if kind == SAFE else bad
    sampler = world(chat)
    located = find(session(tmp_path, chat, sampler), [trace], kind)
    turn, drawn = located.turns[trace.id], located.drawn[trace.id]
    assert turn.sentence == 1
    assert turn.rollouts == len(drawn)
    assert turn.tokens == sum(len(r.token_ids) - r.prefix_len for r, _ in drawn)
    assert turn.rollouts < 32 * 4
    fresh = [r for r, _ in drawn if r.draw >= locate.FIRST_FRESH]
    assert len(fresh) == 2 * SEARCH.confirm
    assert len({(r.prefix_len, r.draw) for r, _ in drawn}) == turn.rollouts
    answered = len(sampler.answered)
    assert find(session(tmp_path, chat, sampler), [trace], kind) == located
    assert len(sampler.answered) == answered


def test_harm_that_stands_already_needs_no_draw(run: Session, chat: Chat, bad: Rollout) -> None:
    text = f"{ASIDE}\n{CUE}\n{STEP}\n{ASIDE}\n{CLOSE}"
    long = rollout(chat, text, id_="long", prompt="p1", finish="think")
    labels = {"long": UNSAFE}
    ends = [span.token_end for span in stages.trace_sentences(run, long)]
    for absorbing, settled in ((False, None), (True, ends[2])):
        known = locate.describe_traces(run, named(), [long], labels, THINK, absorbing)
        assert known["long"].settled == settled
    located = find(run, [bad], UNSAFE, replace(CSR, absorbing=True))
    usual = find(run, [bad], UNSAFE)
    assert located.turns["bad"].sentence == usual.turns["bad"].sentence == 1
    assert located.turns["bad"].rollouts <= usual.turns["bad"].rollouts
    assert all(r.prefix_len < ends[2] for r, _ in located.drawn["bad"])


def test_two_traces_are_searched_as_each_alone(tmp_path: Path, chat: Chat, good: Rollout) -> None:
    more = replace(good, id="good2", prompt_id="p3")
    both = find(session(tmp_path / "a", chat, world(chat)), [good, more])
    alone = find(session(tmp_path / "b", chat, world(chat)), [more])
    assert both.turns["good2"] == alone.turns["good2"]


def test_what_cannot_be_pooled_is_one_line(run: Session, good: Rollout) -> None:
    with pytest.raises(BadInput, match="cannot be pooled; measure every cut"):
        find(run, [good], csr=replace(CSR, part="continuation"))


def test_an_unfinished_trace_has_no_outcome(run: Session, chat: Chat) -> None:
    trace = rollout(chat, f"{ASIDE}\n{TRIGGER}\n{PROOF}", id_="open", finish="length")
    known = locate.describe_traces(run, named(), [trace], {"open": SAFE}, THINK)
    assert known["open"].label is None


def test_a_foreign_trace_is_one_line(run: Session, chat: Chat) -> None:
    """The script never says this, so continuations leave it where its probabilities say not."""
    text = f"Rivers are deep. So it goes on.\n{PROOF}\n{CLOSE}"
    foreign = rollout(chat, text, id_="x", finish="think")
    known = locate.describe_traces(run, named(), [foreign], {"x": SAFE}, THINK)["x"]
    claimed = replace(known, p=tuple(max(p, 0.9) for p in known.p))
    searches = {"x": adaptive(claimed, SAFE, CSR, SEARCH)}
    with pytest.raises(BadInput, match="search with the sampler and the settings that drew it"):
        locate.run_searches(run, {"x": PROMPTS[0]}, {"x": claimed}, searches, "trace", THINK)


def test_one_trace_with_an_impossible_token_is_left_out_and_counted(
    run: Session, good: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits another pass may give a token of a trace no probability. The others go on."""
    rollouts = copies(good, 5)

    def make_impossible(*ids: str) -> None:
        def probabilities(*arguments: Any) -> dict[str, list[float]]:
            chances = stages.probabilities(*arguments)
            for key in ids:
                chances[key] = [0.0, *chances[key][1:]]
            return chances

        monkeypatch.setattr(locate, "probabilities", probabilities)

    make_impossible("good3")
    with pytest.warns(UserWarning, match="1 of 5 traces have a token of probability 0 here"):
        located = find(run, rollouts)
    assert set(located.turns) == {"good0", "good1", "good2", "good4"}
    assert [r.id for r in located.kept(rollouts)] == ["good0", "good1", "good2", "good4"]
    make_impossible("good0", "good3")  # so many are another sampler's
    with pytest.raises(BadInput, match="has probability 0 here; sample it with this model"):
        find(run, rollouts)


def test_points_and_cuts_of_what_was_drawn(run: Session, good: Rollout) -> None:
    located = find(run, [good])
    drawn = located.drawn["good"]
    known = locate.describe_traces(run, named(), [good], LABELS, THINK)["good"]
    points = {point.cut: point for point in locate.csr_points(known, drawn)}
    assert list(points) == [0, *known.ends]
    assert points[known.ends[1]].s == 1.0
    assert 0.2 < points[0].s < 0.8
    groups = locate.group_by_cut(drawn)
    assert sum(map(len, groups.values())) == located.turns["good"].rollouts
    for cut, continuations in groups.items():
        assert all(r.prefix_len == cut for r, _ in continuations)


def test_harvested_pairs_share_their_prefix_and_cost_nothing(
    tmp_path: Path, chat: Chat, bad: Rollout
) -> None:
    sampler = world(chat)
    run = session(tmp_path, chat, sampler)
    drawn = find(run, [bad], UNSAFE).drawn
    cue = stages.trace_sentences(run, bad)[1].token_start
    answered = len(sampler.answered)
    settings = PairSettings(harvest=3)
    kept, counts = stages.harvested_pairs(run, named(), [bad], {"bad": cue}, drawn, settings)
    assert len(kept) == 3
    assert counts["kept"] == 3
    assert len(sampler.answered) == answered
    for pair in kept:
        assert pair.h == cue
        assert pair.prompt_ids[-cue:] == bad.token_ids[:cue]
        assert pair.rejected_ids == bad.token_ids[cue:]
        assert TRIGGER in chat.decode(pair.chosen_ids)
        assert pair.why == "harvest"
    none, _ = stages.harvested_pairs(run, named(), [bad], {"bad": None}, drawn, PairSettings())
    assert none == []


class Banning:
    """The scripted world, drawn again until the first token is not the banned one."""

    def __init__(self, inner: ScriptedSampler) -> None:
        self.inner = inner

    def fingerprint(self) -> dict[str, Any]:
        return self.inner.fingerprint()

    def draw(self, request: Request, sampling: Sampling) -> Completion:
        return next(iter(self.inner.sample([request], sampling)))

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            seed = request.seed
            completion = self.draw(request, sampling)
            while request.ban is not None and completion.token_ids[:1] == (request.ban,):
                seed += 1
                completion = self.draw(replace(request, seed=seed), sampling)
            yield completion

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        for chances in self.inner.score(requests, sampling):
            yield [1.0 if p > 0.97 else p for p in chances]


def test_a_recorded_trace_replays_the_world_it_was_drawn_from(
    tmp_path: Path, chat: Chat, good: Rollout
) -> None:
    run = session(tmp_path, chat, Banning(world(chat)))  # type: ignore[arg-type]
    (curve,) = locate.record_curves(run, named(), [good], LABELS, THINK, 40)
    turn = stages.trace_sentences(run, good)[1].token_start
    assert [place for place, ways in enumerate(curve.ways) if ways] == [turn]
    assert {safe for _, safe, _ in curve.ways[turn]} == {0.0}
    # As many as the share of draws that leave there, of 40.
    leaving = ceil(40 * (1 - curve.trace.p[turn]))
    assert sum(weight for weight, _, _ in curve.ways[turn]) == max(locate.FEWEST, leaving)
    (few,) = locate.record_curves(run, named(), [good], LABELS, THINK, 1)
    assert sum(weight for weight, _, _ in few.ways[turn]) == locate.FEWEST
    assert curve.truth[0] == pytest.approx(curve.trace.p[turn])
    curves.save(tmp_path / "f.jsonl.gz", [curve])
    (read,) = curves.load(tmp_path / "f.jsonl.gz")
    assert read.truth.tolist() == pytest.approx(curve.truth.tolist(), abs=1e-5)
    assert read.prompt == named()[good.prompt_id]


class Leaving:
    """A sampler that leaves every third request for later, unless it is asked for all."""

    pauses = True

    def __init__(self, inner: ScriptedSampler) -> None:
        self.inner = inner
        self.calls: list[str] = []

    def fingerprint(self) -> dict[str, Any]:
        return self.inner.fingerprint()

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        self.calls.append("all")
        yield from self.inner.sample(requests, sampling)

    def sample_some(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        self.calls.append("some")
        some = [request for index, request in enumerate(requests) if index % 3]
        yield from self.inner.sample(some, sampling)

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        yield from self.inner.score(requests, sampling)


def test_rounds_do_not_wait_for_a_straggler_and_find_the_same(
    tmp_path: Path, chat: Chat, good: Rollout
) -> None:
    rollouts = copies(good, 5)
    usual = find(session(tmp_path / "a", chat, world(chat)), rollouts)
    sampler = Leaving(world(chat))
    located = find(session(tmp_path / "b", chat, sampler), rollouts)  # type: ignore[arg-type]
    assert located.turns == usual.turns
    for key, drawn in usual.drawn.items():
        assert sorted(r.id for r, _ in located.drawn[key]) == sorted(r.id for r, _ in drawn)
    assert sampler.calls.count("some") > 2
    assert "all" in sampler.calls  # the last ones are waited for
