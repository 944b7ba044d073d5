"""Profiles: one code path, several bodies. A profile is data (``notebooks/profiles/<name>.yml``), read into settings records.
Nothing else in the library asks which profile it is in. A setting is changed by its dotted name, ``csr.draws=16``."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipo_lib import plots
from ipo_lib.chat import Chat
from ipo_lib.cues import CueDetector
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.engines.vllm import ServerSampler
from ipo_lib.judging import UNANIMOUS, ByQuestion, Judge, Panel
from ipo_lib.overlap import apart
from ipo_lib.profiles.reading import checkout, read_profile
from ipo_lib.profiles.settings import Component, Model, Profile
from ipo_lib.prompts import load_prompts, object_named
from ipo_lib.records import (
    BadInput,
    Prompt,
    Prompts,
    Rollouts,
    Verdicts,
    by_id,
    canonical,
    from_json,
    to_json,
)
from ipo_lib.sampling import Sampler, Sampling
from ipo_lib.stages import Session
from ipo_lib.stats import Interval, wilson
from ipo_lib.store import Store
from ipo_lib.triggers import Trigger
from ipo_lib.turning_points import curves
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.mining import learn_lexicon, mine_pool

CLOSED = 0.5  # share of closed traces under which nothing is claimed about traces


@dataclass(frozen=True)
class Run:
    """A profile with its doors open: what a notebook starts from. Models load when a verb first misses a record."""

    profile: Profile
    session: Session
    folder: Path
    figures: Path
    given: tuple[str, Mapping[str, Any], str, str] = ("", {}, "", "")

    def changed(self, changes: Mapping[str, Any]) -> Run:
        """The bench of the same profile with more settings changed, by dotted name."""
        name, overrides, store, figures = self.given
        return open_run(name, {**overrides, **changes}, store, figures)

    @property
    def thinking(self) -> Sampling:
        """The profile's sampling, stopped where the trace ends."""
        return replace(self.profile.sampling, until="think")

    def prompts(self, name: str) -> list[Prompt]:
        """A prompt set of the profile by name."""
        if name not in (sets := self.profile.prompts):
            raise BadInput(
                f"prompt set {name!r} is not in profile {self.profile.name!r}; known: {', '.join(sets)}"
            )
        found = load_prompts(name, sets[name])
        others = [one for other in sets[name].apart for one in load_prompts(other, sets[other])]
        return apart(found, others) if others else found

    def detector(self, rollouts: Rollouts, verdicts: Verdicts) -> CueDetector:
        """The profile's cue detector; where it names none, a lexicon learnt from these judged rollouts."""
        return (
            build_component(part)
            if (part := self.profile.detector)
            else learn_lexicon(self.session, rollouts, verdicts)
        )

    def triggers(
        self, prompts: Prompts, rollouts: Rollouts, verdicts: Verdicts, detector: CueDetector
    ) -> list[Trigger]:
        """The profile's triggers in use; where it names none, mined from these judged rollouts."""
        if (s := self.profile).triggers:
            return list(by_id(build_component(s.triggers)).values())
        return mine_pool(
            self.session,
            prompts,
            rollouts,
            verdicts,
            detector,
            s.csr,
            s.search,
            s.plan,
            self.thinking,
        )[1]

    def paraphrases(self) -> list[str]:
        """Trigger sentences held out of everything; none where the profile has none."""
        return list(build_component(part)) if (part := self.profile.paraphrases) else []

    def pool(self) -> list[Trigger]:
        """All triggers that were mined; none where the profile keeps no pool."""
        return list(by_id(build_component(part)).values()) if (part := self.profile.pool) else []

    def taught(self, prompts: Sequence[Prompt]) -> list[str]:
        """A safe response of the profile's stronger source to every prompt."""
        if not (part := self.profile.teacher):
            raise BadInput(
                f"profile {self.profile.name!r} names no teacher; name one, or take a recipe without"
            )
        return list(object_named(part.use)(prompts, self.profile.seed, **part.arguments))

    def truth(self) -> CueDetector | None:
        """The detector that is never wrong, in a world that has one."""
        return build_component(part) if (part := self.profile.truth) else None

    def wide_truth(self) -> CueDetector | None:
        """The detector of any sentence that commits to helping, never wrong, in a world that has one."""
        return build_component(part) if (part := self.profile.wide_truth) else None

    def forks(self) -> list[Curve]:
        """The recorded outcome curves of the profile's model; none where it has none."""
        return curves.load(build_component(part)) if (part := self.profile.forks) else []

    def aligned(self) -> Session | None:
        """The doors of the model aligned on answers only, where the profile has one."""
        return self.adapted(Path(build_component(part))) if (part := self.profile.aligned) else None

    def origin(self, kind: str) -> str:
        """Where a claim of this kind comes from in this profile: calibrated or emergent."""
        return plots.ORIGINS[0] if kind in self.profile.calibrated else plots.ORIGINS[1]

    def cause(
        self, sentence: str, value: Interval, kind: str, above: bool = True, **more: Any
    ) -> dict[str, Any]:
        """A claim that a sentence of a trace causes something; in a world without causes, that it does not.

        Args:
            sentence: with ``{}`` where the number belongs.
            value: a difference that the cause would move away from 0.
            kind: of claim, which tells whether the world was built to show it.
            above: the cause would make the number positive; False: negative.
            more: passed on to ``plots.claim``.
        """
        if not self.profile.no_causes:
            return plots.claim(sentence, value, origin=self.origin(kind), above=above, **more)
        margin = self.profile.equivalence
        said = f"{sentence.rstrip('.')}; nothing causes anything here, so: no difference of more than {100 * margin:.0f} points"
        return plots.claim(said, value, origin=plots.ORIGINS[0], margin=margin, **more)

    def judges(self) -> dict[str, Judge]:
        """The profile's judges by what they are."""
        parts = {"judge": self.profile.judge, "second judge": self.profile.second_judge}
        return {
            f"{name}, {part.use.rpartition(':')[2]}": build_component(part)
            for name, part in parts.items()
            if part
        }

    def second(self, session: Session) -> Session | None:
        """The same doors with the profile's second judge, where it has one."""
        return (
            replace(session, judge=_kept(canonical(to_json(part))))
            if (part := self.profile.second_judge)
            else None
        )

    def adapted(self, adapter: Path | None) -> Session:
        """The same doors with a trained adapter on the model (None: as it is)."""
        return replace(
            self.session,
            sampler=sampler(self.profile.model, self.folder, self.session.chat, adapter),
        )

    def adapters(self, figure: str) -> dict[str, Path]:
        """The adapters that a training figure names: ``after stage 1``, and ``after stage 2`` where it ran."""
        if not (sidecar := self.figures / f"{figure}.json").is_file():
            raise BadInput(f"{sidecar} is missing; run the training notebook first")
        named, root = (
            json.loads(sidecar.read_text("utf-8"))["artifacts"],
            self.session.store.root / "adapters",
        )
        found = {
            f"after {stage}": root / named[stage] / "files" for stage in ("stage 1", "stage 2")
        }
        there = {
            stage: path for stage, path in found.items() if (path / "adapter_config.json").is_file()
        }
        if "after stage 1" not in there:
            raise BadInput(
                f"{sidecar} names an adapter that is not in {root}; run the training notebook again with this store"
            )
        return there

    def save(
        self,
        figure: Any,
        name: str,
        claims: Sequence[Mapping[str, Any]],
        artifacts: Mapping[str, Any],
    ) -> None:
        """Write a figure of this profile with its claims, and the tokens that this notebook has asked for so far. Where fewer
        than half of the whole responses closed their trace, claims about traces are withheld, and the share is said instead."""
        about, tokens, closed = (
            self.profile.about,
            sum(self.session.store.drawn.values()),
            [*self.session.store.closed.values()],
        )
        if closed and (share := wilson(sum(closed), len(closed))).value < CLOSED:
            claims = plots.withheld(claims, self.profile.name, share)
            about = f"{about} Only {share.value:.0%} of the traces were closed: what is shown of traces means nothing."
        plots.save(
            figure,
            self.figures,
            name,
            claims,
            profile=self.profile.name,
            about=about,
            artifacts=artifacts,
            tokens=tokens,
        )


def build_component(part: Component) -> Any:
    """The object a ``Part`` describes."""
    try:
        return object_named(part.use)(**part.arguments)
    except TypeError as error:
        raise BadInput(f"{part.use}: wrong arguments ({error})") from None


def panel(judges: Sequence[Mapping[str, Any]], rule: str = UNANIMOUS) -> Panel:
    """A panel of judges, each written as a ``Part``."""
    return Panel([build_component(from_json(Component, dict(one))) for one in judges], rule)


def by_question(**judges: Mapping[str, Any]) -> ByQuestion:
    """A judge for each question, each written as a ``Part``."""
    return ByQuestion(
        {
            question: build_component(from_json(Component, dict(one)))
            for question, one in judges.items()
        }
    )


@functools.cache
def _kept(part: str) -> Any:
    """The object of a ``Part`` written as JSON, made once: a judge may hold a model."""
    return build_component(from_json(Component, json.loads(part)))


def sampler(model: Model, folder: Path, chat: Chat, adapter: Path | None = None) -> Sampler:
    """The sampler of a profile's model, with an adapter or without."""
    if model.server:
        return ServerSampler(model.server, chat, adapter=adapter)
    return TransformersSampler(
        folder,
        chat,
        adapter=adapter,
        device=model.device,
        dtype=model.dtype,
        quantize=model.quantize,
        batch_size=model.batch_size,
    )


def open_run(
    profile: str, overrides: Mapping[str, Any] | None = None, store: str = "", figures: str = ""
) -> Run:
    """Read a profile and open its doors. ``store`` and ``figures`` are folders; empty means the usual places."""
    warnings.filterwarnings(
        "ignore", message="IProgress not found"
    )  # tqdm asks for widgets that nobody here uses
    settings = read_profile(profile, overrides)
    folder = Path(
        build_component(settings.model.find) if settings.model.find else settings.model.folder
    ).expanduser()
    if not settings.model.find and not (settings.model.folder and folder.is_dir()):
        raise BadInput(
            f"model folder {str(folder)!r} is missing; put a model there or name another as model.folder"
        )
    chat = Chat(folder, prefill=settings.model.prefill, system=settings.model.system)
    session = Session(
        Store(store or None),
        chat,
        sampler(settings.model, folder, chat),
        build_component(settings.judge),
        settings.seed,
    )
    target = Path(figures).expanduser() if figures else checkout() / "figures" / settings.name
    return Run(settings, session, folder, target, (profile, overrides or {}, store, figures))
