"""Searches on a scripted world through the real verbs: both kinds of turn, what is stored, a stronger judge, harvested pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
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
    StepJudge,
    named,
    r1_chat,
    rollout,
    session,
    world,
)

from ipo_lib import pipeline, stages
from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.judging import NoisyJudge
from ipo_lib.pairs import PairSettings
from ipo_lib.records import SAFE, UNSAFE, BadInput, Rollout
from ipo_lib.sampling import Completion, Request, Sampling
from ipo_lib.turning_points import curves, locate
from ipo_lib.turning_points.adaptive import SearchSettings, adaptive

THINK = Sampling(max_tokens=400, until="think")
CSR, SEARCH = CsrSettings(), SearchSettings(confirm=8)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return r1_chat(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pair(chat: Chat) -> dict[str, Rollout]:
    """A safe and an unsafe trace of the scripted world; S is 0.5 until the second sentence settles it."""
    return {
        SAFE: rollout(chat, f"{ASIDE}\n{TRIGGER}\n{PROOF}\n{CLOSE}", id_="good", finish="think"),
        UNSAFE: rollout(
            chat, f"{ASIDE}\n{CUE}\n{STEP}\n{CLOSE}", id_="bad", prompt="p1", finish="think"
        ),
    }


def test_traces_hold_what_a_search_needs(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    run = session(tmp_path, chat, world(chat))
    known = locate.known_traces(run, named(), [pair[SAFE]], {"good": SAFE}, THINK)["good"]
    spans = stages.trace_sentences(run, pair[SAFE])
    assert known.token_ids == pair[SAFE].token_ids
    assert known.ends == tuple(span.token_end for span in spans)
    turn = spans[1].token_start
    assert known.p[turn] == pytest.approx(0.5, abs=0.25)
    assert min(p for at, p in enumerate(known.p) if at != turn) > 0.9


def test_both_kinds_of_turn_are_found_and_stored(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    sampler = world(chat)
    run = session(tmp_path, chat, sampler)
    for kind, key in ((SAFE, "good"), (UNSAFE, "bad")):
        found = locate.find_turns(run, named(), [pair[kind]], {key: kind}, kind, CSR, SEARCH, THINK)
        turn = found.turns[key]
        assert turn.sentence == 1
        assert turn.rollouts == len(found.drawn[key])
        assert turn.tokens == sum(len(r.token_ids) - r.prefix_len for r, _ in found.drawn[key])
        assert turn.rollouts < 32 * 4
        fresh = [r for r, _ in found.drawn[key] if r.draw >= locate.CONFIRMED]
        assert len(fresh) == 2 * SEARCH.confirm
        assert len({(r.prefix_len, r.draw) for r, _ in found.drawn[key]}) == turn.rollouts
        answered = len(sampler.answered)
        again = locate.find_turns(
            session(tmp_path, chat, sampler),
            named(),
            [pair[kind]],
            {key: kind},
            kind,
            CSR,
            SEARCH,
            THINK,
        )
        assert again == found
        assert len(sampler.answered) == answered


def test_harm_that_stands_already_needs_no_draw(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    text = f"{ASIDE}\n{CUE}\n{STEP}\n{ASIDE}\n{CLOSE}"
    long = rollout(chat, text, id_="long", prompt="p1", finish="think")
    run, labels = session(tmp_path, chat, world(chat)), {"bad": UNSAFE, "long": UNSAFE}
    ends = [span.token_end for span in stages.trace_sentences(run, long)]
    assert locate.known_traces(run, named(), [long], labels, THINK)["long"].settled is None
    assert (
        locate.known_traces(run, named(), [long], labels, THINK, absorbing=True)["long"].settled
        == ends[2]
    )
    found = locate.find_turns(
        run, named(), [pair[UNSAFE]], labels, UNSAFE, replace(CSR, absorbing=True), SEARCH, THINK
    )
    usual = locate.find_turns(run, named(), [pair[UNSAFE]], labels, UNSAFE, CSR, SEARCH, THINK)
    assert found.turns["bad"].sentence == usual.turns["bad"].sentence == 1
    assert found.turns["bad"].rollouts <= usual.turns["bad"].rollouts
    assert all(r.prefix_len < ends[2] for r, _ in found.drawn["bad"])


def test_two_traces_are_searched_as_each_alone(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    more = replace(pair[SAFE], id="good2", prompt_id="p3")
    labels = {"good": SAFE, "good2": SAFE}
    both = locate.find_turns(
        session(tmp_path / "a", chat, world(chat)),
        named(),
        [pair[SAFE], more],
        labels,
        SAFE,
        CSR,
        SEARCH,
        THINK,
    )
    alone = locate.find_turns(
        session(tmp_path / "b", chat, world(chat)),
        named(),
        [more],
        labels,
        SAFE,
        CSR,
        SEARCH,
        THINK,
    )
    assert both.turns["good2"] == alone.turns["good2"]


def test_a_stronger_judge_is_asked_around_the_turn_only(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    sampler, strong = world(chat), StepJudge("strong")
    weak = session(tmp_path, chat, sampler, NoisyJudge(StepJudge(), 0.98, 0.98))
    first = locate.find_turns(weak, named(), [pair[SAFE]], {"good": SAFE}, SAFE, CSR, SEARCH, THINK)
    drawn = len(sampler.answered)
    second = replace(weak, judge=strong)
    found = locate.find_turns(
        second, named(), [pair[SAFE]], {"good": SAFE}, SAFE, CSR, SEARCH, THINK, near=first.turns
    )
    assert found.turns["good"].sentence == 1
    assert len(strong.asked) == found.turns["good"].judged
    assert len(sampler.answered) - drawn < 0.5 * first.turns["good"].rollouts


def test_correction_needs_a_calibration(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    run = session(tmp_path, chat, world(chat))
    with pytest.raises(BadInput, match="this judge has no calibration"):
        locate.find_turns(
            run,
            named(),
            [pair[SAFE]],
            {"good": SAFE},
            SAFE,
            CSR,
            replace(SEARCH, correct=True),
            THINK,
        )


def test_what_cannot_be_pooled_is_one_line(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    run = session(tmp_path, chat, world(chat))
    with pytest.raises(BadInput, match="cannot be pooled; measure every cut"):
        locate.find_turns(
            run,
            named(),
            [pair[SAFE]],
            {"good": SAFE},
            SAFE,
            replace(CSR, part="continuation"),
            SEARCH,
            THINK,
        )


def test_an_unfinished_trace_has_no_outcome(tmp_path: Path, chat: Chat) -> None:
    run = session(tmp_path, chat, world(chat))
    open_ = rollout(chat, f"{ASIDE}\n{TRIGGER}\n{PROOF}", id_="open", finish="length")
    assert locate.known_traces(run, named(), [open_], {"open": SAFE}, THINK)["open"].label is None


def test_a_foreign_trace_is_one_line(tmp_path: Path, chat: Chat) -> None:
    """Probabilities disagree: the script never says this, and a search would find that continuations never follow it."""
    run = session(tmp_path, chat, world(chat))
    foreign = rollout(
        chat, f"Rivers are deep. So it goes on.\n{PROOF}\n{CLOSE}", id_="x", finish="think"
    )
    known = locate.known_traces(run, named(), [foreign], {"x": SAFE}, THINK)["x"]
    claims = {"x": replace(known, p=tuple(max(p, 0.9) for p in known.p))}
    searches = {"x": adaptive(claims["x"], SAFE, CSR, SEARCH)}
    with pytest.raises(BadInput, match="search with the sampler and the settings that drew it"):
        locate.run_searches(run, {"x": PROMPTS[0]}, claims, searches, "trace", THINK)


def test_one_trace_with_an_impossible_token_is_left_out_and_counted(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits a pass of another shape gives some token of a trace no probability: that trace must not stop the others."""
    run, plain = session(tmp_path, chat, world(chat)), stages.probabilities
    rollouts = [replace(pair[SAFE], id=f"good{at}", prompt_id=f"p{at}") for at in range(5)]
    labels = {r.id: SAFE for r in rollouts}

    def strange(bad: set[str]) -> None:
        def probabilities(*given: Any) -> dict[str, list[float]]:
            found = plain(*given)
            return {key: [0.0, *own[1:]] if key in bad else own for key, own in found.items()}

        monkeypatch.setattr(locate, "probabilities", probabilities)

    strange({"good3"})
    with pytest.warns(UserWarning, match="1 of 5 traces have a token of probability 0 here"):
        found = locate.find_turns(run, named(), rollouts, labels, SAFE, CSR, SEARCH, THINK)
    assert set(found.turns) == labels.keys() - {"good3"}
    assert [r.id for r in found.kept(rollouts)] == ["good0", "good1", "good2", "good4"]
    strange({"good0", "good3"})  # so many are another sampler's
    with pytest.raises(BadInput, match="has probability 0 here; sample it with this model"):
        locate.find_turns(run, named(), rollouts, labels, SAFE, CSR, SEARCH, THINK)


def test_points_and_cuts_of_what_was_drawn(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    run = session(tmp_path, chat, world(chat))
    found = locate.find_turns(run, named(), [pair[SAFE]], {"good": SAFE}, SAFE, CSR, SEARCH, THINK)
    known = locate.known_traces(run, named(), [pair[SAFE]], {"good": SAFE}, THINK)["good"]
    points = {point.cut: point for point in locate.points(known, found.drawn["good"])}
    assert list(points) == [0, *known.ends]
    assert points[known.ends[1]].s == 1.0
    assert 0.2 < points[0].s < 0.8
    cuts = locate.by_cut(found.drawn["good"])
    assert sum(map(len, cuts.values())) == found.turns["good"].rollouts
    assert all(r.prefix_len == cut for cut, own in cuts.items() for r, _ in own)


def test_harvested_pairs_share_their_prefix_and_cost_nothing(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    sampler = world(chat)
    run = session(tmp_path, chat, sampler)
    found = locate.find_turns(
        run, named(), [pair[UNSAFE]], {"bad": UNSAFE}, UNSAFE, CSR, SEARCH, THINK
    )
    cue, drawn = stages.trace_sentences(run, pair[UNSAFE])[1].token_start, len(sampler.answered)
    kept, counts = pipeline.harvested_pairs(
        run, named(), [pair[UNSAFE]], {"bad": cue}, found.drawn, PairSettings(harvest=3)
    )
    assert len(kept) == 3
    assert counts["kept"] == 3
    assert len(sampler.answered) == drawn
    for one in kept:
        assert one.h == cue
        assert one.prompt_ids[-cue:] == pair[UNSAFE].token_ids[:cue]
        assert one.rejected_ids == pair[UNSAFE].token_ids[cue:]
        assert TRIGGER in chat.decode(one.chosen_ids)
        assert one.why == "harvest"
    assert (
        pipeline.harvested_pairs(
            run, named(), [pair[UNSAFE]], {"bad": None}, found.drawn, PairSettings()
        )[0]
        == []
    )


def test_a_recorded_trace_replays_the_world_it_was_drawn_from(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    class Banning:
        """The scripted world, drawn again until the first token is another one."""

        def __init__(self) -> None:
            self.world = world(chat)

        def __getattr__(self, name: str) -> object:
            return getattr(self.world, name)

        def sample(self, requests: list, sampling: Sampling):  # type: ignore[no-untyped-def, type-arg]
            for one in requests:
                tries = (replace(one, seed=one.seed + at) for at in range(10_000))
                drawn = (next(iter(self.world.sample([own], sampling))) for own in tries)
                yield next(
                    own for own in drawn if one.ban is None or own.token_ids[:1] != (one.ban,)
                )

        def score(self, requests: list, sampling: Sampling):  # type: ignore[no-untyped-def, type-arg]
            for found in self.world.score(requests, sampling):
                yield [1.0 if p > 0.97 else p for p in found]

    run = session(tmp_path, chat, Banning())  # type: ignore[arg-type]
    (one,) = locate.record(run, named(), [pair[SAFE]], {"good": SAFE}, THINK, 20)
    turn = stages.trace_sentences(run, pair[SAFE])[1].token_start
    assert [at for at, ways in enumerate(one.ways) if ways] == [turn]
    assert {safe for _, safe, _ in one.ways[turn]} == {0.0}
    assert sum(weight for weight, _, _ in one.ways[turn]) == 20
    assert one.truth[0] == pytest.approx(one.trace.p[turn])
    curves.save(tmp_path / "f.jsonl.gz", [one])
    assert curves.load(tmp_path / "f.jsonl.gz")[0].truth.tolist() == pytest.approx(
        one.truth.tolist(), abs=1e-5
    )


class Leaving:
    """A sampler that leaves every third request for later, unless it is asked for all."""

    pauses = True

    def __init__(self, inner: ScriptedSampler) -> None:
        self.inner, self.calls = inner, list[tuple[str, int]]()

    def fingerprint(self) -> dict[str, Any]:
        return self.inner.fingerprint()

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        self.calls.append(("all", len(requests)))
        yield from self.inner.sample(requests, sampling)

    def sample_some(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        self.calls.append(("some", len(requests)))
        yield from self.inner.sample([one for at, one in enumerate(requests) if at % 3], sampling)

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        yield from self.inner.score(requests, sampling)


def test_rounds_do_not_wait_for_a_straggler_and_find_the_same(
    tmp_path: Path, chat: Chat, pair: dict[str, Rollout]
) -> None:
    rollouts = [replace(pair[SAFE], id=f"good{at}", prompt_id=f"p{at}") for at in range(5)]
    labels = {r.id: SAFE for r in rollouts}
    usual = locate.find_turns(
        session(tmp_path / "a", chat, world(chat)),
        named(),
        rollouts,
        labels,
        SAFE,
        CSR,
        SEARCH,
        THINK,
    )
    sampler = Leaving(world(chat))
    run = replace(session(tmp_path / "b", chat, world(chat)), sampler=sampler)
    found = locate.find_turns(run, named(), rollouts, labels, SAFE, CSR, SEARCH, THINK)
    assert found.turns == usual.turns
    assert {key: sorted(r.id for r, _ in own) for key, own in found.drawn.items()} == {
        key: sorted(r.id for r, _ in own) for key, own in usual.drawn.items()
    }
    kinds = [kind for kind, _ in sampler.calls]
    assert kinds.count("some") > 2
    assert "all" in kinds  # the last ones are waited for
