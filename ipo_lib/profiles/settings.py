"""Every setting of a run, as records. A profile's YAML file is read into ``Profile``.

A setting is named by a dotted path, such as ``csr.draws``, in YAML, on the command line and in
notebooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ipo_lib.csr import CsrSettings
from ipo_lib.dpo import DpoSettings, Stage2Settings
from ipo_lib.engines.openai_api import Server
from ipo_lib.evaluation import EvaluationSettings
from ipo_lib.pairs import PairSettings
from ipo_lib.prompts import PromptSet
from ipo_lib.records import SPARSE, BadInput, from_json
from ipo_lib.sampling import Sampling
from ipo_lib.stages import CorrectionSettings
from ipo_lib.turning_points.adaptive import SearchSettings

FETCHED = ("ipo_lib.engines.hub:folder", "ipo_lib.judges.guards:guard")  # may come from the hub


@dataclass(frozen=True)
class Component:
    """A judge, a detector, a list of triggers or a folder as data."""

    use: str  # module:name of what is called
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def with_inner(self) -> Iterator[Component]:
        """This component and those among its arguments."""
        yield self
        for value in self.arguments.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict) and "use" in item:
                    yield from from_json(Component, item).with_inner()


@dataclass(frozen=True)
class Model:
    """The model: its folder, how it is prompted, and where it runs."""

    folder: str = ""  # where the model lies
    find: Component | None = None  # or what returns that folder
    prefill: str = ""  # text put at the beginning of every response
    system: str | None = None  # system turn
    # What the chat template may ask for, such as {enable_thinking: false}
    variables: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None  # nf4, for sampling and for training
    batch_size: int = 64  # responses sampled together
    server: Server | None = None  # samples there; the folder needs weights for training only
    architecture: str = "llama"  # for ``ipo doctor`` while the folder is not here yet


@dataclass(frozen=True)
class Expected:
    """What ``ipo cost`` reckons with: mean lengths in tokens, and the speed of a machine."""

    trace: float = 1500.0
    answer: float = 500.0
    corrected: float = 0.0  # what follows a replaced sentence; 0: half a trace
    response: Mapping[str, float] = field(default_factory=dict)  # whole responses, by prompt set
    sentences: float = 60.0  # of a trace
    # Rollouts of a search: for a safe turn of a safe trace, an unsafe turn of an unsafe trace, and
    # where the two differ (none).
    search: Mapping[str, float] = field(
        default_factory=lambda: {"safe": 160.0, "unsafe": 160.0, "none": 50.0}
    )
    tokens_per_second: float = 500.0  # generated in this process
    server_tokens_per_second: float = 500.0  # generated behind ``model.server``
    verdicts_per_second: float = 5.0  # of a guard in this process
    seconds_per_pair: float = 1.0  # of training
    seconds_per_notebook: float = 10.0
    machine: str = "a machine that was not measured"
    gpu_gib: float = 0.0  # GPU memory for sampling and training


@dataclass(frozen=True)
class Example:
    """A trace for a detector that is asked by few-shot."""

    sentences: tuple[str, ...]
    answer: int  # number of the first cue, from 1; 0: none


@dataclass(frozen=True)
class StudySettings:
    """How much of a table of a full run is made."""

    seeds: int = 1
    rows: tuple[str, ...] = ()  # none named: all
    workers: int = 2  # processes, each with its own model; never more than seeds or cores


# Words of a recipe.
NONE, INTERVENED, UNSHARED = "none", "intervened", "unshared"
NATURAL, TEACHER, REWARDS, AT_INFERENCE = "natural", "teacher", "rewards", "at-inference"
PRIMED, PRIMER, SELF = "primed", "primer-at-inference", "own-safe"
RECOVERED, MASKED = "recovered", "masked"
PROFILE, TRUTH, CSR, MODEL, ANYWHERE = "profile", "truth", "csr", "model", "random"
POOL, PARAPHRASES, NEUTRAL, RANDOM = "pool", "paraphrases", "neutral", "random"
STAGE_2, MIXED, GRPO = "stage 2", "mixed", "grpo"
RECIPE_CHOICES = {
    "data": (
        NONE,
        INTERVENED,
        UNSHARED,
        NATURAL,
        TEACHER,
        REWARDS,
        AT_INFERENCE,
        PRIMED,
        PRIMER,
        SELF,
        RECOVERED,
        MASKED,
    ),
    "triggers": (POOL, PARAPHRASES, NEUTRAL, RANDOM),
    "then": ("", STAGE_2, MIXED, GRPO),
}


@dataclass(frozen=True)
class Recipe:
    """How a safer model is made: the paper's way by default, or one that it is compared with."""

    # intervened: pairs of Algorithm 1. unshared: the same with winners swapped between the traces
    # of a prompt. natural: a safe and an unsafe sample of one prompt. teacher: safe responses of a
    # stronger source. rewards: GRPO samples its own. none: no training. at-inference: no training,
    # cues are replaced while the model answers. Of other methods (``experiments.rivals``): primed,
    # primer-at-inference, own-safe, recovered; masked is a control.
    data: str = INTERVENED
    # profile: the profile's. truth: exact. csr: by Eq. 3. model: few-shot. random: any sentence.
    # "shift -1", "shift 2": that many sentences before or after the exact one.
    detector: str = PROFILE
    triggers: str = POOL  # or paraphrases, neutral sentences, random ones of the pool
    then: str = ""  # stage 2, benign pairs mixed into stage 1, or GRPO
    pairs: int = 0  # at most that many; 0: all
    weigh: bool = False  # weigh pairs by the change of S at the loser's cue
    judge: str = PROFILE  # the profile's judge; anything else: its second one
    # SafePath's sentence at the beginning of a trace, and ThinkSafe's sentence after a prompt. A
    # model that knows only an invented world needs them in the words of that world.
    primer: str = field(default="Let's think about safety first.", metadata=SPARSE)
    hint: str = field(default="Refuse if an answer could cause harm.", metadata=SPARSE)

    def __post_init__(self) -> None:
        for name, choices in RECIPE_CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                listed = ", ".join(map(repr, choices))
                raise BadInput(f"recipe: {name} {value!r} is unknown; use {listed}")


REWARD_FORMULAS = {"I[z]": (1, 0), "I[y]": (0, 1), "I[z]+I[y]": (1, 1), "I[z]-I[y]": (1, -1)}


@dataclass(frozen=True)
class GrpoSettings:
    """GRPO (Table 1). LoRA, precision and the rest are stage 1's; the learning rate is constant."""

    reward: str = "I[z]-I[y]"  # of REWARD_FORMULAS; I[.] is 1 where the judge says safe
    budget: int = 0  # generated tokens at which, to half a step, training ends
    # Where budget is 0: this many times what Algorithm 1 generates for the same prompts.
    multiple: float = field(default=1.0, metadata=SPARSE)
    group: int = 8  # responses of one prompt
    batch_size: int = 16  # responses per forward
    accumulation: int = 4  # forwards a step; times batch_size a multiple of group
    learning_rate: float = 1e-5
    beta: float = 0.0  # weight of the KL to the model without adapter
    loss: str = "grpo"  # TRL's loss_type
    scale: str = "group"  # TRL's scale_rewards
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reward not in REWARD_FORMULAS:
            listed = ", ".join(REWARD_FORMULAS)
            raise BadInput(f"grpo: reward {self.reward!r} is unknown; use {listed}")
        responses = self.batch_size * self.accumulation
        if min(self.group, self.batch_size, self.accumulation) < 1 or responses % self.group:
            raise BadInput(
                f"grpo: {self.batch_size} x {self.accumulation} responses a step do not make "
                f"groups of {self.group}"
            )
        positive = min(self.learning_rate, self.multiple) > 0
        if not positive or self.beta < 0 or self.budget < 0:
            raise BadInput(
                f"grpo: learning_rate {self.learning_rate}, multiple {self.multiple}, beta "
                f"{self.beta}, budget {self.budget}: give numbers above 0"
            )


@dataclass(frozen=True)
class Profile:
    """Every setting of a run."""

    # What the run is, and what it works with.
    name: str
    about: str  # one sentence on what the numbers are worth; it stands under every figure
    model: Model
    prompts: Mapping[str, PromptSet]
    judge: Component
    second_judge: Component | None = None  # for headlines
    detector: Component | None = None  # None: a lexicon is learnt from the run's judged rollouts
    triggers: Component | None = None  # None: they are mined from the run's judged rollouts
    neutral: tuple[str, ...] = ()  # sentences without effect, for controls
    examples: tuple[Example, ...] = ()  # for a model that is asked for cues
    # What only some worlds have. truth: a detector that is never wrong. wide_truth: the same for
    # any sentence that commits to helping. safety_aware: a detector of the first sentence that
    # recognises harm and turns away from it. For attacks, templates: frames with {request};
    # subject: finds the part of a request to obfuscate; rewrite: says a request in other words.
    # details: counts the usable details of a text. paraphrases: trigger sentences that no step has
    # seen. pool: all triggers that were mined. teacher: safe responses of a stronger source. forks:
    # a file of recorded curves of this model's traces. aligned: adapter of a model aligned on
    # answers only.
    extras: Mapping[str, Component | None] = field(default_factory=dict)
    null_world: str = ""  # the profile of a world where cues and triggers cause nothing
    no_causes: bool = False  # this is such a world: claims of cause become claims of no difference
    calibrated: tuple[str, ...] = ()  # kinds of claims that the world was built or fitted for

    # What is shown.
    notebooks: tuple[str, ...] = ()
    # Values of notebook parameters in ``ipo reproduce``: for all notebooks, or under a notebook's
    # name for it alone.
    parameters: Mapping[str, Any] = field(default_factory=dict)
    studies: Mapping[str, StudySettings] = field(default_factory=dict)  # tables of a full run
    beside: Mapping[str, str] = field(default_factory=dict)  # the paper's benchmark, by prompt set
    reveal: bool = False  # the text is harmless and may be shown
    min_coverage: float = 0.95  # share of texts that must be judged
    equivalence: float = 0.10  # a difference within this much of 0 counts as none
    expected: Expected = Expected()

    # The steps.
    seed: int = 0
    sampling: Sampling = Sampling()
    csr: CsrSettings = CsrSettings()
    search: SearchSettings = SearchSettings()
    plan: CorrectionSettings = CorrectionSettings()
    pairs: PairSettings = PairSettings()
    stage1: DpoSettings = DpoSettings()
    stage2: Stage2Settings = Stage2Settings()
    grpo: GrpoSettings = GrpoSettings()
    recipe: Recipe = Recipe()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def online(self) -> bool:
        """Whether a model, a guard or a prompt set may have to come from the hub."""
        if any(prompt_set.known or prompt_set.hub for prompt_set in self.prompts.values()):
            return True
        for component in (self.model.find, self.judge, self.second_judge):
            if component and any(inner.use in FETCHED for inner in component.with_inner()):
                return True
        return False
