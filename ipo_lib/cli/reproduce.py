"""Runs a profile's notebooks in order, and none that is up to date.

1. The *key* of a notebook names all that decides its figures: the library, the profile, the
   notebook with its parameters, and the figures of the notebooks before it.
2. A notebook is *up to date* when its last run had the same key and its figures are unchanged.
3. All others are run by papermill. Beside each executed notebook lies a record of its run: key,
   figures, seconds, and the tokens that it added to the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipo_lib.cli.arguments import RunPlan
from ipo_lib.engines.budget import BUDGET_FILE
from ipo_lib.engines.progress import GENERATED_FILE, Relay
from ipo_lib.profiles.reading import checkout, read_profile
from ipo_lib.records import BadInput, canonical, digest
from ipo_lib.store import write_whole

KERNEL_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "5000",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    "IPO_STATIC": "1",  # nobody presses buttons
}
RECORD = ".done.json"  # ends the name of the record of a notebook's last run
FIGURE_ENDINGS = (".json", ".pdf", ".png")
OUTSIDE_KEY = ("profile", "overrides", "store", "figures")  # parameters that decide no figure


@dataclass(frozen=True)
class Job:
    """One notebook to run; ``key`` names all that decides its figures."""

    notebook: Path
    key: str


def plan_jobs(plan: RunPlan) -> Iterator[Job]:
    """The notebooks in order. Each key covers the figures before it, as they are when it comes."""
    tables = sorted((checkout() / "figures" / "paper_tables").glob("*.csv"))
    studies = [checkout() / "notebooks" / "studies.yml"]
    if not any(values.get("full") for values in plan.values.values()):
        # A full run is about to write these files anew.
        studies += sorted((checkout() / "figures" / plan.settings.name).glob("full-*.json"))
    parts = [source_digest(), repr(replace(plan.settings, notebooks=()))]
    if plan.settings.null_world:
        parts.append(repr(read_profile(plan.settings.null_world)))
    for paths in (tables, studies):
        parts.append(digest([path.read_text("utf-8") for path in paths]))
    for notebook in plan.order:
        if notebook in plan.notebooks:
            values = dict(plan.values[notebook])
            for name in OUTSIDE_KEY:
                values.pop(name, None)
            yield Job(notebook, digest([*parts, notebook.read_text("utf-8"), values]))
        parts.append(digest(figure_hashes(notebook, plan)))


def source_digest() -> str:
    """The digest of the installed library, data and weights included."""
    folder = Path(__file__).parents[1]
    hashes = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            hashes.append([str(path.relative_to(folder)), file_hash(path)])
    return digest(hashes)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def figure_hashes(notebook: Path, plan: RunPlan) -> dict[str, str]:
    """The hash of each figure file of a notebook: those of its last run, if there was one.

    Without a record of a run they are the files whose names begin with its two digits.
    """
    record = read_records(plan.runs).get(notebook.stem)
    if record:
        paths = [plan.figures / name for name in record["figures"]]
    else:
        files = sorted(plan.figures.glob(f"{notebook.stem[:2]}-*"))
        paths = [path for path in files if path.suffix in FIGURE_ENDINGS]
    return {path.name: file_hash(path) for path in paths if path.is_file()}


def written_since(notebook: Path, figures: Path, began: float) -> list[Path]:
    """The figure files of a notebook that a run has written since this time."""
    paths = sorted(figures.glob(f"{notebook.stem[:2]}-*"))
    return [
        path for path in paths if path.suffix in FIGURE_ENDINGS and path.stat().st_mtime >= began
    ]


def is_current(job: Job, plan: RunPlan) -> bool:
    """Whether a notebook's last run had this key and its figures are as it left them."""
    record = read_records(plan.runs).get(job.notebook.stem, {})
    if record.get("key") != job.key:
        return False
    hashes: dict[str, str] = record["figures"]
    return hashes == figure_hashes(job.notebook, plan)


def read_records(runs: Path) -> dict[str, dict[str, Any]]:
    """The record of the last run of every notebook that has run for these figures."""
    records = {}
    for path in sorted(runs.glob(f"*{RECORD}")):
        with suppress(ValueError):  # a full disk or another program has spoilt it
            record = json.loads(path.read_bytes())
            if isinstance(record, dict) and isinstance(record.get("figures"), dict):
                records[path.name.removesuffix(RECORD)] = record
    return records


def other_folders(plan: RunPlan) -> list[str]:
    """Other folders to which this profile's notebooks have written figures, with this store."""
    folders = set()
    for runs in plan.runs.parent.glob(f"{plan.settings.name}-??????"):
        for record in read_records(runs).values():
            folders.add(record.get("folder", ""))
    return sorted(folders - {"", str(plan.figures.resolve())})


def run_notebook(job: Job, plan: RunPlan, again: bool) -> None:
    """Execute one notebook, and print its claims.

    Args:
        job: the notebook with its key.
        plan: what was asked for.
        again: run it also where it is up to date.
    """
    notebook, started = job.notebook, time.monotonic()
    if not again and is_current(job, plan):
        print(f"{notebook.stem}: up to date")
        return
    # 1. Run it, and delete figures of its last run that it no longer makes.
    plan.runs.mkdir(parents=True, exist_ok=True)
    earlier = read_records(plan.runs).get(notebook.stem, {}).get("figures", {})
    counted = (plan.runs / f"{notebook.stem}.tokens").absolute()
    counted.unlink(missing_ok=True)
    began = time.time()
    with kernel_environment(plan, counted):
        execute(notebook, plan)
    written = written_since(notebook, plan.figures, began)
    for name in {*earlier} - {path.name for path in written}:
        if Path(name).suffix in FIGURE_ENDINGS:
            (plan.figures / name).unlink(missing_ok=True)
    # 2. Keep a record of the run.
    seconds = time.monotonic() - started
    record = {
        "key": job.key,
        "folder": str(plan.figures.resolve()),
        "figures": {path.name: file_hash(path) for path in written},
        "seconds": round(seconds, 1),
        "generated": generated_tokens(counted),
    }
    counted.unlink(missing_ok=True)
    write_whole(plan.runs / f"{notebook.stem}{RECORD}", canonical(record) + "\n")
    # 3. Say what it found.
    print(f"{notebook.stem}: {seconds:.0f} s")
    for path in written:
        if path.suffix == ".json":
            for claim in json.loads(path.read_bytes())["claims"]:
                print(f"  {claim['claim']}")
    sys.stdout.flush()


@contextmanager
def kernel_environment(plan: RunPlan, counted: Path) -> Iterator[None]:
    """What a kernel finds in its environment; all of a run count in one budget file.

    Args:
        plan: what was asked for.
        counted: file to which the kernel adds the tokens that it generates.
    """
    online = {"HF_HUB_OFFLINE": "0"} if plan.settings.online else {}
    for name, value in {**KERNEL_ENVIRONMENT, **online}.items():
        os.environ.setdefault(name, value)
    several_runs = BUDGET_FILE in os.environ  # the user counts them together
    os.environ.setdefault(BUDGET_FILE, str(plan.runs.absolute() / "budget.json"))
    os.environ[GENERATED_FILE] = str(counted)
    try:
        yield
    finally:
        del os.environ[GENERATED_FILE]
        if not several_runs:
            del os.environ[BUDGET_FILE]


def execute(notebook: Path, plan: RunPlan) -> None:
    """Run a notebook's cells in a kernel, and show the kernel's progress.

    Raises:
        BadInput: a cell met bad input.
        SystemExit: a cell failed in another way.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    output, relay = plan.runs / notebook.name, Relay(notebook.stem[:2])
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            plan.values[notebook],
            progress_bar=False,
            stderr_file=relay,
            coalesce_streams=True,  # of a bar's states only the last one is kept
            extra_arguments=["--log-level=50"],
        )
    except PapermillExecutionError as error:
        if error.ename == "BadInput":
            raise BadInput(f"{notebook.stem}: {error.evalue}") from None
        place = f"{notebook.stem} failed in cell {error.exec_count}"
        print(f"{place}: {error.ename}: {error.evalue}\nsee {output}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        relay.close()
    drop_spent_bars(output)


def drop_spent_bars(executed: Path) -> None:
    """Delete the error output of cells in which only a finished progress bar is left."""
    book = json.loads(executed.read_bytes())
    for cell in book["cells"]:
        kept = []
        for output in cell.get("outputs", []):
            if output.get("name") != "stderr" or "".join(output["text"]).strip():
                kept.append(output)
        if "outputs" in cell:
            cell["outputs"] = kept
    write_whole(executed, json.dumps(book, indent=1, ensure_ascii=False) + "\n")


def store_sizes(root: Path) -> dict[str, int]:
    """The bytes of each stage of a store."""
    sizes = {}
    for stage in sorted(path for path in root.glob("*") if path.is_dir()):
        files = [path for path in stage.rglob("*") if path.is_file()]
        sizes[stage.name] = sum(path.stat().st_size for path in files)
    return sizes


def generated_tokens(counted: Path) -> int:
    """The tokens that a notebook has generated, whatever others wrote into the store meanwhile."""
    return sum(map(int, counted.read_text("utf-8").split())) if counted.exists() else 0
