"""Profiles: one code path, several bodies. A profile is data (``notebooks/profiles/<name>.yml``), read into settings records.
Nothing else in the library asks which profile it is in. A setting is changed by its dotted name, ``csr.draws=16``."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ipo_lib import plots, replay
from ipo_lib.adaptive import SearchSettings
from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.evaluation import EvaluationSettings
from ipo_lib.grpo import GrpoSettings
from ipo_lib.intervention import CueDetector, Trigger
from ipo_lib.judging import UNANIMOUS, ByQuestion, Judge, Panel
from ipo_lib.layered import layered
from ipo_lib.lora import DpoSettings, Stage2Settings
from ipo_lib.mining import learn_lexicon, mine_pool
from ipo_lib.overlap import apart
from ipo_lib.pairs import PairSettings
from ipo_lib.prompts import PromptSet, load, reference
from ipo_lib.records import BadInput, Prompt, Prompts, Rollouts, Verdicts, canonical, from_json, to_json
from ipo_lib.remote import Server
from ipo_lib.replay import Curve
from ipo_lib.sampling import Sampler, Sampling, TransformersSampler
from ipo_lib.server import ServerSampler
from ipo_lib.stages import Doors, Plan
from ipo_lib.stats import wilson
from ipo_lib.store import Store
from ipo_lib.training import Recipe

FETCHED = ("ipo_lib.hub:folder", "ipo_lib.guards:guard")  # what may come from the hub
CLOSED = 0.5  # share of closed traces under which nothing is claimed about traces


@dataclass(frozen=True)
class Part:
    """A judge, a detector or a folder as data: ``module:name`` and the arguments it is called with."""

    use: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def all(self) -> list[Part]:
        """This part and those among its arguments, as of a panel."""
        values = [*self.arguments.values()]
        inner = [one for value in values for one in (value if isinstance(value, list) else [value])]
        return [self, *(part for one in inner if isinstance(one, dict) and "use" in one for part in from_json(Part, one).all)]


@dataclass(frozen=True)
class Model:
    """The model folder (a path, or a ``Part`` that returns one), how it is spoken to, and where it runs: in this process, or
    behind ``server``, where the folder need hold no weights unless something is trained."""

    folder: str = ""
    find: Part | None = None
    prefill: str = ""
    system: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    batch_size: int = 64
    server: Server | None = None


@dataclass(frozen=True)
class Expected:
    """What ``ipo cost`` reckons with: mean tokens of a trace and of an answer, and of a whole ``response`` in sets where that is
    otherwise; sentences of a trace; rollouts of a ``search`` for a safe turn of a safe trace, an unsafe turn of an unsafe one,
    and ``none`` where the kinds differ; the speed of ``machine``; GPU memory in GiB for sampling and training."""

    trace: float = 1500.0
    answer: float = 500.0
    response: Mapping[str, float] = field(default_factory=dict)
    sentences: float = 60.0
    search: Mapping[str, float] = field(default_factory=lambda: {"safe": 160.0, "unsafe": 160.0, "none": 50.0})
    tokens_per_second: float = 500.0
    seconds_per_pair: float = 1.0
    seconds_per_notebook: float = 10.0
    machine: str = "a machine that was not measured"
    gpu_gib: float = 0.0


@dataclass(frozen=True)
class Example:
    """A trace's sentences and the number of its first cue, 0 where there is none."""

    sentences: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class StudySettings:
    """A table of a full run: how many seeds, which of its rows (none named: all), and how many processes make its cells, each
    with its own model in memory (never more than seeds or cores)."""

    seeds: int = 1
    rows: tuple[str, ...] = ()
    workers: int = 2


@dataclass(frozen=True)
class Profile:
    """Every setting of a run. ``about`` says in one sentence what its numbers are worth and stands under every figure.
    ``reveal``: the text is harmless and may be shown. Without ``detector`` or ``triggers``, a lexicon is learnt and a pool mined
    from the run's own judged rollouts. Where they exist: ``truth``, a detector that is never wrong; ``paraphrases``, trigger
    sentences that no part of the pipeline has seen; ``pool``, all triggers that were mined; ``teacher``, safe responses of a
    stronger source; ``examples`` for a model asked for cues; ``studies``: how much of each table of a full run; ``forks``, a
    replay file of this model's traces; ``aligned``, the adapter of a model aligned on answers only; ``null_world``, the profile
    of a world where cues and triggers cause nothing; ``second_judge``, for headlines. ``calibrated``: the kinds of claims that
    the world was built or fitted for. ``beside``: the paper's benchmark whose numbers stand beside a prompt set's.
    ``min_coverage``: the share that must be judged. ``parameters``: of its notebooks, where ``ipo reproduce`` is to use other
    values than theirs."""

    name: str
    about: str
    model: Model
    prompts: Mapping[str, PromptSet]
    judge: Part
    detector: Part | None = None
    triggers: Part | None = None
    truth: Part | None = None
    paraphrases: Part | None = None
    pool: Part | None = None
    teacher: Part | None = None
    examples: tuple[Example, ...] = ()
    studies: Mapping[str, StudySettings] = field(default_factory=dict)
    aligned: Part | None = None
    null_world: str = ""
    second_judge: Part | None = None
    forks: Part | None = None
    calibrated: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()
    notebooks: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    expected: Expected = Expected()
    reveal: bool = False
    min_coverage: float = 0.95
    seed: int = 0
    sampling: Sampling = Sampling()
    csr: CsrSettings = CsrSettings()
    search: SearchSettings = SearchSettings()
    plan: Plan = Plan()
    pairs: PairSettings = PairSettings()
    stage1: DpoSettings = DpoSettings()
    stage2: Stage2Settings = Stage2Settings()
    grpo: GrpoSettings = GrpoSettings()
    recipe: Recipe = Recipe()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def online(self) -> bool:
        """Whether it names a model, guard or prompt set that may have to come from the hub."""
        parts = [part for one in (self.model.find, self.judge, self.second_judge) if one for part in one.all]
        return any(one.known or one.hub for one in self.prompts.values()) or any(part.use in FETCHED for part in parts)


def house() -> Path:
    """The checkout that holds ``notebooks/`` and ``figures/``. Raises BadInput outside one."""
    for folder in (Path(__file__).parents[1], Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks" / "profiles").is_dir():
            return folder
    raise BadInput("no notebooks/profiles here: run inside a checkout, installed with pip install -e .")


def available() -> list[str]:
    """The names of the shipped profiles."""
    return sorted(path.stem for path in (house() / "notebooks" / "profiles").glob("*.yml"))


def read(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """A profile by name or by the path of a ``.yml`` file, with settings changed by dotted name."""
    path = Path(name) if name.endswith(".yml") else house() / "notebooks" / "profiles" / f"{name}.yml"
    if not path.is_file():
        raise BadInput(f"profile {name!r} is unknown; known: {', '.join(available())}, or the path of a .yml file")
    data = {"name": path.stem, **layered(path)}
    for dotted, value in (overrides or {}).items():
        (*steps, last), place = dotted.split("."), data
        for step in steps:
            if not isinstance(place := place.setdefault(step, {}), dict):
                raise BadInput(f"parameter {dotted!r}: {step!r} holds a value, not settings")
        place[last] = value
    settings = from_json(Profile, data)
    used = [*settings.evaluation.sets, *(one for spec in settings.prompts.values() for one in spec.apart)]
    if strange := next((one for one in used if one not in settings.prompts), ""):
        raise BadInput(
            f"profile {settings.name!r}: prompt set {strange!r} is used but not there; known: {', '.join(settings.prompts)}"
        )
    return settings


@dataclass(frozen=True)
class Bench:
    """A profile with its doors open: what a notebook starts from. Models load when a verb first misses a record."""

    profile: Profile
    doors: Doors
    folder: Path
    figures: Path
    given: tuple[str, Mapping[str, Any], str, str] = ("", {}, "", "")

    def changed(self, changes: Mapping[str, Any]) -> Bench:
        """The bench of the same profile with more settings changed, by dotted name."""
        name, overrides, store, figures = self.given
        return open_bench(name, {**overrides, **changes}, store, figures)

    @property
    def thinking(self) -> Sampling:
        """The profile's sampling, stopped where the trace ends."""
        return replace(self.profile.sampling, until="think")

    def prompts(self, name: str) -> list[Prompt]:
        """A prompt set of the profile by name."""
        if name not in (sets := self.profile.prompts):
            raise BadInput(f"prompt set {name!r} is not in profile {self.profile.name!r}; known: {', '.join(sets)}")
        found = load(name, sets[name])
        others = [one for other in sets[name].apart for one in load(other, sets[other])]
        return apart(found, others) if others else found

    def detector(self, rollouts: Rollouts, verdicts: Verdicts) -> CueDetector:
        """The profile's cue detector; where it names none, a lexicon learnt from these judged rollouts."""
        return made(part) if (part := self.profile.detector) else learn_lexicon(self.doors, rollouts, verdicts)

    def triggers(self, prompts: Prompts, rollouts: Rollouts, verdicts: Verdicts, detector: CueDetector) -> list[Trigger]:
        """The profile's triggers in use; where it names none, mined from these judged rollouts."""
        if (s := self.profile).triggers:
            return list(made(s.triggers))
        return mine_pool(self.doors, prompts, rollouts, verdicts, detector, s.csr, s.search, s.plan, self.thinking)[1]

    def paraphrases(self) -> list[str]:
        """Trigger sentences held out of everything; none where the profile has none."""
        return list(made(part)) if (part := self.profile.paraphrases) else []

    def pool(self) -> list[Trigger]:
        """All triggers that were mined; none where the profile keeps no pool."""
        return list(made(part)) if (part := self.profile.pool) else []

    def taught(self, prompts: Sequence[Prompt]) -> list[str]:
        """A safe response of the profile's stronger source to every prompt."""
        if not (part := self.profile.teacher):
            raise BadInput(f"profile {self.profile.name!r} names no teacher; name one, or take a recipe without")
        return list(reference(part.use)(prompts, self.profile.seed, **part.arguments))

    def truth(self) -> CueDetector | None:
        """The detector that is never wrong, in a world that has one."""
        return made(part) if (part := self.profile.truth) else None

    def forks(self) -> list[Curve]:
        """The recorded outcome curves of the profile's model; none where it has none."""
        return replay.load(made(part)) if (part := self.profile.forks) else []

    def aligned(self) -> Doors | None:
        """The doors of the model aligned on answers only, where the profile has one."""
        return self.adapted(Path(made(part))) if (part := self.profile.aligned) else None

    def origin(self, kind: str) -> str:
        """Where a claim of this kind comes from in this profile: calibrated or emergent."""
        return plots.ORIGINS[0] if kind in self.profile.calibrated else plots.ORIGINS[1]

    def judges(self) -> dict[str, Judge]:
        """The profile's judges by what they are."""
        parts = {"judge": self.profile.judge, "second judge": self.profile.second_judge}
        return {f"{name}, {part.use.rpartition(':')[2]}": made(part) for name, part in parts.items() if part}

    def second(self, doors: Doors) -> Doors | None:
        """The same doors with the profile's second judge, where it has one."""
        return replace(doors, judge=_kept(canonical(to_json(part)))) if (part := self.profile.second_judge) else None

    def adapted(self, adapter: Path | None) -> Doors:
        """The same doors with a trained adapter on the model (None: as it is)."""
        return replace(self.doors, sampler=sampler(self.profile.model, self.folder, self.doors.chat, adapter))

    def adapters(self, figure: str) -> dict[str, Path]:
        """The adapters that a training figure names: ``after stage 1``, and ``after stage 2`` where it ran."""
        if not (sidecar := self.figures / f"{figure}.json").is_file():
            raise BadInput(f"{sidecar} is missing; run the training notebook first")
        named, root = json.loads(sidecar.read_text("utf-8"))["artifacts"], self.doors.store.root / "adapters"
        found = {f"after {stage}": root / named[stage] / "files" for stage in ("stage 1", "stage 2")}
        there = {stage: path for stage, path in found.items() if (path / "adapter_config.json").is_file()}
        if "after stage 1" not in there:
            raise BadInput(f"{sidecar} names an adapter that is not in {root}; run the training notebook again with this store")
        return there

    def save(self, figure: Any, name: str, claims: Sequence[Mapping[str, Any]], artifacts: Mapping[str, Any]) -> None:
        """Write a figure of this profile with its claims, and the tokens that this notebook has asked for so far. Where fewer
        than half of the whole responses closed their trace, claims about traces are withheld, and the share is said instead."""
        about, tokens, closed = self.profile.about, sum(self.doors.store.drawn.values()), [*self.doors.store.closed.values()]
        if closed and (share := wilson(sum(closed), len(closed))).value < CLOSED:
            claims = plots.withheld(claims, self.profile.name, share)
            about = f"{about} Only {share.value:.0%} of the traces were closed: what is shown of traces means nothing."
        plots.save(figure, self.figures, name, claims, profile=self.profile.name, about=about, artifacts=artifacts, tokens=tokens)


def made(part: Part) -> Any:
    """The object a ``Part`` describes."""
    try:
        return reference(part.use)(**part.arguments)
    except TypeError as error:
        raise BadInput(f"{part.use}: wrong arguments ({error})") from None


def panel(judges: Sequence[Mapping[str, Any]], rule: str = UNANIMOUS) -> Panel:
    """A panel of judges, each written as a ``Part``."""
    return Panel([made(from_json(Part, dict(one))) for one in judges], rule)


def by_question(**judges: Mapping[str, Any]) -> ByQuestion:
    """A judge for each question, each written as a ``Part``."""
    return ByQuestion({question: made(from_json(Part, dict(one))) for question, one in judges.items()})


@functools.cache
def _kept(part: str) -> Any:
    """The object of a ``Part`` written as JSON, made once: a judge may hold a model."""
    return made(from_json(Part, json.loads(part)))


def sampler(model: Model, folder: Path, chat: Chat, adapter: Path | None = None) -> Sampler:
    """The sampler of a profile's model, with an adapter or without."""
    if model.server:
        return ServerSampler(model.server, chat, adapter=adapter)
    return TransformersSampler(folder, chat, adapter=adapter, device=model.device, dtype=model.dtype, quantize=model.quantize,
                               batch_size=model.batch_size)  # fmt: skip


def open_bench(profile: str, overrides: Mapping[str, Any] | None = None, store: str = "", figures: str = "") -> Bench:
    """Read a profile and open its doors. ``store`` and ``figures`` are folders; empty means the usual places."""
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm asks for widgets that nobody here uses
    settings = read(profile, overrides)
    folder = Path(made(settings.model.find) if settings.model.find else settings.model.folder).expanduser()
    if not settings.model.find and not (settings.model.folder and folder.is_dir()):
        raise BadInput(f"model folder {str(folder)!r} is missing; put a model there or name another as model.folder")
    chat = Chat(folder, prefill=settings.model.prefill, system=settings.model.system)
    doors = Doors(Store(store or None), chat, sampler(settings.model, folder, chat), made(settings.judge), settings.seed)
    target = Path(figures).expanduser() if figures else house() / "figures" / settings.name
    return Bench(settings, doors, folder, target, (profile, overrides or {}, store, figures))
