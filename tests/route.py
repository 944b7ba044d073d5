"""The whole route as a process that can be killed.

``python route.py scripted|real FOLDER`` forks one run a line of stdin.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot
import scripted
import transformers.utils.chat_template_utils

from ipo_lib import csr, evaluation, pipeline, plots, stages
from ipo_lib.chat import Chat
from ipo_lib.pairs import PairSettings
from ipo_lib.profiles.claims import claim, save_figure
from ipo_lib.records import SAFE, TRACE, UNSAFE
from ipo_lib.sampling import Sampling
from ipo_lib.stats import wilson
from ipo_lib.triggers import Trigger

LOADED = (matplotlib.pyplot, transformers.utils.chat_template_utils)  # once, before the forks
PLANTED = {scripted.ASIDE: 0.5, scripted.CUE: 0.1, scripted.TRIGGER: 0.9}
DRAWS, REAL_DRAWS = 6, 32  # of each prompt


def whole(root: Path, folder: Path) -> None:
    """sample, judge, CSR, turning points, intervene, correct, evaluate, and a figure.

    Scripted and torch-free.
    """
    chat = Chat(folder)
    run = scripted.session(root / "store", chat, scripted.world(chat, PLANTED))
    prompts, named = scripted.PROMPTS, scripted.named()
    eos, think = Sampling(max_tokens=400), Sampling(max_tokens=400, until="think")
    rollouts = stages.sample(run, [stages.Prefix(prompt) for prompt in prompts], think, DRAWS)
    verdicts = stages.judge(run, named, rollouts, TRACE)
    labels = {
        rollout.id: verdict.label for rollout, verdict in zip(rollouts, verdicts, strict=True)
    }
    chosen = stages.random_subset([r for r in rollouts if labels[r.id] == SAFE], 2, 0)
    losers = stages.random_subset([r for r in rollouts if labels[r.id] == UNSAFE], 6, 0)
    settings = csr.CsrSettings(draws=8, mu=0.8, eta=0.2)
    points = stages.measure_csr(run, named, [*chosen, losers[0]], settings, think)
    turns = stages.find_turning_points(run, chosen, points, labels, SAFE, settings)
    cue = stages.find_cues(run, named, losers, scripted.Phrase())
    texts = {"trigger": scripted.TRIGGER, "neutral": scripted.ASIDE, "nothing": ""}
    rates = []
    for name, text in texts.items():
        cases = [
            stages.Replacement(r, at, name, text) for r in losers if (at := cue[r.id]) is not None
        ]
        results = [result for _, result in stages.intervene(run, named, cases, think, 2)]
        rates.append((name, wilson(*stages.count_label(stages.judge(run, named, results)))))
    trigger = Trigger("t", scripted.TRIGGER, 1, 0)
    pairs, counts, _ = pipeline.corrected_pairs(
        run,
        prompts,
        [trigger],
        scripted.Phrase(),
        stages.CorrectionSettings(rounds=2),
        PairSettings(),
        think,
    )
    measured = evaluation.evaluate(
        run, {"harmful": prompts}, evaluation.EvaluationSettings(("harmful",), (), (), 3), eos
    )
    figure, ax = plots.figure()
    plots.rates([*rates, *((one.measure, one.rate) for one in measured)], ax, unit="unsafe (%)")
    claims = [claim(f"{name}: {{}}", rate, origin="calibrated") for name, rate in rates]
    curve = csr.curve_rows(points[losers[0].id])
    artifacts = {
        "curve": curve,
        "pairs": [pair.id for pair in pairs],
        "counts": counts,
        "turns": [turn.token for turn in turns.values()],
    }
    save_figure(
        figure,
        root / "figures",
        "00-route",
        claims,
        profile="scripted",
        about="A test.",
        artifacts=artifacts,
    )
    if "torch" in sys.modules:
        raise RuntimeError("the scripted route loaded torch")


def real(root: Path, folder: Path) -> None:
    """Draws from a real, random model through ``TransformersSampler``."""
    from ipo_lib.engines.transformers_sampler import TransformersSampler

    chat = Chat(folder)
    sampler = TransformersSampler(folder, chat, device="cpu", batch_size=16)
    run = stages.Session(scripted.Store(root / "store"), chat, sampler, scripted.StepJudge())
    starts = [stages.Prefix(prompt) for prompt in scripted.PROMPTS]
    stages.sample(run, starts, Sampling(temperature=1.0, top_p=1.0, max_tokens=24), REAL_DRAWS)


def serve(call: Callable[[Path, Path], None], folder: Path) -> None:
    """One forked run for each folder on stdin: its process id, then its exit status, on stdout."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                call(Path(line.strip()), folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "real":
        import peft
        import torch

        torch.set_num_threads(1)
        LOADED += (peft, transformers.AutoModelForCausalLM, transformers.GenerationConfig)
    serve(whole if sys.argv[1] == "scripted" else real, Path(sys.argv[2]))
