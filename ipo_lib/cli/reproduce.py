"""Intervened Preference Optimization, reproduced: a profile's notebooks run end to end, but not what is up to date."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ipo_lib import overlap as overlap_
from ipo_lib import prompts as sets
from ipo_lib.cli import capability as capability_
from ipo_lib.cli import cost as cost_
from ipo_lib.cli import doctor as doctor_
from ipo_lib.cli import report
from ipo_lib.cli import train as train_
from ipo_lib.cli.arguments import local, parse
from ipo_lib.cli.planning import Planned, billed, planned
from ipo_lib.engines import processes, progress
from ipo_lib.engines.openai_api import BUDGET_FILE
from ipo_lib.experiments import results, study
from ipo_lib.profiles.reading import checkout, profile_names, read_profile
from ipo_lib.profiles.run import open_run
from ipo_lib.records import BadInput, canonical, digest, to_json
from ipo_lib.store import HINTS, Store

app = typer.Typer(
    help=__doc__, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
KERNEL = {
    "GOMP_SPINCOUNT": "5000",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
}
ANY = "plain"  # the profile of a model without one
DONE = ".done.json"  # ends the name of the record of a notebook's last run
DEFAULT = "sandbox"  # the profile of a command that names none


NAME = Annotated[str, typer.Argument(help="a profile's name, or the path of a .yml file")]
GIVEN = Annotated[
    list[str] | None, typer.Option("-p", help="name=value: a notebook parameter or dotted setting")
]
STORE = Annotated[str, typer.Option(help="run store; default $IPO_STORE or ~/.cache/ipo_lib")]
FIGURES = Annotated[str, typer.Option(help="where figures go; default figures/<profile>")]


@app.command()
def reproduce(
    profile: NAME = DEFAULT,
    parameter: GIVEN = None,
    store: STORE = "",
    figures: FIGURES = "",
    again: Annotated[bool, typer.Option(help="run notebooks that are up to date, too")] = False,
    full: Annotated[
        bool,
        typer.Option(
            help="run every row and seed of the tables, too, instead of reading the committed ones"
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(help="say what would run, what it costs and what is missing; run nothing"),
    ] = False,
    model: Annotated[
        str, typer.Option(help="a model folder, for a run without a profile of its own")
    ] = "",
    prompts: Annotated[str, typer.Option(help="its prompts: a known set, or FILE#column")] = "",
    judge: Annotated[
        str, typer.Option(help="its judge: keyword, a guard's name, or URL#model")
    ] = "",
) -> None:
    """Run every notebook of a profile, in order, and write its figures and a report; finished work is never done twice."""
    if processes.count() > 1:
        raise BadInput(
            f"ipo reproduce in {processes.count()} processes would run every notebook as often; launch ipo train"
        )
    given = [*(parameter or []), *(["full=true"] if full else [])]
    if model or prompts or judge:
        profile = ANY if profile == DEFAULT else profile
        given = [*local(model, prompts, judge), *given]
    if dry_run:
        return rehearse(profile, given, store, figures)
    started, plan = time.monotonic(), planned(profile, given, store, figures)
    for job in jobs(plan):
        run_notebook(job, plan, again)
    marks = records(plan.runs)
    text, page = (
        report.page(plan.settings.name, plan.settings.about, marks, plan.figures),
        plan.runs / "report.html",
    )
    if not page.is_file() or page.read_text("utf-8") != text:
        page.write_text(text, encoding="utf-8")
    print(
        f"{plan.settings.name}: {len(plan.books)} notebooks in {time.monotonic() - started:.0f} s; figures in {plan.figures}"
    )
    print(f"report: {page}\n{plan.settings.about}")


@app.command()
def status(
    profile: NAME = DEFAULT, parameter: GIVEN = None, store: STORE = "", figures: FIGURES = ""
) -> None:
    """Say which notebooks of a profile are up to date, what each took, and what the store holds; runs nothing."""
    plan = planned(profile, parameter or [], store, figures)
    for job in jobs(plan):
        done = last(job.book, plan.runs)
        state = "up to date" if current(job, plan) else "to run again" if done else "to run"
        took = f"{done['seconds']:6.0f} s {done['generated']:9,} tokens" if done else ""
        print(f"{job.book.stem:26} {state:12} {took}".rstrip())
    sizes = {
        one.name: sum(file.stat().st_size for file in one.rglob("*") if file.is_file())
        for one in folders(plan.root)
    }
    held = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.items())
    print(f"store {plan.root}: {held or 'empty'}\nfigures {plan.figures}")


@app.command()
def doctor(
    profile: Annotated[
        str, typer.Argument(help="a profile, whose own needs are looked at, too")
    ] = "",
    parameter: GIVEN = None,
    store: STORE = "",
) -> None:
    """Look at this machine, and at what a profile needs: packages, device, memory, models, data, keys, servers."""
    found = list(doctor_.checks(Store(store or None).root))
    if profile:
        settings, own = billed(planned(profile, parameter or [], store, ""))
        found += [
            *doctor_.needs(settings),
            *doctor_.speed(settings, cost_.paid(cost_.plan(settings, own))),
        ]
        found += doctor_.rehearsed(settings)
    for one in found:
        print(one)
    if troubles := sum(bool(one.hint) for one in found):
        raise BadInput(f"{troubles} of {len(found)} checks need a hand; the mends stand above")


def rehearse(profile: str, given: list[str], store: str, figures: str) -> None:
    """What a run would do and cost, and all that it lacks."""
    plan = planned(profile, given, store, figures)
    cost(profile, given)
    for one in doctor_.speed(plan.settings, cost_.paid(cost_.plan(*billed(plan)))):
        print(one)
    found = [*doctor_.checks(plan.root), *doctor_.needs(plan.settings)]
    lacking = [one for one in found if one.hint]
    print(
        f"\n{len(lacking)} of {len(found)} checks need a hand" + (":" if lacking else ""),
        *lacking,
        sep="\n",
    )


@app.command()
def train(
    profile: NAME = DEFAULT,
    parameter: GIVEN = None,
    store: STORE = "",
    harmful: Annotated[
        str, typer.Option(help="the prompt set that pairs are made from")
    ] = "train_harmful",
    benign: Annotated[
        str, typer.Option(help="the prompt set of stage 2's benign pairs")
    ] = "train_benign",
) -> None:
    """Train both stages of a profile; on several GPUs: accelerate launch --num_processes N -m ipo_lib.cli.reproduce train ..."""
    found = train_.train(open_run(profile, parse(parameter or []), store), harmful, benign)
    if processes.is_first():
        reasons = ", ".join(f"{n} {reason}" for reason, n in found.counts.items() if n)
        print(f"{profile}: {found.pairs} pairs ({reasons})")
        print(
            f"stage 1: {len(found.rows)} steps, last loss {found.rows[-1]['loss']:.4f}, {found.stage1}"
        )
        print(f"{found.message}; {found.stage2}" if found.stage2 else found.message)


@app.command()
def overlap(profile: NAME = "ds-8b", parameter: GIVEN = None) -> None:
    """Say what the test sets of a profile share with its training sets: whole prompts, and eight words in a row."""
    settings = planned(profile, parameter or [], "", "").settings
    test = [*settings.evaluation.harmful, *settings.evaluation.benign]
    train = [name for name in settings.prompts if name not in settings.evaluation.sets]
    loaded = {name: sets.load_prompts(name, settings.prompts[name]) for name in (*train, *test)}
    for one in overlap_.table(loaded, train, test):
        short = f"{one.short} of fewer than {overlap_.WIDTH} words"
        print(
            f"{one.test:16} {one.train:16} {len(one.shared):4} of {one.size} ({one.exact} word for word; {short})"
        )


@app.command()
def cost(profile: NAME = DEFAULT, parameter: GIVEN = None) -> None:
    """Say what a profile would generate and how long that takes, before anything runs."""
    given = parse(parameter or [])
    settings, own = billed(planned(profile, parameter or [], "", ""))
    found = {} if given else cost_.measured(checkout() / "figures" / settings.name)
    print(cost_.table(cost_.plan(settings, own), settings, found, cost_.at_most(settings, own)))


@app.command()
def capability(
    profile: NAME = DEFAULT,
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"of {', '.join(capability_.TASKS)}; default: those without code"),
    ] = None,
    parameter: GIVEN = None,
    adapter: Annotated[str, typer.Option(help="a trained adapter's folder")] = "",
    limit: Annotated[int, typer.Option(help="problems of each task; 0: all")] = 0,
    run_code: Annotated[
        bool, typer.Option(help="allow a task to execute code that the model writes")
    ] = False,
    store: STORE = "",
) -> None:
    """Measure what a profile's model can do, with lm-eval (pip install -e ".[eval]")."""
    tasks = task or [name for name, one in capability_.TASKS.items() if not one.runs_code]
    run, path = (
        open_run(profile, parse(parameter or []), store),
        Path(adapter) if adapter else None,
    )
    settings, root = run.profile, run.session.store.root / "capability"
    known = [run.session.sampler.fingerprint(), adapter, limit, to_json(settings.sampling)]
    asked = {}
    for name in tasks:  # all of them read before the first is run
        out = root / f"{name}-{digest(known)}"
        asked[name] = (
            out,
            capability_.command(
                settings, run.folder, name, out, adapter=path, limit=limit, run_code=run_code
            ),
        )
    for warning in filter(None, (capability_.too_short(settings, name) for name in tasks)):
        print(warning, file=sys.stderr)
    for name, (out, call) in asked.items():
        one = capability_.measure(name, call, out, os.environ)
        print(
            f"{one.task:14} {100 * one.value:5.1f} % (standard error {100 * one.error:.1f}, n={one.n})",
            flush=True,
        )


@app.command()
def table(
    profile: NAME = DEFAULT,
    name: Annotated[str, typer.Argument(help="a table of notebooks/studies.yml")] = "table2",
) -> None:
    """Print a table of the last committed full run of a profile, as Markdown."""
    cells, date = study.committed(read_profile(profile).name, name, study.Cell)
    if not cells:
        raise BadInput(
            f"profile {profile!r} has no full run of {name!r}; run ipo reproduce {profile} --full"
        )
    print(f"`{profile}`, full run of {date}", "", *results.markdown(cells), sep="\n")


@app.command()
def profiles() -> None:
    """List the profiles with what each is for."""
    for name in profile_names():
        print(f"{name:12} {read_profile(name).about}")


@dataclass(frozen=True)
class Job:
    """One notebook to run; ``key`` names all that decides its figures."""

    book: Path
    key: str


def jobs(plan: Planned) -> Iterator[Job]:
    """The notebooks in order; the key of each covers the figures of those before it, as they are when it comes."""
    others = [repr(read_profile(name)) for name in [plan.settings.null_world] if name]
    tables = [
        path.read_text("utf-8")
        for path in sorted((checkout() / "figures" / "paper_tables").glob("*.csv"))
    ]
    studies = [(checkout() / "notebooks" / "studies.yml").read_text("utf-8")]
    if not any(
        values.get("full") for values in plan.values.values()
    ):  # else it is about to make them
        studies += [
            path.read_text("utf-8")
            for path in sorted((checkout() / "figures" / plan.settings.name).glob("full-*.json"))
        ]
    so_far = [source(), repr(plan.settings), *others, digest(tables), digest(studies)]
    for book in plan.books:
        own = {
            name: value
            for name, value in plan.values[book].items()
            if name not in ("profile", "overrides", "store", "figures")
        }
        yield Job(book, digest([*so_far, book.read_text("utf-8"), own]))
        so_far.append(digest(produced(book, plan.figures)))


def source() -> str:
    """The digest of the installed library, data and weights included."""
    folder = Path(__file__).parents[1]
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    return digest(
        [
            [str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()]
            for path in files
        ]
    )


def run_notebook(job: Job, plan: Planned, again: bool) -> None:
    """Execute one notebook unless its last run had the same key and its figures still stand."""
    book, out, started = job.book, plan.runs / job.book.name, time.monotonic()
    if not again and current(job, plan):
        print(f"{book.stem}: up to date")
        return
    import papermill
    from papermill.exceptions import PapermillExecutionError

    plan.runs.mkdir(parents=True, exist_ok=True)
    kernel = KERNEL | {"HF_HUB_OFFLINE": "0" if plan.settings.online else "1"}
    os.environ.update({name: os.environ.get(name, value) for name, value in kernel.items()})
    ours = BUDGET_FILE not in os.environ  # else the user counts several runs together
    os.environ.setdefault(BUDGET_FILE, str(plan.runs.absolute() / "budget.json"))
    held, began = sizes(plan.root), time.time()
    try:
        with progress.watched(plan.runs / "progress.json", book.stem):
            papermill.execute_notebook(
                str(book),
                str(out),
                plan.values[book],
                progress_bar=False,
                extra_arguments=["--log-level=50"],
            )
    except PapermillExecutionError as error:
        if error.ename == "BadInput":
            raise BadInput(f"{book.stem}: {error.evalue}") from None
        print(
            f"{book.stem} failed in cell {error.exec_count}: {error.ename}: {error.evalue}\nsee {out}",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    finally:
        if ours:
            del os.environ[BUDGET_FILE]
    for left in (
        path for path in plan.figures.glob(f"{book.stem[:2]}-*") if path.stat().st_mtime < began
    ):
        left.unlink()  # a figure that this version of the notebook, or this run, no longer makes
    seconds = time.monotonic() - started
    done = {"key": job.key, "figures": produced(book, plan.figures), "seconds": round(seconds, 1)}
    mark(book, plan.runs).write_text(
        canonical({**done, "generated": generated(plan.root, held)}) + "\n"
    )
    sidecars = sorted(plan.figures.glob(f"{book.stem[:2]}-*.json"))
    claims = [
        claim["claim"] for path in sidecars for claim in json.loads(path.read_bytes())["claims"]
    ]
    print(f"{book.stem}: {seconds:.0f} s", *claims, sep="\n  ", flush=True)


def mark(book: Path, runs: Path) -> Path:
    """Where the record of a notebook's last run lies."""
    return runs / f"{book.stem}{DONE}"


def last(book: Path, runs: Path) -> dict[str, Any]:
    """The record of a notebook's last run; empty when there is none."""
    return json.loads(path.read_bytes()) if (path := mark(book, runs)).is_file() else {}


def records(runs: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every notebook that has run for these figures, by name, with the record of its last run: also those not asked for now."""
    found = {
        path.name.removesuffix(DONE): json.loads(path.read_bytes())
        for path in runs.glob(f"*{DONE}")
    }
    return sorted(found.items())


def current(job: Job, plan: Planned) -> bool:
    """Whether a notebook's last run had this key and its figures are as it left them."""
    done = last(job.book, plan.runs)
    return bool(done) and (done["key"], done["figures"]) == (
        job.key,
        produced(job.book, plan.figures),
    )


def folders(root: Path) -> list[Path]:
    """The stages of a store."""
    return sorted(path for path in root.glob("*") if path.is_dir())


def sizes(root: Path) -> dict[Path, int]:
    """The bytes of whole lines in every ledger of a store; a torn last line is cut off by the next writer."""
    return {path: path.read_bytes().rfind(b"\n") + 1 for path in root.glob("*/*/records.jsonl")}


def generated(root: Path, before: Mapping[Path, int]) -> int:
    """Tokens in the rollouts that a store has got since it had the sizes ``before``."""
    total = 0
    for path, size in sizes(root).items():
        if size > before.get(path, 0):
            with path.open("rb") as file:
                file.seek(before.get(path, 0))
                records = [json.loads(line)["record"] for line in file]
            total += sum(
                len(one["token_ids"]) - one["prefix_len"] for one in records if "token_ids" in one
            )
    return total


def produced(book: Path, figures: Path) -> dict[str, str]:
    """The figure files of a notebook with their hashes."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(figures.glob(f"{book.stem[:2]}-*"))
    }


def main(call: Callable[[], Any] = app) -> None:
    """The ``ipo`` command: a user's mistake is one line and exit code 2."""
    try:
        call()
        return
    except BadInput as error:
        said = str(error)
    except OSError as error:
        if error.errno not in HINTS:
            raise
        said = f"{error.filename}: {error.strerror}; {HINTS[error.errno]}"
    print(f"ipo: {said}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":  # for accelerate launch -m
    main()
