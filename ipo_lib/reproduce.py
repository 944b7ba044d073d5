"""Intervened Preference Optimization, reproduced: a profile's notebooks run end to end, but not what is up to date."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ipo_lib import cost as cost_
from ipo_lib.profiles import Yaml, available, house, read
from ipo_lib.records import BadInput, canonical, digest
from ipo_lib.store import MENDS, Store

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
KERNEL = {"GOMP_SPINCOUNT": "5000", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
DEFAULT = "sandbox"  # the profile of a command that names none
PLAIN = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict, "list": list}


@app.command()
def reproduce(
    profile: Annotated[str, typer.Argument(help="a profile's name, or the path of a .yml file")] = DEFAULT,
    parameter: Annotated[list[str] | None, typer.Option("-p", help="name=value: a notebook parameter or dotted setting")] = None,
    store: Annotated[str, typer.Option(help="run store; default $IPO_STORE or ~/.cache/ipo_lib")] = "",
    figures: Annotated[str, typer.Option(help="where figures go; default figures/<profile>")] = "",
    again: Annotated[bool, typer.Option(help="run notebooks that are up to date, too")] = False,
) -> None:
    """Run every notebook of a profile, in order, and write its figures; finished work is never done twice."""
    started, given, root = time.monotonic(), parse(parameter or []), Store(store or None).root
    profile = str(Path(profile).resolve()) if profile.endswith(".yml") else profile
    chosen = read(profile, {name: value for name, value in given.items() if name == "notebooks"}).notebooks
    books = [house() / "notebooks" / f"{name}.ipynb" for name in chosen]
    known = {book: declared(book) for book in books}
    overrides = {name: value for name, value in given.items() if not any(name in names for names in known.values())}
    settings = read(profile, overrides)
    target = Path(figures).expanduser() if figures else house() / "figures" / settings.name
    runs = root / "runs" / f"{settings.name}-{digest([str(target.resolve())], 6)}"
    so_far = [source(), repr(settings)]
    for book in books:
        own = {name: checked(name, value, known[book][name][0]) for name, value in given.items() if name in known[book]}
        values = {"profile": profile, "overrides": overrides, "store": str(root), "figures": str(target), **own}
        run(book, values, runs, digest([*so_far, book.read_text("utf-8"), own]), target, again)
        so_far.append(digest(produced(book, target)))  # later notebooks read the figures of earlier ones
    print(f"{settings.name}: {len(books)} notebooks in {time.monotonic() - started:.0f} s; figures in {target}\n{settings.about}")


@app.command()
def cost(
    profile: Annotated[str, typer.Argument(help="a profile's name, or the path of a .yml file")] = DEFAULT,
    parameter: Annotated[list[str] | None, typer.Option("-p", help="name=value: a notebook parameter or dotted setting")] = None,
) -> None:
    """Say what a profile would generate and how long that takes, before anything runs."""
    given, own = parse(parameter or []), dict[str, dict[str, Any]]()
    for book in read(profile, {name: value for name, value in given.items() if name == "notebooks"}).notebooks:
        known = declared(house() / "notebooks" / f"{book}.ipynb")
        own[book] = {name: checked(name, given.get(name, value), kind) for name, (kind, value) in known.items()}
    settings = read(profile, {name: value for name, value in given.items() if not any(name in one for one in own.values())})
    found = {} if given else cost_.measured(house() / "figures" / settings.name)
    print(cost_.table(cost_.plan(settings, own), settings, found))


@app.command()
def profiles() -> None:
    """List the profiles with what each is for."""
    for name in available():
        print(f"{name:12} {read(name).about}")


def parse(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are YAML."""
    given = {}
    for name, equals, value in (pair.partition("=") for pair in pairs):
        if not equals or not name:
            raise BadInput(f"parameter {name + equals + value!r}: write name=value")
        try:
            given[name] = yaml.load(value, Yaml)
        except yaml.YAMLError:
            raise BadInput(f"parameter {name!r}: {value!r} is not a YAML value") from None
    return given


def declared(book: Path) -> dict[str, tuple[str, Any]]:
    """The parameters of a notebook from its tagged cell: the type and the default of each."""
    if not book.is_file():
        raise BadInput(f"notebook {str(book)!r} is missing; name it in notebooks/ or take it out of the profile")
    cells = json.loads(book.read_text("utf-8"))["cells"]
    tagged = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    lines = [line for line in ast.parse("".join(tagged["source"])).body if isinstance(line, ast.AnnAssign)]
    return {ast.unparse(one.target): (ast.unparse(one.annotation), ast.literal_eval(one.value)) for one in lines if one.value}


def checked(name: str, value: Any, kind: str) -> Any:
    """A parameter of the declared type, or BadInput: papermill itself only warns."""
    expected = PLAIN.get(kind)
    if expected and (not isinstance(value, expected) or (isinstance(value, bool) and kind != "bool")):  # type: ignore[arg-type]
        raise BadInput(f"parameter {name!r}: expected {kind}, found {value!r}")
    return value


def source() -> str:
    """The digest of the installed library, data and weights included."""
    folder = Path(__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return digest([[str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])


def run(book: Path, values: Mapping[str, Any], folder: Path, key: str, figures: Path, again: bool) -> None:
    """Execute one notebook unless its last run had the same key and its figures still stand."""
    folder.mkdir(parents=True, exist_ok=True)
    mark, out, started = folder / f"{book.stem}.done.json", folder / book.name, time.monotonic()
    last = json.loads(mark.read_bytes()) if mark.is_file() else {}
    if not again and last == {"key": key, "figures": produced(book, figures)}:
        print(f"{book.stem}: up to date")
        return
    import papermill
    from papermill.exceptions import PapermillExecutionError

    os.environ.update({name: os.environ.get(name, value) for name, value in KERNEL.items()})
    try:
        papermill.execute_notebook(str(book), str(out), dict(values), progress_bar=False, extra_arguments=["--log-level=50"])
    except PapermillExecutionError as error:
        if error.ename == "BadInput":
            raise BadInput(f"{book.stem}: {error.evalue}") from None
        print(f"{book.stem} failed in cell {error.exec_count}: {error.ename}: {error.evalue}\nsee {out}", file=sys.stderr)
        raise SystemExit(1) from None
    mark.write_text(canonical({"key": key, "figures": produced(book, figures)}) + "\n")
    sidecars = sorted(figures.glob(f"{book.stem[:2]}-*.json"))
    claims = [claim["claim"] for path in sidecars for claim in json.loads(path.read_bytes())["claims"]]
    print(f"{book.stem}: {time.monotonic() - started:.0f} s", *claims, sep="\n  ", flush=True)


def produced(book: Path, figures: Path) -> dict[str, str]:
    """The figure files of a notebook with their hashes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(figures.glob(f"{book.stem[:2]}-*"))}


def main(call: Callable[[], Any] = app) -> None:
    """The ``ipo`` command: a user's mistake is one line and exit code 2."""
    try:
        call()
        return
    except BadInput as error:
        said = str(error)
    except OSError as error:
        if error.errno not in MENDS:
            raise
        said = f"{error.filename}: {error.strerror}; {MENDS[error.errno]}"
    print(f"ipo: {said}", file=sys.stderr)
    raise SystemExit(2)
