"""The project as a whole: pins, import direction, sizes, notebooks, profiles, citation."""

from __future__ import annotations

import ast
import graphlib
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml

import ipo_lib
from ipo_lib.profiles import reading
from ipo_lib.prompts import object_named
from ipo_lib.sandbox.judge import kind_of

HOUSE = Path(__file__).parents[1]
PACKAGE = HOUSE / "ipo_lib"
FILES = sorted(PACKAGE.rglob("*.py"))
NOTEBOOKS = sorted((HOUSE / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text("utf-8"))["project"]
# The rooms from the ground up: a module imports from its own room and from those below it.
ROOMS = (
    *("records", "stats", "frame", "store", "chat", "segmentation", "prompts"),
    *("csr", "judging"),
    *(
        "sampling",
        "cues",
        "triggers",
        "intervention",
        "pairs",
        "dpo",
        "engines",
        "judges",
        "stages",
    ),
    *("training", "turning_points", "evaluation", "plots", "viewer", "profiles", "pipeline"),
    *("experiments", "cli", "sandbox"),
)
HEAVY = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "vllm",
    "accelerate",
    "datasets",
    "papermill",
    "sklearn",
)
# They subclass what is heavy; imported at first use.
TORCH = {
    "engines.captured",
    "engines.decoding",
    "engines.graphs",
    "engines.lanes",
    "engines.prefix_sharing",
    "engines.trees",
    "engines.trl_trainer",
    "sandbox.build.gpu_check",
}
THINK_TAGS = {"chat", "segmentation", "sandbox"}  # rooms that may name them
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NOTEBOOK_IMPORTS = {"ipo_lib", "pandas", "numpy", "matplotlib"}
PARAMETER = re.compile(r"[a-z][a-z0-9_]*: [a-z][\w\[\], |]* = \S.*  # \S.*")


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, at the top or inside functions, as a dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from [
                name if name in MODULES or module == "ipo_lib" else module for name in names
            ]


def room_of(module: str) -> str:
    """The room of ``ipo_lib.engines.lora`` is ``engines``."""
    return module.removeprefix("ipo_lib.").partition(".")[0]


def upward(module: str, source: str) -> list[str]:
    """The imports of a module that point to its own file or to a room above its own, or to none."""
    height = ROOMS.index(room_of(module))
    inner = [name for name in imported(source) if name.startswith(("ipo_lib", "."))]
    allowed = ROOMS[: height + 1]
    return [name for name in inner if room_of(name) not in allowed or name == module]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def test_the_top_of_the_package_is_these_rooms() -> None:
    assert {room_of(name) for name in MODULES - {"ipo_lib"}} == set(ROOMS)
    assert len(ROOMS) <= 28


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downward(path: Path) -> None:
    source = path.read_text("utf-8")
    if name_of(path) != "ipo_lib":
        assert upward(name_of(path), source) == []
    assert not {name.partition(".")[0] for name in imported(source)} & UNSAFE_MODULES


def test_no_imports_run_in_a_circle() -> None:
    graph = {name_of(path): MODULES & {*imported(path.read_text("utf-8"))} for path in FILES}
    assert graph["ipo_lib.stages.drawing"] > {"ipo_lib.stages.session", "ipo_lib.sampling"}
    graphlib.TopologicalSorter(graph).prepare()
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(
            {**graph, "ipo_lib.sampling": {"ipo_lib.stages.drawing"}}
        ).prepare()


def test_direction_check_can_fail() -> None:
    fine = "from ipo_lib.store import Store\nimport ipo_lib.csr as c\nfrom ipo_lib import chat"
    assert upward("ipo_lib.stages", fine) == []
    bad = (
        "from ipo_lib import training",
        "from ipo_lib.sandbox import world",
        "import ipo_lib.plots as p",
        "from . import csr",
        "from ipo_lib.stages import x",
        "from ipo_lib.new import x",
        "from ipo_lib.sandbox.judge import x",
    )
    for line in bad:
        assert len(upward("ipo_lib.stages", f"def f():\n    {line}")) == 1, line


def test_nothing_heavy_is_loaded_by_imports_or_help(tmp_path: Path) -> None:
    (
        tmp_path / "vllm.py"
    ).touch()  # what a slip would look like: found last, so that the check is seen to work
    script = f"""
import importlib, sys
def report(): print("HEAVY", *[name for name in {HEAVY} if name in sys.modules])
sys.argv = ["ipo", "--help"]
from ipo_lib.cli.app import main
try: main()
except SystemExit as end: assert not end.code
report()
for name in {sorted(MODULES - {f"ipo_lib.{name}" for name in TORCH})}: importlib.import_module(name)
report()
sys.path.append({str(tmp_path)!r})
import vllm
report()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=HOUSE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("HEAVY")] == [
        "HEAVY",
        "HEAVY",
        "HEAVY vllm",
    ]
    assert "reproduce" in done.stdout
    assert PROJECT["scripts"] == {"ipo": "ipo_lib.cli.app:main"}


def test_environment_pins_what_pyproject_pins() -> None:
    environment = yaml.safe_load((HOUSE / "environment.yml").read_text("utf-8"))
    *conda, pip = environment["dependencies"]
    assert pip["pip"] == [*PROJECT["dependencies"], "--editable ."]
    assert conda == ["python=3.11", "pip"]
    assert PROJECT["requires-python"].startswith(">=3.11")
    assert "torch==2.13.0" in PROJECT["dependencies"]
    for one in itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?==\d[\w.]*", one), f"{one} is not pinned"


def test_tests_import_each_other_by_their_bare_names() -> None:
    """``pytest`` puts ``tests``, not the root, on the path.

    ``from tests import …`` works only beside a PYTHONPATH.
    """
    trees = {
        path: ast.walk(ast.parse(path.read_text("utf-8")))
        for path in Path(__file__).parent.glob("*.py")
    }
    origins = {
        path.name: {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        for path, nodes in trees.items()
    }
    assert "models" in origins["test_prefix_sharing.py"]
    assert {
        name
        for name, own in origins.items()
        if any((one or "").split(".")[0] == "tests" for one in own)
    } == set()


def test_no_file_is_long_and_no_weight_is_a_pickle() -> None:
    lines = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert [
        path
        for path in PACKAGE.rglob("*")
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".npy", ".ckpt")
    ] == []


def slips(name: str, source: str) -> list[str]:
    """What a module may not say.

    Think tags outside ``chat``, remote code, pickles, TRL's other ``ipo``.
    """
    allowed = source.replace('"trust_remote_code": False', "")
    forbidden = ("trust_remote_code", "allow_pickle=True", "torch.load(")
    found = [word for word in forbidden if word in allowed]
    tags = "<think>" in source and room_of(name) not in THINK_TAGS
    for node in ast.walk(ast.parse(source)):
        values = (
            [node.value]
            if isinstance(node, ast.keyword) and node.arg in ("loss_type", "loss")
            else []
        )
        if isinstance(node, ast.Dict):
            values = [
                v
                for k, v in zip(node.keys, node.values, strict=True)
                if isinstance(k, ast.Constant) and "loss" in str(k.value)
            ]
        if (
            isinstance(node, ast.AnnAssign | ast.Assign)
            and "loss" in ast.unparse(node).split("=")[0]
        ):
            values = [node.value] if node.value else []
        found += [
            "ipo"
            for v in values
            for leaf in ast.walk(v)
            if isinstance(leaf, ast.Constant) and leaf.value == "ipo"
        ]
    return found + ["<think>"] * tags


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_words_a_module_may_not_say(path: Path) -> None:
    assert slips(name_of(path), path.read_text("utf-8")) == []


def test_word_check_can_fail() -> None:
    for bad in (
        'f(loss_type=["ipo", "sft"])',
        'loss: str = "ipo"',
        'd = {"loss_type": "ipo"}',
        'x.loss_type = "ipo"',
        "f(trust_remote_code=1)",
        '"ends in <think>"',
        "torch.load(x)",
    ):
        assert len(slips("ipo_lib.stages", bad)) == 1, bad
    assert (
        slips("ipo_lib.chat", 'loss_type = "sigmoid"  # never ipo\nname = "ipo"\ntag = "<think>"')
        == []
    )


def shown_twice(sources: list[str]) -> bool:
    """Whether a cell ends in a figure or in Axes.

    ``plots.save`` shows each figure, and in some kernels they are but text.
    """
    trees = [ast.parse(source).body for source in sources]
    figures = set()
    for node in itertools.chain.from_iterable(
        ast.walk(statement) for body in trees for statement in body
    ):
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("plots.figure("):
            figures.add(ast.unparse(node.targets[0]).strip("()").partition(",")[0])
    ends = [body[-1].value for body in trees if body and isinstance(body[-1], ast.Expr)]
    ends += [end.body for end in ends if isinstance(end, ast.IfExp)]
    drawn = [
        isinstance(end, ast.Call) and ast.unparse(end.func).startswith("plots.") for end in ends
    ]
    return any(drawn) or any(ast.unparse(end) in figures for end in ends)


def misshapen(book: nbformat.NotebookNode) -> list[str]:
    """What is wrong with the shape of a notebook."""
    prose = [cell for cell in book.cells if cell.cell_type == "markdown"]
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    texts = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    modules = {name for cell in code for name in imported(cell.source)}
    outside = {name.partition(".")[0] for name in modules} - NOTEBOOK_IMPORTS
    parameters = [line for cell in tagged for line in cell.source.splitlines()]
    lines = [cell.source.splitlines() for cell in code]
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    faults = {
        "title": not book.cells[0].source.startswith("# ") or book.cells[0] not in prose,
        "prose": len(prose) < 6,
        "parameters": len(tagged) != 1 or code[0] not in tagged,
        "parameter line": any(not PARAMETER.fullmatch(line) for line in parameters),
        "outputs": any(cell.outputs or cell.execution_count is not None for cell in code),
        "def": any(isinstance(node, definitions) for node in nodes),
        "lines": any(len([line for line in cell if line.strip()]) > 20 for cell in lines),
        "width": any(len(line) > 100 for cell in book.cells for line in cell.source.splitlines()),
        "imports": bool(outside),
        "figure": shown_twice([cell.source for cell in code]),
        "path": any(re.match(r"/\w|~|[A-Za-z]:[\\/]|file:", text) for text in texts),
    }
    return [name for name, wrong in faults.items() if wrong]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shape(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert len({cell.id for cell in book.cells}) == len(book.cells)
    assert misshapen(book) == []
    assert book.cells[0].source.startswith(f"# {path.stem[:2]} ")


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("parameter line", "\n"),
        ("parameter line", "k: int = 3"),
        ("parameter line", "k = 3  # how many"),
        ("def", "def f(): ..."),
        ("def", "class A: ..."),
        ("lines", "x\n" * 21),
        ("width", "x" * 101),
        ("imports", "from scipy import stats"),
        ("imports", "from ..x import y"),
        ("path", "open('/home/me/x')"),
        ("path", "p = f'~/x{1}'"),
        ("figure", "plots.rates([], ax)"),
        ("figure", "f, ax = plots.figure()\nf"),
        ("figure", "f, ax = plots.figure()\nf if f else 1"),
        ("outputs", "x"),
        ("parameters", "x"),
        ("prose", "x"),
    ],
)
def test_notebook_check_can_fail(fault: str, line: str) -> None:
    book = nbformat.read(NOTEBOOKS[0], as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    cell = code[0] if fault == "parameter line" else code[-1]
    cell.source = f"{cell.source}\n{line}"
    cell.execution_count = 3 if fault == "outputs" else None
    cell.metadata["tags"] = ["parameters"] if fault in ("parameters", "parameter line") else []
    if fault == "prose":
        book.cells = [book.cells[0], *code]
    if fault == "width":  # of prose, too
        book.cells[0].source += f" {line}"
        cell.source = ""
    assert fault in misshapen(book)
    assert len(misshapen(book)) == 1 or fault == "parameters"


@pytest.mark.parametrize("name", reading.profile_names())
def test_profiles_read(name: str) -> None:
    settings = reading.read_profile(name)
    assert settings.name == name
    assert settings.about.endswith(".")
    assert {f"{book}.ipynb" for book in settings.notebooks} <= {path.name for path in NOTEBOOKS}
    for part in (settings.judge, settings.detector, settings.triggers, settings.model.find):
        assert part is None or callable(object_named(part.use))
    if "sandbox" in settings.judge.use:
        assert {kind_of(text) for text in settings.neutral} == {"aside"}


def test_tiny_has_neutral_sentences_and_citation_names_the_paper() -> None:
    assert len(reading.read_profile("tiny").neutral) >= 3
    citation = yaml.safe_load((HOUSE / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == ipo_lib.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "2509.24393" in str(citation["preferred-citation"])


SIDECARS = sorted((HOUSE / "figures").glob("*/[0-9][0-9]-*.json"))


@pytest.mark.parametrize("path", SIDECARS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_claim_ends_in_what_it_comes_to(path: Path) -> None:
    words = ("holds", "undecided", "within the margin", "the other way round")
    for claim in json.loads(path.read_text("utf-8"))["claims"]:
        verdict = claim["verdict"]  # None: a measured number that claims nothing
        assert verdict is None or verdict in words
        assert verdict is None or claim["claim"].endswith(f": {verdict}.")
        assert "does not hold" not in claim["claim"]


def test_an_installed_package_holds_all_data_files() -> None:
    patterns = tomllib.loads((HOUSE / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {HOUSE / "ipo_lib" / "sandbox" / "README.md"}  # it is read on the web page only
    for package, globs in patterns["package-data"].items():
        for pattern in globs:
            shipped |= set((HOUSE / package.replace(".", "/")).glob(pattern))
    files = [path for path in (HOUSE / "ipo_lib").rglob("*") if path.is_file()]
    data = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert len(data) > 40
    assert data - shipped == set()
