"""The store keeps what was finished, byte for byte: through kills, full disks and many workers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_route import KEYS, run_route

from ipo_lib import store
from ipo_lib.records import BadInput
from ipo_lib.store import Artifact, Ledger, Store, default_root

REPOSITORY = Path(__file__).parents[1]
ROUTE = Path(__file__).with_name("store_route.py")
LARGE, SMALL = 24, 2  # draws of a run
SPEC = {"model": {"name": "toy", "revision": "a1"}, "draws": 4}
Tree = dict[str, bytes | None]


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a process of ``store_route.py``."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(ROUTE), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"


def tree(root: Path) -> Tree:
    """Every file (its bytes) and folder (None) below ``root``."""
    contents: Tree = {}
    for path in sorted(root.rglob("*")):
        contents[str(path.relative_to(root))] = path.read_bytes() if path.is_file() else None
    return contents


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    root = tmp_path_factory.mktemp("undisturbed")
    assert start("run", root, LARGE).wait() == 0
    return tree(root)


def filled(root: Path, count: int = 5) -> Ledger:
    ledger = Store(root).ledger("rollouts", 1, SPEC)
    ledger.append((f"k{n}", {"text": f"record {n}", "n": n}) for n in range(count))
    return ledger


def half_built(artifact: Artifact, error: Exception) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    artifact.make(fill)


def test_a_ledger_reads_back_what_was_appended(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 2)
    assert ledger.append([("k1", {"n": "another"}), ("k2", {"n": 2})]) == 1
    again = Store(tmp_path).ledger("rollouts", 1, SPEC)
    assert list(again.items()) == list(ledger.items())
    assert again.get("k1") == {"text": "record 1", "n": 1}
    assert again.get("k9") is None
    assert "k2" in again
    assert again.missing(["k3", "k0", "k3", "k4"]) == ["k3", "k4"]
    assert json.loads((ledger.folder / "spec.json").read_text()) == {
        "stage": "rollouts",
        "version": 1,
        "spec": SPEC,
    }
    lines = (ledger.folder / "records.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"crc", "key", "record"}] * 3


def test_a_worker_sees_what_another_has_appended(tmp_path: Path) -> None:
    mine = filled(tmp_path, 1)
    filled(tmp_path, 3)
    assert mine.missing(["k0", "k1", "k2", "k3"]) == ["k3"]


def test_other_specs_versions_and_stages_live_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ledgers = [
        store.ledger("rollouts", 1, SPEC),
        store.ledger("rollouts", 2, SPEC),
        store.ledger("verdicts", 1, SPEC),
        store.ledger("rollouts", 1, {**SPEC, "draws": 5}),
    ]
    assert len({ledger.folder for ledger in ledgers}) == 4
    assert store.ledger("rollouts", 1, dict(reversed(SPEC.items()))).folder == ledgers[0].folder


def test_looking_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = Store(root)
    ledger, artifact = store.ledger("rollouts", 1, SPEC), store.artifact("adapter", 1, SPEC)
    assert ledger.missing(["a"]) == ["a"]
    assert not list(ledger.items())
    assert not artifact.done
    assert artifact.path.parent == artifact.folder
    assert not root.exists()
    path = filled(root).folder / "records.jsonl"
    path.write_bytes(path.read_bytes() + b'{"crc":"torn')
    before = tree(root)
    assert len(Store(root).ledger("rollouts", 1, SPEC)) == 5
    assert tree(root) == before


def test_done_counts_hashes_and_goes_when_extended(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    done, records = ledger.folder / "done.json", ledger.folder / "records.jsonl"
    assert not done.exists()
    ledger.finish()
    assert json.loads(done.read_text()) == {
        "records": 5,
        "sha256": hashlib.sha256(records.read_bytes()).hexdigest(),
    }
    before = tree(tmp_path)
    assert ledger.append({"k0": {}}) == 0
    assert ledger.append({}) == 0
    ledger.finish()
    assert tree(tmp_path) == before
    ledger.append({"k5": {}})
    assert not done.exists()


def test_an_empty_ledger_can_be_finished(tmp_path: Path) -> None:
    ledger = Store(tmp_path).ledger("rollouts", 1, SPEC)
    ledger.finish()
    assert json.loads((ledger.folder / "done.json").read_text())["records"] == 0


def test_a_torn_last_line_is_dropped_at_every_byte(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    path = ledger.folder / "records.jsonl"
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        torn = Store(tmp_path).ledger("rollouts", 1, SPEC)
        assert list(torn) == ["k0", "k1", "k2", "k3"]
        assert path.read_bytes() == whole[:end]
        assert torn.append({"k0": {}}) == 0
        assert path.read_bytes() == whole[:last]
        assert torn.append({"k4": {"text": "record 4", "n": 4}}) == 1
        assert path.read_bytes() == whole


def test_every_flipped_byte_in_the_middle_is_named_by_its_line(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    path = ledger.folder / "records.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    first = len(lines[0]) + len(lines[1])
    for position in range(first, first + len(lines[2]) - 1):
        flipped = bytes([whole[position] ^ 1])
        path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        with pytest.raises(BadInput, match=r"line 3: corrupted.*delete this line") as error:
            Store(tmp_path).ledger("rollouts", 1, SPEC)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    repaired = Store(tmp_path).ledger("rollouts", 1, SPEC)
    assert repaired.missing([f"k{n}" for n in range(5)]) == ["k2"]
    path.write_bytes(whole + lines[1])
    with pytest.raises(BadInput, match=r"line 6: corrupted or repeated"):
        Store(tmp_path).ledger("rollouts", 1, SPEC)


def test_corruption_is_refused_before_anything_is_appended(tmp_path: Path) -> None:
    ledger = Store(tmp_path).ledger("rollouts", 1, SPEC)
    path = filled(tmp_path).folder / "records.jsonl"
    path.write_bytes(path.read_bytes().replace(b"record 2", b"record X"))
    before = path.read_bytes()
    with pytest.raises(BadInput, match="line 3"):
        ledger.append({"new": {}})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ['{"version": 2}\n', "{}", "not json"])
def test_a_store_of_another_version_is_refused(tmp_path: Path, content: str) -> None:
    filled(tmp_path)
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(BadInput, match="IPO_STORE"):
        Store(tmp_path)


def test_default_root_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPO_STORE", str(tmp_path / "here"))
    assert default_root() == Store().root == tmp_path / "here"
    monkeypatch.delenv("IPO_STORE")
    assert default_root() == Path.home() / ".cache/ipo_lib"


@pytest.mark.parametrize("fits", [0, 1, 70, 150, 1000])
def test_a_full_disk_is_one_line_and_keeps_whole_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    ledger = filled(tmp_path, 3)
    whole = (ledger.folder / "records.jsonl").read_bytes()
    room, write = fits, os.write

    def filling(file: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(file, data[:room])
        room -= written
        return written

    batch = {f"new{n}": {"text": "x" * 40} for n in range(30)}
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", filling)
        with pytest.raises(BadInput, match=r"No space left.*free space and run again") as error:
            ledger.append(batch)
    assert "\n" not in str(error.value)
    kept = Store(tmp_path).ledger("rollouts", 1, SPEC)
    assert list(kept)[:3] == ["k0", "k1", "k2"]
    assert len(kept) < 33
    assert all(kept[key] == batch[key] for key in list(kept)[3:])
    for opened in (ledger, kept):  # the process that met the full disk may go on, too
        opened.append(batch)
        assert list(opened) == ["k0", "k1", "k2", *batch]
    assert (ledger.folder / "records.jsonl").read_bytes().startswith(whole)


def test_a_full_disk_while_building_is_one_line(tmp_path: Path) -> None:
    artifact = Store(tmp_path).artifact("adapter", 1, SPEC)
    with pytest.raises(BadInput, match="free space"):
        half_built(artifact, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert not artifact.done
    assert not artifact.path.exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_an_unwritable_store_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refusing(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(BadInput, match="writable folder with \\$IPO_STORE"):
        filled(tmp_path / "new")


def test_a_new_store_is_private_and_an_old_one_stays_as_it_is(tmp_path: Path) -> None:
    filled(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir(mode=0o770)
    before = (tmp_path / "shared").stat().st_mode
    filled(tmp_path / "shared")
    assert (tmp_path / "shared").stat().st_mode == before


def test_a_file_in_place_of_the_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="IPO_STORE"):
        filled(tmp_path / "file")


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        half_built(Store(tmp_path).artifact("adapter", 1, SPEC), FileNotFoundError(2, "no model"))


@pytest.mark.parametrize("record", [{"p": float("nan")}, {"p": {1, 2}}])
def test_what_is_not_json_leaves_the_ledger_as_it_was(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    ledger = filled(tmp_path)
    before = tree(tmp_path)
    with pytest.raises((ValueError, TypeError)):
        ledger.append([("good", {}), ("bad", record)])
    assert tree(tmp_path) == before


def test_an_artifact_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    artifact = Store(tmp_path).artifact("adapter", 1, SPEC)
    with pytest.raises(RuntimeError):
        half_built(artifact, RuntimeError())
    assert not artifact.done
    assert not artifact.path.exists()
    folders = []

    def fill(folder: Path) -> None:
        folders.append(folder)
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_text("whole")
        assert not artifact.done
        assert not artifact.path.exists()
        assert folder.parent == artifact.path.parent

    assert artifact.make(fill) == artifact.path
    assert artifact.done
    assert [path.name for path in artifact.path.iterdir()] == ["deep"]
    assert not folders[0].exists()
    assert json.loads((artifact.folder / "done.json").read_text()) == {"bytes": {"deep/weights": 5}}
    artifact.make(fill)
    assert len(folders) == 1  # it is made once


@pytest.mark.parametrize("fault", ["half a file", "no file", "half a mark", "empty mark"])
def test_an_artifact_with_half_a_file_is_made_again(tmp_path: Path, fault: str) -> None:
    artifact = Store(tmp_path).artifact("adapter", 1, SPEC)

    def fill(folder: Path) -> None:
        (folder / "weights").write_text("whole")

    artifact.make(fill)
    weights, mark = artifact.path / "weights", artifact.folder / "done.json"
    if fault == "half a file":
        weights.write_text("who")
    elif fault == "no file":
        weights.unlink()
    else:
        mark.write_bytes(mark.read_bytes()[:9] if fault == "half a mark" else b"")
    assert not artifact.done
    assert (artifact.make(fill) / "weights").read_text() == "whole"
    assert artifact.done


def test_a_second_process_waits_and_takes_what_the_first_has_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, begun = [], threading.Event()

    def fill(folder: Path) -> None:
        made.append(folder)
        begun.set()
        time.sleep(0.5)
        (folder / "mine").write_text("mine")

    def make() -> Path:
        return Store(tmp_path).artifact("adapter", 1, SPEC).make(fill)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(make)
        begun.wait()
        assert make() == first.result()
    assert len(made) == 1
    assert "another process makes it; waiting" in capsys.readouterr().err


def looped(root: Path) -> None:
    (root / "rollouts").symlink_to(root / "rollouts")


def folder_for_file(root: Path) -> None:
    (Store(root).ledger("rollouts", 1, SPEC).folder / "records.jsonl").mkdir(parents=True)


@pytest.mark.parametrize("prepare", [looped, folder_for_file])
def test_odd_file_systems_are_one_line(tmp_path: Path, prepare: Any) -> None:
    prepare(tmp_path)
    with pytest.raises(BadInput, match="IPO_STORE") as caught:
        filled(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="shorter path"):
        filled(tmp_path / ("x" * 300))


def test_a_limit_of_file_sizes_is_one_line_and_keeps_whole_records(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    filled(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(BadInput, match="ulimit -f"):
            filled(tmp_path, 500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(filled(tmp_path)) > 5  # those that fitted are whole


def test_several_workers_write_each_key_once(tmp_path: Path) -> None:
    workers = [start("append", tmp_path, worker) for worker in range(3)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    # A reader beside them never sees a half line.
    while any(worker.poll() is None for worker in workers):
        ledger = Store(tmp_path).ledger("rollouts", 1, {})
        assert all(record["key"] == key for key, record in ledger.items())
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    ledger = Store(tmp_path).ledger("rollouts", 1, {})
    assert sorted(ledger) == sorted(KEYS)
    assert len((ledger.folder / "records.jsonl").read_bytes().splitlines()) == 300
    assert json.loads((ledger.folder / "done.json").read_text())["records"] == 300


def test_a_rerun_changes_nothing(tmp_path: Path, undisturbed: Tree) -> None:
    for _ in range(2):
        assert start("run", tmp_path, LARGE).wait() == 0
        assert tree(tmp_path) == undisturbed


def test_killed_at_random_the_rerun_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Tree
) -> None:
    clock = random.Random(0)
    process = start("run", tmp_path / "timed", LARGE)
    wait_until_ready(process)
    ready = time.monotonic()
    process.wait()
    length = time.monotonic() - ready
    killed = 0
    for number in range(20):
        root = tmp_path / str(number)
        process = start("run", root, LARGE)
        wait_until_ready(process)
        time.sleep(clock.uniform(0, length))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for name, content in tree(root).items():  # finished records stay as they are
            if name.endswith("records.jsonl") and content:
                whole = content[: content.rindex(b"\n") + 1] if b"\n" in content else b""
                assert (undisturbed[name] or b"").startswith(whole)
        run_route(root, LARGE)
        assert tree(root) == undisturbed
    assert killed >= 5  # the others had ended by then


def test_killed_at_every_change_of_the_disk_the_rerun_ends_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    process = start("run", tmp_path / "counted", SMALL, 0)
    output, _ = process.communicate()
    assert process.returncode == 0
    undisturbed = tree(tmp_path / "counted")
    changes = int(output.split()[-1])
    assert changes > 50
    for crash_at in range(1, changes + 1):
        root = tmp_path / str(crash_at)
        assert start("run", root, SMALL, crash_at).wait() == -signal.SIGKILL
        run_route(root, SMALL)
        assert tree(root) == undisturbed, crash_at


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
keys = st.text(st.characters(), min_size=0) | st.sampled_from(
    ["\n", "\r\n", "\u2028", "\x00", "\ud800", '"}', "a/b", "é"]
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(keys, st.dictionaries(st.text(), json_values, max_size=4), max_size=5))
def test_any_json_record_round_trips(records: dict[str, dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert Store(folder).ledger("any", 1, {}).append(records) == len(records)
        for kept in (store.IN_MEMORY, 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(store, "IN_MEMORY", kept)
                again = Store(folder).ledger("any", 1, {})
                assert list(again.items()) == list(records.items())
                assert again.append(records) == 0


def test_the_store_loads_nothing_heavy() -> None:
    code = "import sys, ipo_lib.store; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert output == "set()\n"


def test_a_ledger_is_read_once_and_sees_what_others_write(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ledger = store.ledger("s", 1, {"a": 1})
    ledger.append({"x": {"n": 1}})
    Store(tmp_path).ledger("s", 1, {"a": 1}).append({"y": {"n": 2}})
    again = store.ledger("s", 1, {"a": 1})
    assert again is ledger
    assert set(again) == {"x", "y"}
    again.finish()
    done = json.loads((again.folder / "done.json").read_text())
    assert done == {
        "records": 2,
        "sha256": hashlib.sha256((again.folder / "records.jsonl").read_bytes()).hexdigest(),
    }


@pytest.fixture
def two_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "IN_MEMORY", 2)


def test_records_that_stay_on_disk_are_read_like_others(
    tmp_path: Path, two_in_memory: None
) -> None:
    writer = filled(tmp_path, 5)
    records = {f"k{n}": {"text": f"record {n}", "n": n} for n in range(5)}
    reader = Store(tmp_path).ledger("rollouts", 1, SPEC)
    for ledger in (writer, reader):
        assert dict(ledger) == records
        assert list(ledger) == list(records)
        assert len(ledger) == 5
        assert "k4" in ledger
        assert ledger.missing(["k4", "k9", "k0"]) == ["k9"]
        with pytest.raises(KeyError):
            ledger["k9"]
    assert writer.append({"k4": {}, 'odd "\\ key\ud800\n': {"n": 5}}) == 1
    assert reader.missing(['odd "\\ key\ud800\n']) == []
    assert reader['odd "\\ key\ud800\n'] == {"n": 5}


def test_a_record_on_disk_that_somebody_changed_is_one_line(
    tmp_path: Path, two_in_memory: None
) -> None:
    ledger = filled(tmp_path, 5)
    path = ledger.folder / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for changed in (lines[3].replace(b"record 3", b"record 4"), lines[4]):
        path.write_bytes(b"".join([*lines[:3], changed, lines[4]]))
        with pytest.raises(BadInput, match=r"records\.jsonl was changed by somebody else"):
            ledger["k3"]
    assert ledger["k4"]["n"] == 4


def test_memory_does_not_grow_with_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000 more records of 4 kB, as of a trace, take less than a tenth of their bytes."""
    monkeypatch.setattr(store, "IN_MEMORY", 500)
    trace = {"token_ids": list(range(800))}
    held = []
    for count in (1000, 5000):
        ledger = Store(tmp_path / str(count)).ledger("rollouts", 1, SPEC)
        ledger.append((f"{n:016x}", trace) for n in range(count))
        tracemalloc.start()
        again = Store(tmp_path / str(count)).ledger("rollouts", 1, SPEC)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert again[f"{count - 1:016x}"] == trace
    grown = (tmp_path / "5000").rglob("records.jsonl")
    size = next(grown).stat().st_size * 4 / 5
    assert held[1] - held[0] < size / 10


def test_a_temporary_file_of_a_killed_process_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    begin = f".a.json.{platform.node()}"
    names = [f"{begin}.{dead.pid}.tmp", f"{begin}.{os.getppid()}.tmp", f"{begin}.mine.tmp"]
    names += [
        f".a.json.another-machine.{dead.pid}.tmp",
        f".b.json.{platform.node()}.{dead.pid}.tmp",
    ]
    for name in names:
        (tmp_path / name).write_text("half")
    store.write_whole(tmp_path / "a.json", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *names[1:]}
    assert (tmp_path / "a.json").read_text() == "whole"
