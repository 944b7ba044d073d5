"""The ``ipo`` command: a user's mistake is one line and exit code 2; what is done is not redone."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import nbformat
import pytest
import yaml
from models import tiny_tokenizer
from papermill.engines import Engine, NBClientEngine, papermill_engines

from ipo_lib import stages
from ipo_lib.cli import app, arguments, doctor, report, reproduce
from ipo_lib.engines import budget, progress
from ipo_lib.profiles import reading
from ipo_lib.profiles.run import open_run
from ipo_lib.records import BadInput
from ipo_lib.store import Store

REPOSITORY = Path(__file__).parents[1]
QUICK = ["-p", "prompts.train_harmful.count=2", "-p", "draws=2", "-p", "notebooks=[00_quickstart]"]
Ipo = Callable[..., "tuple[int, str, str]"]


class InProcess(Engine):
    """Runs the cells of a notebook in this process, and notes an error as a kernel would."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_: Any) -> None:
        space: dict[str, Any] = {"__name__": "__main__"}
        for index, cell in enumerate(nb_man.nb.cells):
            if cell.cell_type != "code":
                continue
            nb_man.cell_start(cell, index)
            cell.execution_count = index + 1
            try:
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    exec(cell.source, space)
            except Exception as error:
                name, value = type(error).__name__, str(error)
                cell.outputs.append(
                    nbformat.v4.new_output("error", ename=name, evalue=value, traceback=[value])
                )
                nb_man.cell_exception(cell, index, exception=error)
                break
            finally:
                nb_man.cell_complete(cell, index)


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    papermill_engines.register(None, InProcess)
    yield
    papermill_engines.register(None, NBClientEngine)


@pytest.fixture
def ipo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ipo:
    """Calls the command as a shell would: (exit code, stdout, stderr)."""
    for name in ("IPO_STORE", *reproduce.KERNEL_ENVIRONMENT):
        value = reproduce.KERNEL_ENVIRONMENT.get(name, str(tmp_path / "store"))
        monkeypatch.setenv(name, value)

    def call(*arguments: str) -> tuple[int, str, str]:
        folders = ["--figures", str(tmp_path / "figures")] if arguments[0] == "reproduce" else []
        monkeypatch.setattr(sys, "argv", ["ipo", *arguments, *folders])
        code = 0
        try:
            app.main()
        except SystemExit as end:
            code = int(end.code or 0)
        output, errors = capfd.readouterr()
        return code, output, errors

    return call


def one_line(answer: tuple[int, str, str], *says: str) -> None:
    code, _, message = answer
    assert code == 2, answer
    assert message.startswith("ipo: ")
    assert message.endswith("\n")
    assert message.count("\n") == 1, message
    assert "Traceback" not in message
    for part in says:
        assert part in message, message


def shell(*arguments: str, path: Path = REPOSITORY, **options: Any) -> tuple[int, str, str]:
    """The same in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ipo_lib.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tinny"], ["'tinny' is unknown", "tiny"]),
        (["no/such.yml"], ["no/such.yml"]),
        (["tiny", "-p", "csr.drawz=3"], ["'csr.drawz' is unknown", "'csr.draws'"]),
        (["tiny", "-p", "drawz=3"], ["'drawz' is unknown"]),
        (["tiny", "-p", "csr.draws=many"], ["'csr.draws'", "int", "'many'"]),
        (["tiny", "-p", "csr.draws=2.5"], ["'csr.draws'", "int", "2.5"]),
        (["tiny", "-p", "draws=many"], ["'draws'", "int", "'many'"]),
        (["tiny", "-p", "draws=true"], ["'draws'", "int", "True"]),
        (["tiny", "-p", "draws"], ["'draws'", "name=value"]),
        (["tiny", "-p", "=3"], ["name=value"]),
        (["tiny", "-p", "csr.draws=[1,"], ["'csr.draws'", "YAML"]),
        (["tiny", "-p", "notebooks=[99_nothing]"], ["99_nothing"]),
        (["tiny", "-p", "sampling.temperature=-1"], ["temperature"]),
    ],
)
def test_a_wrong_argument_is_one_line(ipo: Ipo, arguments: list[str], says: list[str]) -> None:
    one_line(ipo("reproduce", *arguments), *says)
    one_line(ipo("cost", *arguments), *says)


def test_cost_follows_settings_and_notebook_parameters(ipo: Ipo) -> None:
    """It loads no model and knows what a parameter changes."""

    def tokens(*arguments: str) -> int:
        code, output, _ = ipo("cost", *arguments)
        assert code == 0
        return int(re.search(r"about ([\d,]+) generated tokens", output)[1].replace(",", ""))  # type: ignore[index]

    plain = tokens("tiny")
    assert (
        tokens("tiny", "-p", "draws=32")
        > plain
        > tokens("tiny", "-p", "notebooks=[00_quickstart]")
        > 0
    )
    assert tokens("tiny", "-p", "evaluation.draws=8") > 1.05 * plain
    assert tokens() == tokens("sandbox")  # the default profile
    assert "committed figures" in ipo("cost", "tiny")[1]
    assert "committed figures" not in ipo("cost", "tiny", "-p", "draws=32")[1]


def test_the_same_from_a_shell(tmp_path: Path) -> None:
    one_line(shell("reproduce", "tinny"), "'tinny' is unknown", "tiny")
    one_line(shell("reproduce", "tiny", "-p", "csr.draws=many"), "'csr.draws'", "int", "'many'")
    package = tmp_path / "site" / "ipo_lib"
    shutil.copytree(
        REPOSITORY / "ipo_lib", package, ignore=shutil.ignore_patterns("__pycache__", "tiny*")
    )
    for command in ("reproduce", "profiles"):
        answer = shell(command, path=package.parent, cwd=tmp_path)
        one_line(answer, "checkout", "pip install -e .")


def test_from_a_kernel_it_is_one_line_too(tmp_path: Path) -> None:
    answer = shell(
        "reproduce",
        "tiny",
        *QUICK,
        "-p",
        "prompts.train_harmful={count: 2, file: /no/such.jsonl}",
        "--store",
        str(tmp_path / "store"),
        "--figures",
        str(tmp_path / "figures"),
    )
    one_line(answer, "00_quickstart", "/no/such.jsonl", "missing")


def test_help_and_profiles_load_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "matplotlib", "papermill", "pandas"}
    code = (
        "import sys; from ipo_lib.cli.app import main\ntry: main()\nexcept SystemExit: pass\n"
        f"print({heavy} & set(sys.modules), file=sys.stderr)"
    )
    for command, says in ("--help", "reproduce"), ("profiles", "sandbox world"):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, "-c", code, command],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert says in done.stdout
        assert done.stderr == "set()\n"


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("{count: 2, file: /no/such.jsonl}", ["/no/such.jsonl", "missing"]),
        ("{count: 2, file: EMPTY}", ["empty"]),
        ("{count: 2, file: BROKEN}", ["line 2", "JSON"]),
        ("{count: 0, file: EMPTY}", ["count 0"]),
        ("{count: 2, hub: org/name}", ["revision"]),
        ("{count: 2, function: nowhere}", ["module:name"]),
    ],
)
def test_a_bad_prompt_set_is_one_line(
    tmp_path: Path, ipo: Ipo, prompts: str, says: list[str]
) -> None:
    for name, content in (("EMPTY", ""), ("BROKEN", '{"prompt": "a"}\n{"prom')):
        (tmp_path / f"{name}.jsonl").write_text(content)
        prompts = prompts.replace(name, str(tmp_path / f"{name}.jsonl"))
    one_line(ipo("reproduce", "tiny", *QUICK, "-p", f"prompts.train_harmful={prompts}"), *says)


def test_an_unknown_prompt_set_is_one_line(ipo: Ipo) -> None:
    one_line(
        ipo("reproduce", "tiny", *QUICK, "-p", "prompt_set=nobody"), "'nobody'", "train_harmful"
    )


def test_a_store_of_another_version_is_one_line(tmp_path: Path, ipo: Ipo) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text('{"version": 99}\n')
    one_line(ipo("reproduce", "tiny", *QUICK), str(tmp_path / "store"), "99", "IPO_STORE")


def test_a_file_in_place_of_the_store_is_one_line(tmp_path: Path, ipo: Ipo) -> None:
    (tmp_path / "store").write_text("")
    one_line(ipo("reproduce", "tiny", *QUICK), str(tmp_path / "store"), "IPO_STORE")


def drawn(store: Path) -> Path:
    """The records of a few real draws of profile tiny, as the quickstart asks for them."""
    run = open_run("tiny", {"prompts.train_harmful.count": 2}, str(store))
    starts = [stages.Prefix(prompt) for prompt in run.prompts("train_harmful")]
    stages.sample(run.session, starts, run.thinking, 2)
    (path,) = store.rglob("records.jsonl")
    return path


def test_a_corrupted_record_is_named_with_its_line(tmp_path: Path, ipo: Ipo) -> None:
    path = drawn(tmp_path / "store")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"draw":', b'"draw": '), lines[3]]))
    one_line(ipo("reproduce", "tiny", *QUICK), str(path), "line 3", "corrupted", "delete this line")


def test_a_full_disk_is_one_line(tmp_path: Path, ipo: Ipo, monkeypatch: pytest.MonkeyPatch) -> None:
    path = drawn(tmp_path / "store")
    content = path.read_bytes()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        answer = ipo("reproduce", "tiny", *QUICK, "-p", "draws=3")
    one_line(answer, "No space left", "free space and run again")
    assert path.read_bytes() == content
    assert (
        len(
            Store(tmp_path / "store").ledger(
                "rollouts", 1, json.loads((path.parent / "spec.json").read_text())["spec"]
            )
        )
        == 4
    )


def test_a_model_without_a_chat_template_is_one_line(tmp_path: Path, ipo: Ipo) -> None:
    folder = tiny_tokenizer(tmp_path / "model", template=None)
    answer = ipo(
        "reproduce", "tiny", *QUICK, "-p", "model.find=null", "-p", f"model.folder={folder}"
    )
    one_line(answer, str(folder), "no chat template")


def test_a_missing_model_is_one_line(ipo: Ipo) -> None:
    answer = ipo(
        "reproduce", "tiny", *QUICK, "-p", "model.find=null", "-p", "model.folder=/no/such/model"
    )
    one_line(answer, "/no/such/model", "model.folder")


def test_a_prompt_longer_than_the_context_is_one_line(tmp_path: Path, ipo: Ipo) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "How long is this? " * 2000}) + "\n")
    answer = ipo(
        "reproduce",
        "tiny",
        *QUICK,
        "-p",
        f"prompts.train_harmful={{count: 1, file: {tmp_path / 'long.jsonl'}}}",
    )
    one_line(answer, "tokens", "context")


def test_outside_a_checkout_is_one_line(
    tmp_path: Path, ipo: Ipo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        reading, "__file__", str(tmp_path / "site" / "ipo_lib" / "profiles" / "reading.py")
    )
    monkeypatch.chdir(tmp_path)
    for command in ("reproduce", "profiles"):
        one_line(ipo(command), "checkout", "pip install -e .")


# what is up to date


PARAMETERS = (
    "profile: str = ''\noverrides: dict = {}\nstore: str = ''\nfigures: str = ''\ndraws: int = 2\n"
)
WORK = """
from pathlib import Path
from ipo_lib.profiles.reading import read_profile
assert read_profile(profile, overrides).csr.draws < 99, "too many"
Path(figures).mkdir(exist_ok=True)
claim = '{"claim": "draws %d <b>", "origin": "emergent", "n": 3, "method": "wilson"}' % draws
(Path(figures) / "ab-figure.json").write_text('{"tokens": 1234, "claims": [%s]}' % claim)
(Path(figures) / "ab-figure.png").write_bytes(b"image")
with (Path(figures) / "log").open("a") as log: log.write("x")
"""


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """The arguments for a profile with one small notebook, which writes a figure and into a log."""
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(WORK)]
    book.cells[0].metadata["tags"] = ["parameters"]
    book.metadata["kernelspec"] = {
        "name": "python3",
        "language": "python",
        "display_name": "Python 3",
    }
    nbformat.write(book, tmp_path / "ab_small.ipynb")
    settings = {
        "about": "A profile of the tests.",
        "model": {},
        "prompts": {},
        "judge": {"use": "a:b"},
        "notebooks": [str(tmp_path / "ab_small")],
    }
    (tmp_path / "small.yml").write_text(yaml.safe_dump(settings))
    return ["reproduce", str(tmp_path / "small.yml")]


def test_only_what_changed_is_run_again(tmp_path: Path, ipo: Ipo, small: list[str]) -> None:
    figure, log, book = (
        tmp_path / "figures" / "ab-figure.json",
        tmp_path / "figures" / "log",
        tmp_path / "ab_small.ipynb",
    )

    def runs(*more: str) -> int:
        before = len(log.read_text()) if log.exists() else 0
        code, output, errors = ipo(*small, *more)
        assert (code, errors) == (0, "")
        done = len(log.read_text()) - before
        assert ("up to date" in output) is (done == 0)
        assert ("draws " in output) is (done == 1)
        return done

    assert [runs(), runs(), runs()] == [1, 0, 0]
    assert [runs("-p", "draws=3"), runs("-p", "draws=3"), runs()] == [1, 0, 1]
    assert [runs("-p", "csr.draws=3"), runs("-p", "csr.draws=3"), runs()] == [1, 0, 1]
    assert [runs("--again"), runs()] == [1, 0]
    figure.unlink()
    assert [runs(), runs()] == [1, 0]
    figure.write_text('{"claims": []}')
    assert [runs(), runs()] == [1, 0]
    changed = nbformat.read(book, 4)
    changed.cells[1].source += "\n# changed"
    nbformat.write(changed, book)
    assert [runs(), runs()] == [1, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_one_line_and_leaves_no_kernel(
    tmp_path: Path, small: list[str], number: signal.Signals
) -> None:
    book = nbformat.read(tmp_path / "ab_small.ipynb", 4)
    wait = "Path(figures, 'pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    book.cells[1].source = f"import os, time{WORK}{wait}"
    nbformat.write(book, tmp_path / "ab_small.ipynb")
    (tmp_path / "tmp").mkdir()
    folders = {"--store": tmp_path / "store", "--figures": tmp_path / "figures"}
    arguments = [str(part) for pair in folders.items() for part in pair]
    run = subprocess.Popen(
        [sys.executable, "-m", "ipo_lib.cli", *small, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    pid = tmp_path / "figures" / "pid"
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    kernel = int(pid.read_text())
    run.send_signal(number)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 128 + number
    assert (
        errors.strip()
        == f"ipo: stopped by {number.name}; what is finished is kept, run again to go on"
    )
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
    assert list((tmp_path / "tmp").glob("*.json")) == []  # the kernel's connection file, with a key


def test_what_is_logged_after_a_signal_is_not_printed() -> None:
    code = (
        "import logging, os, signal\n"
        "from ipo_lib.cli.app import main\n"
        "def command():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally: logging.getLogger('asyncio').error('Kernel died')\n"
        "main(command)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    stopped = "ipo: stopped by SIGINT; what is finished is kept, run again to go on"
    assert (run.returncode, run.stderr.strip()) == (128 + signal.SIGINT, stopped)


def test_a_notebook_that_fails_is_not_done(tmp_path: Path, ipo: Ipo, small: list[str]) -> None:
    for _ in range(2):
        code, _, output = ipo(*small, "-p", "csr.draws=100")
        assert code == 1
        assert "ab_small" in output
        assert "too many" in output
        assert "Traceback" not in output
    assert ipo(*small)[0] == 0


def test_the_source_of_a_run_is_the_whole_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "ipo_lib"
    (package / "deep").mkdir(parents=True)
    (package / "a.py").write_text("1")
    (package / "deep" / "weights").write_bytes(b"2")
    monkeypatch.setattr(reproduce, "__file__", str(package / "cli" / "reproduce.py"))
    first = reproduce.source_digest()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_bytes(b"x")
    assert reproduce.source_digest() == first
    (package / "deep" / "weights").write_bytes(b"3")
    assert reproduce.source_digest() != first


def test_a_figure_that_a_run_no_longer_makes_goes_and_a_user_s_file_stays(
    tmp_path: Path, ipo: Ipo, small: list[str]
) -> None:
    figures, book = tmp_path / "figures", tmp_path / "ab_small.ipynb"
    figures.mkdir()
    mine = {"ab-notes.txt", "ab-introduction.tex", "ab-older.png", "cd-other.json"}
    for name in mine:
        (figures / name).write_text("mine")
        os.utime(figures / name, (1, 1))
    ipo(*small)
    made = {"ab-figure.json", "ab-figure.png", "log"}
    assert {path.name for path in figures.iterdir()} == made | mine
    changed = nbformat.read(book, 4)
    changed.cells[1].source = changed.cells[1].source.replace("ab-figure.png", "ab-new.png")
    nbformat.write(changed, book)
    ipo(*small)
    made = {"ab-figure.json", "ab-new.png", "log"}
    assert {path.name for path in figures.iterdir()} == made | mine
    assert all((figures / name).read_text() == "mine" for name in mine)


@pytest.mark.parametrize("content", [b"", b'{"figures":{"ab-', b"\0" * 50, b"[]", b'{"key": 1}'])
def test_a_spoilt_record_of_a_run_is_no_record(
    tmp_path: Path, ipo: Ipo, small: list[str], content: bytes
) -> None:
    ipo(*small)
    (record,) = (tmp_path / "store" / "runs").glob(f"*/*{reproduce.RECORD}")
    record.write_bytes(content)
    asked = ["status", small[1], "--figures", str(tmp_path / "figures")]
    assert re.search(r"ab_small +to run", ipo(*asked)[1])
    code, output, errors = ipo(*small)
    assert (code, errors) == (0, "")
    assert "up to date" not in output
    assert "up to date" in ipo(*small)[1]


def test_the_key_covers_the_null_world_and_the_papers_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        plan = arguments.plan_run("tiny", ["notebooks=[00_quickstart]"], str(tmp_path), "")
        return next(reproduce.plan_jobs(plan)).key

    first, null = key(), reading.read_profile("tiny-null", {"seed": 5})
    monkeypatch.setattr(reproduce, "read_profile", {"tiny-null": null}.get)
    assert key() != first


def test_the_key_covers_committed_full_runs_unless_they_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ``--full`` is the notebooks' own parameter, for those that have it."""
    for name in ("notebooks", "figures"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    monkeypatch.setattr(reproduce, "checkout", lambda: tmp_path)
    monkeypatch.setattr(arguments, "checkout", lambda: tmp_path)
    monkeypatch.setattr(reading, "checkout", lambda: tmp_path)

    def keys(*given: str) -> list[str]:
        names = ["notebooks=[02_rollout_diversity, 08_ablations]", *given]
        plan = arguments.plan_run("tiny", names, str(tmp_path / "store"), str(tmp_path / "out"))
        return [job.key for job in reproduce.plan_jobs(plan)]

    plain, full = keys(), keys("full=true")
    assert plain != full
    (tmp_path / "figures" / "tiny" / "full-table1.json").write_text(
        '{"cells": [], "date": "never"}'
    )
    assert keys() != plain
    assert keys("full=true") == full
    asked = list[str]()

    def stop(profile: str, given: list[str], *_: str) -> None:
        asked.extend(given)
        raise BadInput("seen")

    monkeypatch.setattr(app, "plan_run", stop)
    with pytest.raises(BadInput, match="seen"):
        app.reproduce_profile("tiny", parameter=["seed=1"], full=True)
    assert asked == ["seed=1", "full=true"]


# status, report, doctor


def test_status_says_what_is_up_to_date_and_runs_nothing(
    tmp_path: Path, ipo: Ipo, small: list[str]
) -> None:
    asked = ["status", small[1], "--figures", str(tmp_path / "figures")]
    assert re.search(r"ab_small +to run\n", ipo(*asked)[1])
    assert not (tmp_path / "figures").exists()
    ipo(*small)
    code, output, errors = ipo(*asked)
    assert (code, errors) == (0, "")
    assert re.search(r"ab_small +up to date +\d+ s +0 tokens\n", output)
    assert str(tmp_path / "store") in output
    assert "other figures" not in output
    elsewhere = ipo(*asked[:-1], str(tmp_path / "elsewhere"))[1]
    assert re.search(r"ab_small +to run\n", elsewhere)
    assert f"--figures {tmp_path / 'figures'}" in elsewhere
    assert re.search(r"ab_small +to run again", ipo(*asked, "-p", "draws=3")[1])
    (tmp_path / "figures" / "ab-figure.json").write_text("{}")
    assert re.search(r"ab_small +to run again", ipo(*asked)[1])


def test_some_notebooks_can_be_run_alone_by_how_they_begin(
    tmp_path: Path, ipo: Ipo, small: list[str]
) -> None:
    profile = tmp_path / "small.yml"
    settings = yaml.safe_load(profile.read_text())
    book = (tmp_path / "ab_small.ipynb").read_text("utf-8")
    (tmp_path / "aa_first.ipynb").write_text(book.replace("ab-figure", "aa-figure"))
    settings["notebooks"] = [str(tmp_path / "aa_first"), str(tmp_path / "ab_small")]
    profile.write_text(yaml.safe_dump(settings))
    status = ["status", small[1], "--figures", str(tmp_path / "figures")]
    assert ipo(*small, "aa")[0] == 0
    assert re.findall(r"^(\w+) +(up to date|to run)", ipo(*status)[1], re.M) == [
        ("aa_first", "up to date"),
        ("ab_small", "to run"),
    ]
    assert "aa_first: up to date" in ipo(*small)[1]
    assert "ab_small: up to date" in ipo(*small, "ab_small.ipynb")[1]
    one_line(ipo(*small, "zz"), "'zz'", "aa_first", "ab_small")


def test_the_report_holds_every_figure_and_claim(
    tmp_path: Path, ipo: Ipo, small: list[str]
) -> None:
    output = ipo(*small)[1]
    page = Path(re.search(r"report: (.*)", output)[1]).read_text()  # type: ignore[index]
    assert "draws 2 &lt;b&gt;" in page
    assert "data:image/png;base64,aW1hZ2U=" in page
    assert "1,234 tokens" in page
    assert "A profile of the tests." in page
    assert re.findall(r'https?://[^"]*', page) == ["https://arxiv.org/abs/2509.24393"]
    assert '<a href="#ab_small">' in page
    assert '<a href="#ab-figure">' in page
    assert 'id="ab-figure"' in page


def test_the_report_keeps_the_notebooks_that_a_run_did_not_ask_for(
    tmp_path: Path, ipo: Ipo, small: list[str]
) -> None:
    book = (tmp_path / "ab_small.ipynb").read_text("utf-8")
    for name in ("aa_first", "ac_last"):
        (tmp_path / f"{name}.ipynb").write_text(book.replace("ab-figure", f"{name[:2]}-figure"))

    def sections(*names: str) -> tuple[list[str], str]:
        asked = ", ".join(str(tmp_path / name) for name in names)
        page = Path(
            re.search(r"report: (.*)", ipo(*small, "-p", f"notebooks=[{asked}]")[1])[1]
        ).read_text()  # type: ignore[index]
        return re.findall(r'<h2 id="(\w+)">', page), page

    assert sections("ac_last")[0] == ["ac_last"]
    assert sections("ab_small", "aa_first")[0] == ["aa_first", "ab_small", "ac_last"]
    names, page = sections("ab_small")
    assert names == ["aa_first", "ab_small", "ac_last"]
    assert [page.count(f'<img id="{name}-figure"') for name in ("aa", "ab", "ac")] == [1, 1, 1]
    assert page.count("draws 2 &lt;b&gt;") == 3
    (tmp_path / "figures" / "ac-figure.png").unlink()
    assert "The image of ac-figure is missing" in sections("ab_small")[1]


def test_figures_of_the_report_stand_in_the_order_of_their_notebook(tmp_path: Path) -> None:
    names = ["01-fig3-joint", "01-fig2-gap"]  # as notebook 01 saves them
    for name in names:
        (tmp_path / f"{name}.json").touch()
    found = report.in_order("01_reasoning_vs_response", tmp_path)
    assert [path.stem for path in found] == names


def test_bars_that_have_ended_leave_nothing_in_the_notebook(tmp_path: Path) -> None:
    output = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell("x")
    cell.outputs = [
        output("stream", name="stderr", text=" " * 60 + "\r"),
        output("stream", name="stderr", text="a warning"),
        output("stream", name="stdout", text=" "),
    ]
    book = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell("y")])
    nbformat.write(book, tmp_path / "book.ipynb")
    reproduce.drop_spent_bars(tmp_path / "book.ipynb")
    read = nbformat.read(tmp_path / "book.ipynb", as_version=4)
    assert [one.text for one in read.cells[0].outputs] == ["a warning", " "]


def test_only_the_tokens_of_this_run_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = tmp_path / "00.tokens"
    assert reproduce.generated_tokens(counted) == 0
    drawn(tmp_path / "of-another")
    monkeypatch.setenv(progress.GENERATED_FILE, str(counted))
    path = drawn(tmp_path / "store")
    records = [json.loads(line)["record"] for line in path.read_bytes().splitlines()]
    total = sum(len(one["token_ids"]) for one in records)
    assert reproduce.generated_tokens(counted) == total > 0
    drawn(tmp_path / "store")  # nothing is missing
    assert reproduce.generated_tokens(counted) == total
    path.write_bytes(path.read_bytes()[:-20])  # a kill tore the last line, which is drawn again
    drawn(tmp_path / "store")
    assert reproduce.generated_tokens(counted) == total + len(records[-1]["token_ids"])


def test_doctor_finds_a_sound_machine_and_names_each_remedy(
    ipo: Ipo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NEEDED_DISK", 0)
    monkeypatch.setattr(doctor, "NEEDED_MEMORY", 0)
    code, output, _ = ipo("doctor")
    assert code == 0, output
    assert all(
        re.search(rf"^{name} ", output, re.M)
        for name in ("python", "packages", "device", "memory", "store")
    )
    assert "->" not in output
    monkeypatch.setattr(doctor, "NEEDED_DISK", 10**18)
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["torch==1.0.0", "no-such-package==2.0"]
    )
    code, output, errors = ipo("doctor")
    assert code == 2
    assert "pip install torch==1.0.0" in output
    assert re.search(r"no-such-package +missing +-> pip install no-such-package==2.0", output)
    assert re.search(r"store .*-> free some space", output)
    assert errors == "ipo: 3 of 7 checks failed; each line above says what to do\n"


def test_a_profile_parameter_that_no_notebook_has_is_one_line(tmp_path: Path, ipo: Ipo) -> None:
    text = (REPOSITORY / "notebooks" / "profiles" / "tiny.yml").read_text("utf-8")
    path = tmp_path / "odd.yml"
    path.write_text(re.sub(r"parameters: \{.*\}", "parameters: {live_tracks: 8}", text))
    code, _, output = ipo("status", str(path))
    assert code == 2
    assert "no notebook has the parameter 'live_tracks'" in output


PER_NOTEBOOK = {
    "{draws: 4, 00_quickstart: {draws: 8}}": "",
    "{00_quickstart: {drawz: 8}}": "00_quickstart has no parameter 'drawz'; correct it under",
    "{99_nothing: {draws: 8}}": "no notebook is called '99_nothing'; known: 00_quickstart",
    "{00_quickstart: 8}": "00_quickstart holds 8; write its parameters as name: value",
    "{00_quickstart: {draws: many}}": "parameter 'draws': expected int, found 'many'",
}


@pytest.mark.parametrize(("parameters", "fault"), PER_NOTEBOOK.items())
def test_a_notebook_s_own_parameters_are_checked(
    tmp_path: Path, ipo: Ipo, parameters: str, fault: str
) -> None:
    text = (REPOSITORY / "notebooks" / "profiles" / "tiny.yml").read_text("utf-8")
    path = tmp_path / "own.yml"
    path.write_text(re.sub(r"parameters: \{.*\}", f"parameters: {parameters}", text))
    for command in ("status", "cost"):
        if fault:
            one_line(ipo(command, str(path)), fault)
        else:
            assert ipo(command, str(path))[0] == 0


def test_a_notebook_s_own_parameters_win_and_the_command_line_wins_over_them(
    tmp_path: Path,
) -> None:
    text = (REPOSITORY / "notebooks" / "profiles" / "tiny.yml").read_text("utf-8")
    path = tmp_path / "own.yml"
    own = "parameters: {draws: 3, 00_quickstart: {draws: 8}}"
    path.write_text(re.sub(r"parameters: \{.*\}", own, text))

    def draws(*given: str) -> dict[str, int]:
        plan = arguments.plan_run(str(path), list(given), str(tmp_path), "")
        return {
            book.stem: values["draws"] for book, values in plan.values.items() if "draws" in values
        }

    found = draws()
    assert found.pop("00_quickstart") == 8
    assert set(found.values()) == {3}
    assert set(draws("draws=5").values()) == {5}
    assert draws("parameters.00_quickstart.draws=6")["00_quickstart"] == 6
    plan = arguments.plan_run(str(path), [], str(tmp_path), "")
    parameters = plan.parameters()["00_quickstart"]
    assert parameters["draws"] == 8
    assert parameters["candidates"] > 0  # what is not given has the notebook's own value
    assert plan.settings.name == "own"


def test_the_paper_s_model_looks_for_turns_in_the_paper_s_prompts(tmp_path: Path) -> None:
    plan = arguments.plan_run("ds-8b", [], str(tmp_path), "")
    sets = {book.stem: values.get("harmful_set") for book, values in plan.values.items()}
    chosen = [name for name, one in sets.items() if one == "jbb"]
    assert chosen == ["03_safety_triggers", "04_compliance_cues", "05_corrective_intervention"]


class Spends(Engine):
    """Notes which budget file a kernel is given."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_: Any) -> None:
        cls.seen.append(os.environ[budget.BUDGET_FILE])


def test_all_kernels_of_a_run_count_in_one_budget_file(
    tmp_path: Path, ipo: Ipo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(budget.BUDGET_FILE, raising=False)
    papermill_engines.register(None, Spends)
    try:
        books = ["-p", "notebooks=[00_quickstart, 01_reasoning_vs_response]"]
        assert ipo("reproduce", "tiny", *books)[0] == 0
        (folder,) = (tmp_path / "store" / "runs").iterdir()
        assert Spends.seen == [str(folder / "budget.json")] * 2
        assert budget.BUDGET_FILE not in os.environ
        monkeypatch.setenv(budget.BUDGET_FILE, "of-mine.json")  # for several runs together
        assert ipo("reproduce", "tiny", *books, "--again")[0] == 0
        assert set(Spends.seen[2:]) == {"of-mine.json"}
        assert os.environ[budget.BUDGET_FILE] == "of-mine.json"
    finally:
        papermill_engines.register(None, InProcess)


def test_notebooks_are_named_by_how_they_begin_also_those_that_a_profile_leaves_out() -> None:
    assert arguments.choose_notebooks("sandbox", ["04", "05"]) == (
        "notebooks=[04_compliance_cues, 05_corrective_intervention]"
    )
    assert "13_on_policy" not in reading.read_profile("sandbox").notebooks
    assert arguments.choose_notebooks("sandbox", ["06", "13"]) == (
        "notebooks=[06_ipo_training, 13_on_policy]"
    )
    with pytest.raises(BadInput, match="there is no notebook '77'; there are 00_quickstart, "):
        arguments.choose_notebooks("sandbox", ["77"])
