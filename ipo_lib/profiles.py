"""Profiles: one code path, several bodies. A profile is data (``notebooks/profiles/<name>.yml``), read into settings records.

Nothing else in the library asks which profile it is in. A setting is changed by its dotted name, ``csr.draws=16``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.chat import Chat
from ipo_lib.csr import CsrSettings
from ipo_lib.dpo import DpoSettings, MixSettings
from ipo_lib.evaluation import EvaluationSettings
from ipo_lib.intervention import CueDetector, Trigger
from ipo_lib.mining import learn_lexicon, mine_pool
from ipo_lib.pairs import PairSettings
from ipo_lib.prompts import PromptSet, load, reference
from ipo_lib.records import BadInput, Prompt, Record, Rollout, Verdict, typed
from ipo_lib.sampling import Sampling, TransformersSampler
from ipo_lib.stages import Doors, Plan
from ipo_lib.store import Store, default_root


@dataclass(frozen=True)
class Part:
    """A judge, a detector or a folder as data: ``module:name`` and the arguments it is called with."""

    use: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """The model folder (a path, or a ``Part`` that returns one), how it is spoken to, and where it runs."""

    folder: str = ""
    find: Part | None = None
    prefill: str = ""
    system: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 64


@dataclass(frozen=True)
class Profile:
    """Every setting of a run. ``about`` is one sentence for the reader; ``means_nothing`` marks a plumbing run,
    ``reveal`` a world whose text is harmless and may be shown."""

    name: str
    about: str
    model: Model
    prompts: Mapping[str, PromptSet]
    judge: Part
    detector: Part | None = None
    triggers: Part | None = None
    neutral: tuple[str, ...] = ()
    notebooks: tuple[str, ...] = ()
    minutes: float = 0.0
    means_nothing: bool = False
    reveal: bool = False
    min_coverage: float = 0.95
    seed: int = 0
    sampling: Sampling = Sampling()
    csr: CsrSettings = CsrSettings()
    plan: Plan = Plan()
    pairs: PairSettings = PairSettings()
    stage1: DpoSettings = DpoSettings()
    stage2: DpoSettings = DpoSettings()
    mix: MixSettings = MixSettings()
    evaluation: EvaluationSettings = EvaluationSettings()


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
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise BadInput(f"profile {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise BadInput(f"profile {str(path)!r} holds no settings")
    data = {"name": path.stem, **data}
    for dotted, value in (overrides or {}).items():
        change(data, dotted, value)
    return build(Profile, data, "")


def change(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``a.b.c`` in nested settings. Unknown names are caught when the record is built."""
    *path, last = dotted.split(".")
    for step in path:
        data = data.setdefault(step, {})
        if not isinstance(data, dict):
            raise BadInput(f"parameter {dotted!r}: {step!r} holds a value, not settings")
    data[last] = value


def build(kind: type[Record], data: Any, where: str) -> Record:
    """A settings record from nested plain data. Raises BadInput naming the unknown or mistyped setting."""
    if not isinstance(data, Mapping):
        raise BadInput(f"parameter {where!r}: expected settings, found {data!r:.60}")
    hints = typing.get_type_hints(kind)
    names = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            hint = f"did you mean {dotted(where, near[0])!r}?" if near else f"known: {', '.join(names)}"
            raise BadInput(f"parameter {dotted(where, name)!r} is unknown; {hint}")
    missing = [n for n, e in names.items() if n not in data and e.default is e.default_factory is dataclasses.MISSING]
    if missing:
        raise BadInput(f"parameter {dotted(where, missing[0])!r} is missing from the profile")
    return kind(**{name: value_of(hints[name], value, dotted(where, name)) for name, value in data.items()})


def value_of(hint: Any, value: Any, where: str) -> Any:
    """One setting: a record, a mapping of records, or a plain value of its annotated type."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if value is not None and options and dataclasses.is_dataclass(options[0]):
        return build(typing.cast(type, options[0]), value, where)
    if typing.get_origin(hint) is typing.get_origin(Mapping[str, Any]):
        inner = typing.get_args(hint)[1]
        if not isinstance(value, Mapping):
            raise BadInput(f"parameter {where!r}: expected a mapping, found {value!r:.60}")
        return {str(k): v if inner is Any else value_of(inner, v, dotted(where, k)) for k, v in value.items()}
    return typed(hint, value, f"parameter {where!r}")


def dotted(where: str, name: Any) -> str:
    """``where.name``."""
    return f"{where}.{name}" if where else str(name)


@dataclass(frozen=True)
class Bench:
    """A profile with its doors open: what a notebook starts from. Models load when a verb first misses a record."""

    profile: Profile
    doors: Doors
    folder: Path
    figures: Path

    def prompts(self, name: str) -> list[Prompt]:
        """A prompt set of the profile by name."""
        if name not in self.profile.prompts:
            raise BadInput(f"prompt set {name!r} is not in profile {self.profile.name!r}; known: {', '.join(self.profile.prompts)}")
        return load(name, self.profile.prompts[name])

    def sets(self, names: Sequence[str]) -> dict[str, list[Prompt]]:
        """Several prompt sets."""
        return {name: self.prompts(name) for name in names}

    @property
    def thinking(self) -> Sampling:
        """The profile's sampling, stopped where the trace ends."""
        return dataclasses.replace(self.profile.sampling, until="think")

    def detector(self, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> CueDetector:
        """The profile's cue detector; where it names none, a lexicon learnt from these judged rollouts."""
        if self.profile.detector is None:
            return learn_lexicon(self.doors, rollouts, verdicts)
        found: CueDetector = made(self.profile.detector)
        return found

    def triggers(
        self, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], detector: CueDetector
    ) -> list[Trigger]:
        """The profile's triggers in use; where it names none, mined from these judged rollouts."""
        if self.profile.triggers is not None:
            return list(made(self.profile.triggers))
        settings = self.profile
        return mine_pool(self.doors, prompts, rollouts, verdicts, detector, settings.csr, settings.plan, self.thinking)[1]

    def adapted(self, adapter: Path | None) -> Doors:
        """The same doors with a trained adapter on the model (None: as it is)."""
        return dataclasses.replace(self.doors, sampler=sampler(self.profile, self.folder, self.doors.chat, adapter))

    def adapters(self, figure: str) -> dict[str, Path]:
        """The adapters that a training figure names: ``after stage 1``, and ``after stage 2`` where it ran."""
        sidecar = self.figures / f"{figure}.json"
        if not sidecar.is_file():
            raise BadInput(f"{sidecar} is missing; run the training notebook first")
        named = json.loads(sidecar.read_text("utf-8"))["artifacts"]
        stages = {"after stage 1": named["adapter"], "after stage 2": named["stage 2"]}
        root = self.doors.store.root / "adapters"
        found = {stage: root / name / "files" for stage, name in stages.items()}
        return {stage: path for stage, path in found.items() if (path / "adapter_config.json").is_file()}

    def save(self, figure: Any, name: str, claims: Sequence[Mapping[str, Any]], artifacts: Mapping[str, str]) -> None:
        """Write a figure of this profile with its claims."""
        from ipo_lib import plots

        plots.save(figure, self.figures, name, claims, profile=self.profile.name, artifacts=artifacts)


def made(part: Part) -> Any:
    """The object a ``Part`` describes."""
    try:
        return reference(part.use)(**part.arguments)
    except TypeError as error:
        raise BadInput(f"{part.use}: wrong arguments ({error})") from None


def sampler(profile: Profile, folder: Path, chat: Chat, adapter: Path | None) -> TransformersSampler:
    """The sampler of a profile, with an adapter or without."""
    model = profile.model
    return TransformersSampler(folder, chat, adapter=adapter, device=model.device, dtype=model.dtype, batch_size=model.batch_size)


def open_bench(profile: str, overrides: Mapping[str, Any] | None = None, store: str = "", figures: str = "") -> Bench:
    """Read a profile and open its doors. ``store`` and ``figures`` are folders; empty means the usual places."""
    settings = read(profile, overrides)
    folder = made(settings.model.find) if settings.model.find else Path(settings.model.folder).expanduser()
    if not Path(folder).is_dir():
        raise BadInput(f"model folder {str(folder)!r} is missing; put a model there or name another as model.folder")
    chat = Chat(folder, prefill=settings.model.prefill, system=settings.model.system)
    root = Store(Path(store).expanduser() if store else default_root())
    doors = Doors(root, chat, sampler(settings, folder, chat, None), made(settings.judge), settings.seed)
    target = Path(figures).expanduser() if figures else house() / "figures" / settings.name
    return Bench(settings, doors, Path(folder), target)
