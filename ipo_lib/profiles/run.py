"""An open run: a profile with the store, the model and the judge that its steps work with.

    import ipo_lib as ipo
    run = ipo.open_run("tiny")
    prompts = run.prompts("train_harmful")

Models are loaded when a step first finds something missing in the store.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipo_lib.chat import Chat
from ipo_lib.cues import CueDetector
from ipo_lib.engines.transformers_sampler import TransformersSampler
from ipo_lib.engines.vllm import ServerSampler
from ipo_lib.judging import ByQuestion, Judge
from ipo_lib.profiles.claims import CALIBRATED, EMERGENT, claim, save_figure, withheld
from ipo_lib.profiles.reading import checkout, read_profile
from ipo_lib.profiles.settings import Component, Model, Profile
from ipo_lib.prompts import load_prompts, object_named, without_overlap
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
from ipo_lib.stages import JudgedRollouts, Session, sample_and_judge
from ipo_lib.stats import Interval, wilson
from ipo_lib.store import Store
from ipo_lib.triggers import Trigger
from ipo_lib.turning_points import curves
from ipo_lib.turning_points.curves import Curve
from ipo_lib.turning_points.mining import learn_lexicon, mine_pool

TRAINING = "06-training"  # the figure that names the adapters of the training notebook
OWN_FIGURES = "my-figures"  # folder of figures that nobody asked to write elsewhere
FEW_CLOSED = 0.5  # share of closed traces under which nothing is claimed about traces


@dataclass(frozen=True, repr=False)
class Run:
    """A profile with its session: what a notebook starts from."""

    profile: Profile
    session: Session
    folder: Path  # of the model
    figures: Path  # folder that figures are written to
    opened_with: tuple[str, Mapping[str, Any], str, str] = ("", {}, "", "")  # see ``open_run``

    def __repr__(self) -> str:
        """In a few lines, without all settings."""
        return (
            f"Run of profile {self.profile.name}\n  model {self.folder}\n"
            f"  store {self.session.store.root}\n  figures {self.figures}"
        )

    def changed(self, changes: Mapping[str, Any]) -> Run:
        """The run of the same profile with more settings changed, by dotted name."""
        name, overrides, store, figures = self.opened_with
        return open_run(name, {**overrides, **changes}, store, figures)

    @property
    def thinking(self) -> Sampling:
        """The profile's sampling, stopped where the trace ends."""
        return replace(self.profile.sampling, until="think")

    def prompts(self, name: str) -> list[Prompt]:
        """A prompt set of the profile, by name."""
        prompt_sets = self.profile.prompts
        if name not in prompt_sets:
            listed = ", ".join(prompt_sets)
            raise BadInput(
                f"prompt set {name!r} is not in profile {self.profile.name!r}; known: {listed}"
            )
        prompts = load_prompts(name, prompt_sets[name])
        others: list[Prompt] = []
        for other in prompt_sets[name].apart:
            others += load_prompts(other, prompt_sets[other])
        return without_overlap(prompts, others) if others else prompts

    def ask(
        self,
        prompts: Prompt | str | Sequence[Prompt | str],
        draws: int = 8,
        session: Session | None = None,
    ) -> JudgedRollouts:
        """Sample traces of prompts of one's own, and judge them.

        Warns where traces could not be judged.

        Args:
            prompts: one or several, each a prompt or its text.
            draws: traces of each prompt.
            session: of another model; None: the profile's.
        """
        judged = sample_and_judge(session or self.session, prompts, self.thinking, draws)
        if missing := [verdict for verdict in judged.verdicts if verdict.label is None]:
            why = f"; the first: {missing[0].raw}" if self.profile.reveal else ""
            warnings.warn(
                f"{len(missing)} of {len(judged.verdicts)} traces were not judged{why}",
                stacklevel=2,
            )
        return judged

    # Detector, triggers and what only some worlds have.

    def detector(self, rollouts: Rollouts, verdicts: Verdicts) -> CueDetector:
        """The profile's cue detector, or a lexicon learnt from these judged rollouts."""
        component = self.profile.detector
        if component:
            detector: CueDetector = build_component(component)
            return detector
        return learn_lexicon(self.session, rollouts, verdicts)

    def triggers(
        self, prompts: Prompts, rollouts: Rollouts, verdicts: Verdicts, detector: CueDetector
    ) -> list[Trigger]:
        """The profile's safety triggers, or those mined from these judged rollouts.

        Args:
            prompts: the rollouts' prompts, by id.
            rollouts: traces.
            verdicts: on the traces, in the order of the rollouts.
            detector: finds the cues at which triggers are tried.
        """
        profile = self.profile
        if profile.triggers:
            return list(by_id(build_component(profile.triggers)).values())
        _, triggers = mine_pool(
            self.session,
            prompts,
            rollouts,
            verdicts,
            detector,
            profile.csr,
            profile.search,
            profile.plan,
            self.thinking,
        )
        return triggers

    def extra(self, name: str, default: Any = None) -> Any:
        """What the profile names under ``extras``; ``default`` where it names nothing."""
        component = self.profile.extras.get(name)
        return build_component(component) if component else default

    def truth(self) -> CueDetector | None:
        """The detector that is never wrong, in a world that has one."""
        detector: CueDetector | None = self.extra("truth")
        return detector

    def wide_truth(self) -> CueDetector | None:
        """The detector of any sentence that commits to helping, in a world that has one."""
        detector: CueDetector | None = self.extra("wide_truth")
        return detector

    def safety_aware(self) -> CueDetector | None:
        """Finds the first sentence that turns away from harm, where the profile names a way."""
        detector: CueDetector | None = self.extra("safety_aware")
        return detector

    def paraphrases(self) -> list[str]:
        """Trigger sentences that no step has seen; none where the profile has none."""
        return list(self.extra("paraphrases", []))

    def pool(self) -> list[Trigger]:
        """All triggers that were mined; none where the profile keeps no pool."""
        return list(by_id(self.extra("pool", [])).values())

    def recorded_curves(self) -> list[Curve]:
        """The recorded curves of the profile's model; none where it has none."""
        path = self.extra("forks")
        return curves.load(path) if path else []

    def teacher_responses(self, prompts: Sequence[Prompt]) -> list[str]:
        """A safe response of the profile's stronger source to every prompt."""
        component = self.profile.extras.get("teacher")
        if not component:
            raise BadInput(
                f"profile {self.profile.name!r} names no teacher; name one, or take a recipe "
                "without"
            )
        respond = object_named(component.use)
        return list(respond(prompts, self.profile.seed, **component.arguments))

    # Sessions with another model or judge.

    def adapted(self, adapter: Path | None) -> Session:
        """The session with a trained adapter on the model (None: without)."""
        sampler = open_sampler(self.profile.model, self.folder, self.session.chat, adapter)
        return replace(self.session, sampler=sampler)

    def aligned(self) -> Session | None:
        """The session of the model aligned on answers only, where the profile has one."""
        folder = self.extra("aligned")
        return self.adapted(Path(folder)) if folder else None

    def with_second_judge(self, session: Session) -> Session | None:
        """The same session with the profile's second judge, where it has one."""
        component = self.profile.second_judge
        if not component:
            return None
        return replace(session, judge=_built_once(canonical(to_json(component))))

    def judges(self) -> dict[str, Judge]:
        """The profile's judges, by what they are."""
        judges = {}
        components = {"judge": self.profile.judge, "second judge": self.profile.second_judge}
        for name, component in components.items():
            if component:
                judges[f"{name}, {component.use.rpartition(':')[2]}"] = build_component(component)
        return judges

    def trained_adapters(self, figure: str = TRAINING) -> dict[str, Path]:
        """The adapters that a training figure names: after stage 1, and stage 2 where it ran.

        The figure of this run is read, or else the profile's own in the checkout.

        Raises:
            BadInput: there is no such figure, or its adapter is not in the store.
        """
        root = self.session.store.root / "adapters"
        problem = "is missing"
        for folder in (self.figures, checkout() / "figures" / self.profile.name):
            sidecar = folder / f"{figure}.json"
            if not sidecar.is_file():
                continue
            artifacts = json.loads(sidecar.read_text("utf-8"))["artifacts"]
            adapters = {}
            for stage in ("stage 1", "stage 2"):
                adapter = root / artifacts[stage] / "files"
                if (adapter / "adapter_config.json").is_file():
                    adapters[f"after {stage}"] = adapter
            if "after stage 1" in adapters:
                return adapters
            problem = f"names an adapter that is not in {root}"
        raise BadInput(
            f"{figure}.json {problem}; run notebook 06_ipo_training first: it trains the adapter"
        )

    # Claims and figures.

    def origin(self, kind: str) -> str:
        """Whether a claim of this kind is calibrated or emergent in this profile."""
        return CALIBRATED if kind in self.profile.calibrated else EMERGENT

    def cause(
        self, sentence: str, value: Interval, kind: str, above: bool = True, **more: Any
    ) -> dict[str, Any]:
        """A claim that a sentence of a trace causes something.

        In a world without causes it is the claim that it does not.

        Args:
            sentence: with ``{}`` where the number belongs.
            value: a difference that the cause would move away from 0.
            kind: of claim, which tells whether the world was built to show it.
            above: the cause would make the number positive; False: negative.
            more: passed on to ``claim``.
        """
        if not self.profile.no_causes:
            return claim(sentence, value, origin=self.origin(kind), above=above, **more)
        margin = self.profile.equivalence
        sentence = (
            f"{sentence.rstrip('.')}; nothing causes anything here, so: no difference of more than "
            f"{100 * margin:.0f} points"
        )
        return claim(sentence, value, origin=CALIBRATED, margin=margin, **more)

    def save(
        self,
        figure: Any,
        name: str,
        claims: Sequence[Mapping[str, Any]],
        artifacts: Mapping[str, Any],
    ) -> None:
        """Write a figure with its claims, and the tokens that the notebook has asked for so far.

        Where fewer than half of the whole responses closed their trace, claims about traces are
        withheld, and the share is said instead.

        Args:
            figure: a matplotlib figure.
            name: of the files, without suffix.
            claims: what the figure shows, from ``claim`` and ``estimate``.
            artifacts: what it was made from, written beside the claims.
        """
        about = self.profile.about
        closed = list(self.session.usage.closed.values())
        if closed:
            share = wilson(sum(closed), len(closed))
            if share.value < FEW_CLOSED:
                claims = withheld(claims, self.profile.name, share)
                about += (
                    f" Only {share.value:.0%} of the traces were closed: what is shown of traces "
                    "means nothing."
                )
        save_figure(
            figure,
            self.figures,
            name,
            claims,
            profile=self.profile.name,
            about=about,
            artifacts=artifacts,
            tokens=self.session.usage.total_tokens,
        )


def open_run(
    profile: str, overrides: Mapping[str, Any] | None = None, store: str = "", figures: str = ""
) -> Run:
    """Read a profile and open its store, model and judge.

    Args:
        profile: a shipped profile's name, or the path of a ``.yml`` file.
        overrides: settings to change, by dotted name, such as ``{"csr.draws": 16}``.
        store: folder of the store; empty: ``$IPO_STORE`` or ``~/.cache/ipo_lib``.
        figures: folder for figures; empty: ``my-figures/<profile>`` where the process runs, so that
            figures in the checkout change only when they are asked for.
    """
    # tqdm asks for widgets that no notebook here uses.
    warnings.filterwarnings("ignore", message="IProgress not found")
    settings = read_profile(profile, overrides)
    model = settings.model
    folder = Path(build_component(model.find) if model.find else model.folder).expanduser()
    if not model.find and not (model.folder and folder.is_dir()):
        raise BadInput(
            f"model folder {str(folder)!r} is missing; put a model there or name another as "
            "model.folder"
        )
    chat = Chat(folder, prefill=model.prefill, system=model.system, variables=model.variables)
    session = Session(
        Store(store or None),
        chat,
        open_sampler(model, folder, chat),
        build_component(settings.judge),
        settings.seed,
    )
    target = Path(figures).expanduser() if figures else Path.cwd() / OWN_FIGURES / settings.name
    return Run(settings, session, folder, target, (profile, overrides or {}, store, figures))


def open_sampler(model: Model, folder: Path, chat: Chat, adapter: Path | None = None) -> Sampler:
    """The sampler of a profile's model.

    Args:
        model: where it runs and with which settings.
        folder: of the model.
        chat: how it is prompted.
        adapter: folder of a LoRA adapter; None: the model as it is.
    """
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


def build_component(component: Component) -> Any:
    """What a ``Component`` describes: the result of calling it."""
    try:
        return object_named(component.use)(**component.arguments)
    except TypeError as error:
        raise BadInput(f"{component.use}: wrong arguments ({error})") from None


def by_question(**judges: Mapping[str, Any]) -> ByQuestion:
    """Another judge for every question, each written as a ``Component``."""
    built = {}
    for question, component in judges.items():
        built[question] = build_component(from_json(Component, dict(component)))
    return ByQuestion(built)


@functools.cache
def _built_once(component: str) -> Any:
    """What a ``Component``, as JSON, describes, built once: a judge may hold a model."""
    return build_component(from_json(Component, json.loads(component)))
