"""Intervened Preference Optimization: reproduce its findings and its training with a profile."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ipo_lib import prompts as prompt_sets
from ipo_lib.cli import capability, cost, doctor, findings, pages, report, reproduce, train
from ipo_lib.cli.arguments import (
    RunPlan,
    choose_notebooks,
    model_settings,
    parse_pairs,
    plan_run,
    profile_family,
)
from ipo_lib.cli.explorer.page import write_page
from ipo_lib.cli.explorer.stored import read_traces
from ipo_lib.engines import processes
from ipo_lib.experiments import study, study_cells
from ipo_lib.profiles.reading import checkout, profile_names, read_profile
from ipo_lib.profiles.run import open_run
from ipo_lib.records import BadInput
from ipo_lib.store import HINTS, Store

app = typer.Typer(
    help=__doc__, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
DEFAULT = "sandbox"  # the profile of a command that names none
OWN_MODEL = "plain"  # the profile of a model without one
KEPT = "what is finished is kept, run again to go on"

ProfileName = Annotated[str, typer.Argument(help="a profile's name, or the path of a .yml file")]
Pairs = Annotated[
    list[str] | None, typer.Option("-p", help="name=value: a notebook parameter or dotted setting")
]
StoreFolder = Annotated[str, typer.Option(help="run store; default $IPO_STORE or ~/.cache/ipo_lib")]
FigureFolder = Annotated[str, typer.Option(help="where figures go; default figures/<profile>")]


def option(help_text: str) -> Any:
    """An option of a command, with its line of help."""
    return typer.Option(help=help_text)


@app.command("reproduce")
def reproduce_profile(
    profile: ProfileName = DEFAULT,
    notebooks: Annotated[
        list[str] | None, typer.Argument(help="only these, such as 00 04; default: all")
    ] = None,
    parameter: Pairs = None,
    store: StoreFolder = "",
    figures: FigureFolder = "",
    again: Annotated[bool, option("run notebooks that are up to date, too")] = False,
    full: Annotated[
        bool, option("run every row and seed of the tables, too, not only read the committed ones")
    ] = False,
    dry_run: Annotated[
        bool, option("say what would run, what it costs and what is missing; run nothing")
    ] = False,
    model: Annotated[str, option("a model folder, for a run without a profile of its own")] = "",
    prompts: Annotated[str, option("its prompts: a known set, or FILE#column")] = "",
    judge: Annotated[str, option("its judge: keyword, a guard's name, or URL#model")] = "",
) -> None:
    """Run the notebooks of a profile in order, and write its figures and a report.

    Finished work is never done twice.
    """
    if processes.count() > 1:
        raise BadInput(
            f"ipo reproduce in {processes.count()} processes would run every notebook as often; "
            "launch ipo train"
        )
    pairs = [*(parameter or []), *(["full=true"] if full else [])]
    if model or prompts or judge:
        profile = OWN_MODEL if profile == DEFAULT else profile
        pairs = [*model_settings(model, prompts, judge), *pairs]
    if notebooks:
        pairs.append(choose_notebooks(profile, notebooks))
    plan = plan_run(profile, pairs, store, figures)
    if dry_run:
        rehearse_run(plan, profile, given=bool(pairs))
        return
    started = time.monotonic()
    for job in reproduce.plan_jobs(plan):
        reproduce.run_notebook(job, plan, again)
    page, settings = plan.runs / "report.html", plan.settings
    report.write_report(page, settings, reproduce.read_records(plan.runs), plan.figures)
    seconds = time.monotonic() - started
    print(
        f"{settings.name}: {len(plan.notebooks)} notebooks in {seconds:.0f} s; "
        f"figures in {plan.figures}"
    )
    names = [notebook.stem for notebook in plan.notebooks]
    if lines := findings.verdicts(settings.name, plan.figures, names, settings.null_world):
        print("\nThe paper's findings here (* calibrated: no finding):", *lines, sep="\n")
    print(f"\nreport: {page}\n{settings.about}")


def rehearse_run(plan: RunPlan, profile: str, given: bool) -> None:
    """Print what a run would do and cost, and all that it lacks.

    Args:
        plan: what was asked for.
        profile: the profile's name or file.
        given: whether settings or parameters were changed.
    """
    parameters = plan.parameters()
    print_cost(plan, profile, given)
    for check in doctor.check_speed(plan.settings, cost.bill(plan.settings, parameters).tokens()):
        print(check)
    checks = [*doctor.check_machine(plan.store), *doctor.check_needs(plan.settings, parameters)]
    lacking = [check for check in checks if check.hint]
    print(f"\n{len(lacking)} of {len(checks)} checks failed" + (":" if lacking else ""))
    for check in lacking:
        print(check)


@app.command("status")
def show_status(
    profile: ProfileName = DEFAULT,
    parameter: Pairs = None,
    store: StoreFolder = "",
    figures: FigureFolder = "",
) -> None:
    """Say which notebooks of a profile are up to date, what each took, and what the store holds.

    Runs nothing.
    """
    plan = plan_run(profile, parameter or [], store, figures)
    records = reproduce.read_records(plan.runs)
    for job in reproduce.plan_jobs(plan):
        record = records.get(job.notebook.stem)
        state, spent = "to run", ""
        if record:
            state = "up to date" if reproduce.is_current(job, plan) else "to run again"
            spent = f"{record['seconds']:6.0f} s {record['generated']:9,} tokens"
        print(f"{job.notebook.stem:26} {state:12} {spent}".rstrip())
    sizes = reproduce.store_sizes(plan.store)
    stages = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.items())
    print(f"store {plan.store}: {stages or 'empty'}\nfigures {plan.figures}")
    for folder in reproduce.other_folders(plan):
        print(f"there are runs with other figures, too; to see them: --figures {folder}")


@app.command("doctor")
def check_machine(
    profile: Annotated[str, typer.Argument(help="a profile whose needs are checked, too")] = "",
    parameter: Pairs = None,
    store: StoreFolder = "",
) -> None:
    """Look at this machine, and at what a profile needs.

    That is packages, device, memory, models, data, keys and servers.
    """
    checks = list(doctor.check_machine(Store(store or None).root))
    if profile:
        plan = plan_run(profile, parameter or [], store, "")
        settings, parameters = plan.settings, plan.parameters()
        checks += doctor.check_needs(settings, parameters)
        checks += doctor.check_speed(settings, cost.bill(settings, parameters).tokens())
        checks += doctor.check_rehearsal(settings)
    for check in checks:
        print(check)
    failed = sum(bool(check.hint) for check in checks)
    if failed:
        raise BadInput(f"{failed} of {len(checks)} checks failed; each line above says what to do")


@app.command("view")
def view_traces(
    profile: ProfileName = DEFAULT,
    parameter: Pairs = None,
    prompt_set: Annotated[
        list[str] | None, typer.Option("--set", help="a prompt set; default: all of the profile")
    ] = None,
    prompt: Annotated[
        list[str] | None, option("a prompt of your own, as you asked it; its traces are shown, too")
    ] = None,
    limit: Annotated[int, option("traces of each kind at most")] = 500,
    out: Annotated[str, option("the HTML file; default my-figures/<profile>-traces.html")] = "",
    store: StoreFolder = "",
    figures: FigureFolder = "",
) -> None:
    """Write a page to walk through the traces that the store holds.

    It is one HTML file with their sentences, S, continuations, and what was made of them. Nothing
    is drawn or judged for it.
    """
    run = open_run(profile, parse_pairs(parameter or []), store, figures)
    adapters = {}
    try:
        adapters = run.trained_adapters()
    except BadInput as error:
        print(f"the page shows no trained model: {error}")
    traces = read_traces(run, prompt_set or (), limit, adapters, own=prompt or ())
    path = Path(out).expanduser() if out else run.figures.with_name(f"{profile}-traces.html")
    write_page(path, run.profile, traces)
    kinds = Counter(trace.kind for trace in traces)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    print(f"{path}: {listed}; open it in a browser")


@app.command("train")
def train_stages(
    profile: ProfileName = DEFAULT,
    parameter: Pairs = None,
    store: StoreFolder = "",
    harmful: Annotated[str, option("the prompt set that pairs are made from")] = "train_harmful",
    benign: Annotated[str, option("the prompt set of stage 2's benign pairs")] = "train_benign",
) -> None:
    """Train both stages of a profile.

    On several GPUs: accelerate launch --num_processes N -m ipo_lib.cli train ...
    """
    trained = train.train(open_run(profile, parse_pairs(parameter or []), store), harmful, benign)
    if processes.is_first():
        counts = [f"{count} {reason}" for reason, count in trained.counts.items() if count]
        loss = trained.rows[-1]["loss"]
        print(f"{profile}: {trained.pairs} pairs ({', '.join(counts)})")
        print(f"stage 1: {len(trained.rows)} steps, last loss {loss:.4f}, {trained.stage1}")
        print(f"{trained.message}; {trained.stage2}" if trained.stage2 else trained.message)


@app.command("overlap")
def show_overlap(profile: ProfileName = "ds-8b", parameter: Pairs = None) -> None:
    """Say what the test sets of a profile share with its training sets.

    That is whole prompts, and eight words in a row.
    """
    settings = plan_run(profile, parameter or [], "", "").settings
    evaluation = settings.evaluation
    test = [*evaluation.harmful, *evaluation.benign]
    training = [name for name in settings.prompts if name not in evaluation.sets]
    loaded = {}
    for name in (*training, *test):
        loaded[name] = prompt_sets.load_prompts(name, settings.prompts[name])
    for overlap in prompt_sets.measure_overlap(loaded, training, test):
        print(
            f"{overlap.test:16} {overlap.train:16} {len(overlap.shared):4} of {overlap.size} "
            f"({overlap.exact} word for word; "
            f"{overlap.short} of fewer than {prompt_sets.OVERLAP_WORDS} words)"
        )


@app.command("cost")
def show_cost(profile: ProfileName = DEFAULT, parameter: Pairs = None) -> None:
    """Say what a profile would generate and how long that takes, before anything runs."""
    plan = plan_run(profile, parameter or [], "", "")
    print_cost(plan, profile, given=bool(parameter))


def print_cost(plan: RunPlan, profile: str, given: bool) -> None:
    """Print the bill, beside the tokens of the committed figures where nothing was changed.

    Args:
        plan: what was asked for.
        profile: the profile's name or file.
        given: whether settings or parameters were changed.
    """
    measured: dict[str, int] = {}
    for name in [] if given else profile_family(profile):
        measured = measured or cost.last_run(checkout() / "figures" / name)
    print(cost.cost_table(plan.settings, plan.parameters(), measured))


@app.command("capability")
def measure_capability(
    profile: ProfileName = DEFAULT,
    task: Annotated[
        list[str] | None, option(f"of {', '.join(capability.TASKS)}; default: those without code")
    ] = None,
    parameter: Pairs = None,
    adapter: Annotated[str, option("a trained adapter's folder")] = "",
    limit: Annotated[int, option("problems of each task; 0: all")] = 0,
    run_code: Annotated[bool, option("allow a task to execute code that the model writes")] = False,
    store: StoreFolder = "",
) -> None:
    """Measure what a profile's model can do, with lm-eval (of the extra "eval")."""
    tasks = task or [name for name, one in capability.TASKS.items() if not one.runs_code]
    run = open_run(profile, parse_pairs(parameter or []), store)
    command = capability.lm_eval_command(
        run.profile,
        run.folder,
        tasks,
        run.session.store.root / "capability",
        adapter=Path(adapter) if adapter else None,
        limit=limit,
        run_code=run_code,
    )
    for warning in capability.length_warnings(run.profile, tasks):
        print(warning, file=sys.stderr)
    capability.run_lm_eval(command)


@app.command("table")
def show_table(
    profile: ProfileName = DEFAULT,
    name: Annotated[str, typer.Argument(help="a table of notebooks/studies.yml")] = "table2",
) -> None:
    """Print a table of the last committed full run of a profile, as Markdown."""
    from ipo_lib.experiments import results

    cells, date = study.read_committed(read_profile(profile).name, name, study_cells.Cell)
    if not cells:
        raise BadInput(
            f"profile {profile!r} has no full run of {name!r}; run ipo reproduce {profile} --full"
        )
    print(f"`{profile}`, full run of {date}", "", *results.markdown(cells), sep="\n")


@app.command("findings")
def show_findings(
    profiles: Annotated[list[str] | None, typer.Argument(help="profiles; default: three")] = None,
    write: Annotated[bool, option("bring the numbers of all pages up to date")] = False,
) -> None:
    """Print what the committed figures say of the paper's findings, as Markdown."""
    names = profiles or ["sandbox", "tiny", "tiny-null"]
    print("\n".join(findings.markdown(names, checkout() / "figures")))
    if write:
        pages.write_pages(names, checkout())


@app.command("profiles")
def list_profiles() -> None:
    """List the profiles with what each is for."""
    for name in profile_names():
        print(f"{name:12} {read_profile(name).about}")


@contextmanager
def stopped_in_one_line() -> Iterator[None]:
    """End by Ctrl-C or SIGTERM with one line; kernels are shut down on the way out."""

    def stop(number: int, _: Any) -> NoReturn:
        name = signal.Signals(number).name
        print(f"\nipo: stopped by {name}; {KEPT}", file=sys.stderr, flush=True)
        logging.disable()  # nbclient and asyncio may still tell that the kernel died
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread only
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(command: Callable[[], Any] = app) -> None:
    """The ``ipo`` command: a user's mistake is one line and exit code 2."""
    try:
        with stopped_in_one_line():
            command()
        return
    except BadInput as error:
        message = str(error)
    except OSError as error:
        if error.errno not in HINTS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        message = f"{place}{error.strerror}; {HINTS[error.errno]}"
    print(f"ipo: {message}", file=sys.stderr)
    raise SystemExit(2)
