"""What a profile costs before it runs: rollouts, tokens, minutes and dollars.

1. A notebook's parameters say which draws it makes: one with ``swap_draws`` swaps traces, one with
   ``benign_set`` trains, one with ``training_run`` evaluates. For each kind of draw there is one
   upper bound on the rollouts of all notebooks together.
2. *Expected*: rollouts have the mean lengths that the profile states under ``expected``.
   *At most*: every rollout runs to ``sampling.max_tokens``, every search to its budget.
3. Where the profile, or one that it is like, was run, the tokens that each notebook asked for are
   shown beside. They count draws that notebooks share in each of them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipo_lib.experiments.study import read_tables
from ipo_lib.profiles.settings import Component, Profile
from ipo_lib.records import BadInput

RESPONSES, TRACES, CORRECTIONS = "whole responses", "traces", "corrections"
CONTINUATIONS, SEARCHES = "continuations", "searches"
STAGES = 2  # trained models that are evaluated beside the base model
CONTROLS = 5  # kinds of text that notebook 05 puts in the place of a cue, or before it
ATTACKS = 14  # responses of a prompt under all attacks, resets counted each
ANSWERED = 2  # of these attacks more: only the answer is sampled
BARRED_ROUNDS = 3  # in which sentences with a trigger are drawn again, at most
GUARD = "ipo_lib.judges.guards:guard"  # a judge that may run in this process
HOURS_FROM = 180  # minutes

Notebooks = Mapping[str, Mapping[str, Any]]  # the parameters of each notebook, by its name


@dataclass(frozen=True)
class Draws:
    """Rollouts of one kind, and the tokens of each."""

    kind: str
    rollouts: float
    length: float


@dataclass(frozen=True)
class Bounds:
    """Upper bounds on what notebooks draw and train, with the lengths that the profile expects."""

    settings: Profile
    notebooks: Notebooks

    def largest(self, name: str, having: str = "") -> Any:
        """The largest value of a parameter over the notebooks that also have another; else 0."""
        values = []
        for parameters in self.notebooks.values():
            if parameters.get(name) and parameters.get(having or name):
                values.append(parameters[name])
        return max(values, default=0)

    def prompts(self, having: str, prompt_set: str = "harmful_set") -> int:
        """The size of the prompt sets that notebooks with a parameter work on.

        BadInput: the profile has no such set.
        """
        settings, names = self.settings, set()
        for parameters in self.notebooks.values():
            if parameters.get(having):
                names.add(parameters.get(prompt_set, "train_harmful"))
        unknown = sorted(names - set(settings.prompts))
        if unknown:
            known = ", ".join(settings.prompts)
            raise BadInput(
                f"{prompt_set} {unknown[0]!r} is not in profile {settings.name!r}; known: {known}"
            )
        return sum(settings.prompts[name].size for name in names)

    def cells(self) -> int:
        """Rows times seeds of all tables, where a notebook makes them again."""
        count = 0
        if self.largest("full"):
            for name, study in self.settings.studies.items():
                count += study.seeds * len(study.rows or read_tables()[name])
        return count

    def data(self, stages: int = 1) -> int:
        """Prompts times triggers, for Algorithm 1 here and in the cells of a full run."""
        here = stages * self.prompts("benign_set")
        return self.settings.plan.pool * (here + self.cells() * self.prompts("full"))

    def draws(self) -> Iterator[Draws]:
        """Every kind of draw; a kind may come in several lengths."""
        yield from self.responses()
        yield from self.traces()
        yield from self.continuations()

    def controlled(self) -> int:
        """Prompts on which notebook 11 tells the cue's part in an attack."""
        names = self.largest("control_sets") or []
        if names:
            return sum(self.settings.prompts[name].size for name in names)
        return self.prompts("attacked_set", "attacked_set")

    def responses(self) -> Iterator[Draws]:
        """Whole responses of the base model, of trained ones, and with triggers barred."""
        settings, evaluation = self.settings, self.settings.evaluation
        mean = settings.expected.trace + settings.expected.answer
        evaluating = [
            own
            for own in self.notebooks.values()
            if own.get("training_run") and not own.get("attacked_set")
        ]
        usual = evaluation.draws if evaluating else 0
        evaluated = max(usual, self.largest("asked"))
        whole = any("again" in own for own in evaluating)  # 07; 12 asks harmful prompts only
        base = max(evaluated, self.largest("group"), self.largest("draws", having="swap_draws"))
        harmful = base - evaluated + (BARRED_ROUNDS if whole else 0)
        harmful += self.largest("draws", having="benign_set") * (1 + settings.stage1.keep)
        if settings.extras.get("aligned"):
            harmful += self.largest("draws", having="swap_draws")
        for name in evaluation.sets:
            is_harmful = name in evaluation.harmful
            draws = (1 + STAGES) * (evaluated if is_harmful else usual * whole)
            draws += self.cells() * evaluation.draws
            draws += harmful if is_harmful else 0
            length = settings.expected.response.get(name, mean)
            yield Draws(RESPONSES, settings.prompts[name].size * draws, length)
        made = max(
            (len(own.get("attacks_made") or ()) for own in self.notebooks.values()), default=0
        )
        attacks = made + 1 if made else ATTACKS
        attacks *= (1 + STAGES) * self.largest("draws", having="attacked_set")
        attacked = self.prompts("attacked_set", "attacked_set")
        yield Draws(RESPONSES, attacks * attacked, mean)
        answered = ANSWERED * (1 + STAGES) * self.largest("draws", having="attacked_set")
        yield Draws(RESPONSES, answered * attacked, settings.expected.answer)
        # The control of the cue: what follows after it, and before it.
        rest = settings.expected.trace / 2 + settings.expected.answer
        yield Draws(RESPONSES, 2 * self.largest("control_draws") * self.controlled(), rest)
        refusals = 1 + settings.stage2.benign_draws + settings.stage2.refusing_prefix
        yield Draws(RESPONSES, refusals * self.prompts("benign_set", "benign_set"), mean)

    def traces(self) -> Iterator[Draws]:
        """Traces of the base model, and interventions and corrections in them."""
        plan, trace, largest = self.settings.plan, self.settings.expected.trace, self.largest
        draws = max(plan.draws, plan.pool, largest("group"))
        count = draws * self.prompts("harmful_set") + self.data(stages=0) + largest("kl_traces")
        count += largest("candidates") * largest("draws", having="candidates")
        count += plan.draws * self.controlled()
        if largest("unseen_draws"):
            held_out = next(iter(self.settings.evaluation.harmful))
            count += largest("unseen_draws") * self.settings.prompts[held_out].size
        own = largest("own_draws") + plan.pool + len(self.settings.neutral)
        if largest("own_draws"):  # continuations of a trace that is cut early are nearly as long
            count += own * largest("losers", having="own_draws") * self.prompts("own_draws")
        yield Draws(TRACES, count, trace)
        once = CONTROLS * largest("losers") * largest("draws", having="losers")
        chains = 2 * (plan.pool + largest("rounds"))
        count = self.prompts("rounds") * (once + chains)
        with_cues = largest("reverse_draws") * (1 + largest("cues"))
        count += largest("reverse_traces") * with_cues + self.data() * plan.rounds
        yield Draws(CORRECTIONS, count, self.settings.expected.corrected or trace / 2)

    def continuations(self) -> Iterator[Draws]:
        """Continuations for S (Eq. 1) and after swaps, and searches for turning points."""
        settings, expected, largest = self.settings, self.settings.expected, self.largest
        cuts, csr_draws = 1 + expected.sentences, settings.csr.draws
        search = defaultdict(float, expected.search)
        curves = 2 if largest("candidates") else 0
        if largest("probes"):
            curves += 2 * (1 + largest("examples"))
        if not settings.extras.get("forks"):  # recorded curves
            curves += largest("kl_curves")
        count = curves * cuts * (largest("curve_draws") or csr_draws)
        count += 2 * largest("unsafe_traces") * cuts * largest("move_draws")
        count += (2 + settings.plan.pool) * largest("draws", having="candidates")
        estimates = csr_draws * (cuts + expected.trace) + 4 * max(search.values(), default=0)
        count += largest("live_traces") * estimates  # also at every token
        yield Draws(CONTINUATIONS, count, expected.trace / 2)
        prompts = sum(settings.prompts[name].size for name in settings.evaluation.harmful)
        yield Draws(CONTINUATIONS, 2 * prompts * largest("swap_draws"), expected.answer)
        count = largest("safe_traces") * search["safe"]
        if not settings.extras.get("forks"):
            count += largest("reverse_traces") * search["safe"]
        count += largest("unsafe_traces", having="probes") * search["none"]
        count += largest("unsafe_traces", having="move_draws") * search["unsafe"]
        if settings.triggers is None and largest("harmful_set"):  # they are mined
            count += settings.plan.traces * (search["safe"] + settings.plan.pool)
        yield Draws(SEARCHES, count, expected.trace / 2)


@dataclass(frozen=True)
class Bill:
    """What is drawn and trained on, with the speeds and prices of the profile."""

    settings: Profile
    draws: tuple[Draws, ...]
    pairs: float  # trained on, counted in every epoch
    at_most: bool

    def rollouts(self, *kinds: str) -> float:
        """The rollouts of some kinds; of all where none is named."""
        return sum(draws.rollouts for draws in self.draws if not kinds or draws.kind in kinds)

    def tokens(self, *kinds: str) -> float:
        """The generated tokens of some kinds; of all where none is named."""
        chosen = [draws for draws in self.draws if not kinds or draws.kind in kinds]
        return sum(draws.rollouts * draws.length for draws in chosen)

    def readers(self) -> Iterator[tuple[str, Component, float]]:
        """Each judge and detector with its role and its number of texts.

        Of a whole response the trace and the answer are judged. The second judge reads nothing
        else, the detector traces and corrections.
        """
        responses = 2 * self.rollouts(RESPONSES)
        others = self.rollouts(TRACES, CORRECTIONS, CONTINUATIONS, SEARCHES)
        texts = {"judge": responses + others, "second_judge": responses}
        texts["detector"] = self.rollouts(TRACES, CORRECTIONS)
        for role, count in texts.items():
            component = getattr(self.settings, role)
            for inner in component.with_inner() if component else ():
                yield role, inner, count

    def minutes(self) -> float:
        """Time on the machine whose speeds the profile states; guards in this process need some."""
        expected, model = self.settings.expected, self.settings.model
        speed = expected.server_tokens_per_second if model.server else expected.tokens_per_second
        seconds = self.tokens() / speed + self.pairs * expected.seconds_per_pair
        seconds += expected.seconds_per_notebook * len(self.settings.notebooks)
        for _, component, texts in self.readers():
            if component.use == GUARD and not component.arguments.get("server"):
                seconds += texts / expected.verdicts_per_second
        return seconds / 60

    def dollars(self) -> float:
        """Price of judges and detector; at most: long texts and answers, and no budget passed."""
        around, verdict = (2000, 400) if self.at_most else (400, 100)  # tokens of rubric, answer
        total = 0.0
        for role, component, texts in self.readers():
            arguments = component.arguments
            answer = 2 if role == "detector" else verdict
            budget = float("inf")
            if self.at_most:
                answer = arguments.get("max_tokens", answer)
                budget = arguments.get("budget") or budget
            price = (self.settings.expected.trace + around) * arguments.get("dollars_in", 0.0)
            price += answer * arguments.get("dollars_out", 0.0)
            total += min(price * texts / 1_000_000, budget)
        return total

    def __str__(self) -> str:
        about = "" if self.at_most else "about "
        minutes, dollars = self.minutes(), self.dollars()
        time = f"{minutes:.0f} minutes" if minutes < HOURS_FROM else f"{minutes / 60:.0f} hours"
        text = f"{about}{self.tokens():,.0f} generated tokens, {about}{time}"
        text += "" if self.at_most else f" on {self.settings.expected.machine}"
        if dollars:
            verdicts = self.rollouts() + self.rollouts(RESPONSES)
            text += f", {verdicts:,.0f} verdicts and {dollars:,.0f} dollars for judges and detector"
        return text


def bill(settings: Profile, notebooks: Notebooks, at_most: bool = False) -> Bill:
    """What some notebooks of a profile cost.

    Args:
        settings: the profile.
        notebooks: the parameters of each of the notebooks, by its name.
        at_most: nothing ends before its limit; else rollouts are as long as the profile expects.
    """
    limit = settings.sampling.max_tokens
    if at_most:
        settings = longest(settings)
    bounds, bill_draws = Bounds(settings, notebooks), []
    for draws in bounds.draws():
        length = limit if at_most else min(draws.length, limit)
        bill_draws.append(replace(draws, length=length))
    pairs = bounds.data(STAGES) * settings.stage1.epochs
    return Bill(settings, tuple(bill_draws), pairs, at_most)


def longest(settings: Profile) -> Profile:
    """The profile with the expectations of a run in which nothing ends early."""
    limit, expected, search = settings.sampling.max_tokens, settings.expected, settings.search
    longer = max(1.0, limit / expected.trace)
    # The last batch may begin below the budget; both sides of the turn get fresh draws.
    budget = search.budget + search.batch + 2 * search.confirm
    slowest = replace(
        expected,
        trace=float(limit),
        sentences=expected.sentences * longer,
        search={kind: max(mean, budget) for kind, mean in expected.search.items()},
        seconds_per_pair=expected.seconds_per_pair * longer,
        verdicts_per_second=expected.verdicts_per_second / longer,
    )
    return replace(settings, expected=slowest)


def last_run(figures: Path) -> dict[str, int]:
    """Tokens that the committed figures of each notebook took, by its two digits."""
    tokens = defaultdict[str, int](int)
    for path in figures.glob("[0-9][0-9]-*.json"):
        sidecar = json.loads(path.read_text("utf-8"))
        tokens[path.name[:2]] = max(tokens[path.name[:2]], sidecar.get("tokens", 0))
    return dict(tokens)


def cost_table(settings: Profile, notebooks: Notebooks, measured: Mapping[str, int]) -> str:
    """The bill as text: each notebook by itself, each kind of draw, then the totals.

    Args:
        settings: the profile.
        notebooks: the parameters of each of its notebooks, by the notebook's name.
        measured: tokens of the run that made the committed figures, by a notebook's two digits.
    """
    lines = ["each notebook by itself, as expected:"]
    for name, parameters in notebooks.items():
        alone = bill(settings, {name: parameters})
        line = f"{name:26} {alone.rollouts():9,.0f} rollouts {alone.tokens():11,.0f} tokens"
        if name[:2] in measured:
            line += f"   (committed figures: {measured[name[:2]]:,})"
        lines.append(line)
    lines.append("together, with draws that they share counted once:")
    expected, most = bill(settings, notebooks), bill(settings, notebooks, at_most=True)
    for kind in (RESPONSES, TRACES, CORRECTIONS, CONTINUATIONS, SEARCHES):
        count, tokens = expected.rollouts(kind), expected.tokens(kind)
        lines.append(f"{kind:26} {count:9,.0f} rollouts {tokens:11,.0f} tokens")
    limit = f"every draw runs to {settings.sampling.max_tokens:,} tokens"
    return "\n".join([*lines, f"{settings.name}: {expected}", f"at most {most}: {limit}"])
