"""The run store: content-addressed, append-only, resumable, readable by eye.

``<root>/<stage>/<digest of the spec>/`` holds

1. ``spec.json``: what decides the content (settings, hashes of models, versions);
2. ``records.jsonl``, a *ledger* of records by key, or ``files/``, an *artifact* such as an adapter;
3. ``done.json``, once it is complete.

The bytes do not depend on when or by how many processes they were written. A kill at any instant
costs unfinished work only; locks (``flock``) end with their process.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import platform
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from ipo_lib.records import BadInput, canonical, digest

Json = dict[str, Any]

STORE = b'{"version": 1}\n'  # content of store.json; raise the number when the layout changes
# A line of records.jsonl: canonical JSON that begins with the CRC-32 of what follows it.
LINE = b'{"crc":"%08x",%b\n'
KEY = re.compile(rb'"key":("(?:[^"\\]|\\.)*")')  # how the rest of a line begins
IN_MEMORY = 50_000  # records of a ledger, some 5 kB each

ELSEWHERE = "choose a writable folder with $IPO_STORE"
FREE = "free space and run again, finished records are kept"
OTHER_DISK = "the disk fails or is gone; check it, or choose another with $IPO_STORE"
RAISE = "raise the limit of open files with ulimit -n"
HINTS = {  # remedies by error number
    errno.EACCES: ELSEWHERE,
    errno.EPERM: ELSEWHERE,
    errno.EROFS: ELSEWHERE,
    errno.EEXIST: ELSEWHERE,
    errno.ENOTDIR: ELSEWHERE,
    errno.EISDIR: "a folder stands in a file's place; remove it, or " + ELSEWHERE,
    errno.ELOOP: "a link leads to itself; remove it, or " + ELSEWHERE,
    errno.ENAMETOOLONG: "choose a shorter path with $IPO_STORE",
    errno.ENOSPC: FREE,
    errno.EDQUOT: FREE,
    errno.EFBIG: "raise the limit of file sizes with ulimit -f, finished records are kept",
    errno.EIO: OTHER_DISK,
    errno.ESTALE: OTHER_DISK,
    errno.ENODEV: OTHER_DISK,
    errno.ENOLCK: "this disk has no file locks; choose a local one with $IPO_STORE",
    errno.EOPNOTSUPP: "this disk has no file locks; choose a local one with $IPO_STORE",
    errno.EMFILE: RAISE,
    errno.ENFILE: RAISE,
}


def default_root() -> Path:
    """``$IPO_STORE``, else ``~/.cache/ipo_lib``."""
    return Path(os.environ.get("IPO_STORE") or "~/.cache/ipo_lib").expanduser()


class Store:
    """Ledgers and artifacts by stage, version and spec. To look at them writes nothing."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = default_root() if root is None else Path(root).expanduser()
        self._ledgers: dict[Path, Ledger] = {}  # each is parsed once
        content = b""
        with _explained(self.root), suppress(FileNotFoundError, NotADirectoryError):
            content = (self.root / "store.json").read_bytes()
        if not STORE.startswith(content):
            raise BadInput(
                f"store: {self.root} says {content!r:.60}, this is {STORE!r}; {ELSEWHERE}"
            )

    def ledger(self, stage: str, version: int, spec: Json) -> Ledger:
        """The records of ``spec``; raise ``version`` when the meaning of the stage changes."""
        ledger = Ledger(self.root / stage, {"stage": stage, "version": version, "spec": spec})
        ledger = self._ledgers.setdefault(ledger.folder, ledger)
        ledger.read()
        return ledger

    def artifact(self, stage: str, version: int, spec: Json) -> Artifact:
        """The files (an adapter, a merged model) of ``spec``."""
        return Artifact(self.root / stage, {"stage": stage, "version": version, "spec": spec})


class Ledger(Mapping[str, Json]):
    """The records of a spec by key, as last read from disk.

    Only ``append`` adds to them, and never a key that is there. The first ``IN_MEMORY`` records are
    kept in memory. Of the others it knows where they lie in the file, and reads them when asked.
    """

    def __init__(self, parent: Path, spec: Json) -> None:
        self.folder = parent / digest(spec)
        self.spec = spec
        self._forget()

    def __len__(self) -> int:
        return len(self._records) + len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._records or key in self._places

    def __iter__(self) -> Iterator[str]:
        yield from self._records
        yield from self._places

    def __getitem__(self, key: str) -> Json:
        if key not in self._places:
            return self._records[key]
        with _explained(self.folder), (self.folder / "records.jsonl").open("rb") as file:
            file.seek(self._places[key])
            content = _content(file.readline())
        entry = json.loads(b"{" + content) if content else {}
        if entry.get("key") != key:
            raise BadInput(f"store: {file.name} was changed by somebody else; run again")
        record: Json = entry["record"]
        return record

    def _forget(self) -> None:
        self._records: dict[str, Json] = {}
        self._places: dict[str, int] = {}  # where the line of a key begins, in bytes
        self._bytes_read = 0
        self._hash = sha256()  # of the bytes read

    def read(self) -> None:
        """Read what is new on disk; all of it where somebody has cleared the folder."""
        path = self.folder / "records.jsonl"
        if self._bytes_read and (not path.exists() or path.stat().st_size < self._bytes_read):
            self._forget()
        self._read_new()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that no process has written yet, each once, in their order."""
        self._read_new()
        return [key for key in dict.fromkeys(keys) if key not in self]

    def append(self, records: Mapping[str, Json] | Iterable[tuple[str, Json]]) -> int:
        """Write one batch to disk (one fsync); return how many of its records were new."""
        texts = {}
        for key, record in dict(records).items():
            texts[key] = canonical({"key": key, "record": record})[1:]
        with _locked(self.folder, self.spec, "records.jsonl") as file:
            self._read_new(file)
            lines = []
            for key, text in texts.items():
                if key not in self:
                    content = text.encode(errors="surrogatepass")
                    lines.append(LINE % (zlib.crc32(content), content))
            data = b"".join(lines)
            if data:
                (self.folder / "done.json").unlink(missing_ok=True)
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
            self._read_new(file)
        return len(lines)

    def collect(self, records: Iterable[tuple[str, Json]], every: int) -> None:
        """Append records as they come, ``every`` at a time, and finish.

        Those that came before a failure are kept.
        """
        batch: dict[str, Json] = {}
        try:
            for key, record in records:
                batch[key] = record
                if len(batch) == every:
                    self.append(batch)
                    batch = {}
        finally:
            if batch:
                self.append(batch)
        self.finish()

    def finish(self) -> None:
        """Write ``done.json``, unless it is there: number of records, SHA-256 of their file.

        A new record removes it.
        """
        done = self.folder / "done.json"
        if done.exists():
            return
        with _locked(self.folder, self.spec, "records.jsonl") as file:
            self._read_new(file)
            _publish(done, {"records": len(self), "sha256": self._hash.hexdigest()})

    def _read_new(self, locked_file: int | None = None) -> None:
        """Read on from where the last call ended, under a lock.

        A last line without its newline was torn by a kill or a full disk: whoever writes
        (``locked_file``) cuts it off, others leave it.
        """
        with (
            _explained(self.folder),
            suppress(FileNotFoundError, NotADirectoryError),
            (self.folder / "records.jsonl").open("rb") as file,
        ):
            if locked_file is None:
                fcntl.flock(file, fcntl.LOCK_SH)
            file.seek(self._bytes_read)
            for line in file:
                if not line.endswith(b"\n"):
                    if locked_file is not None:
                        os.ftruncate(locked_file, self._bytes_read)
                    return
                self._take_line(line, file.name)

    def _take_line(self, line: bytes, path: str) -> None:
        """Add the record of a line; BadInput: its bytes have changed, or its key was there."""
        content = _content(line)
        found = KEY.match(content)
        key = json.loads(found[1]) if found else None
        if key is None or key in self:
            raise BadInput(
                f"store: {path}, line {len(self) + 1}: corrupted or repeated record; "
                "delete this line and run again, only its record is computed anew"
            )
        if len(self._records) < IN_MEMORY:
            self._records[key] = json.loads(b"{" + content)["record"]
        else:
            self._places[key] = self._bytes_read
        self._bytes_read += len(line)
        self._hash.update(line)


def _content(line: bytes) -> bytes:
    """What follows the checksum of a line; nothing if the line is not as it was written."""
    content = line.partition(b",")[2][:-1]
    return content if line == LINE % (zlib.crc32(content), content) else b""


class Artifact:
    """A folder of files, ``path``, that is there as a whole (``done``) or not at all."""

    def __init__(self, parent: Path, spec: Json) -> None:
        self.folder = parent / digest(spec)
        self.path = self.folder / "files"
        self.building = self.folder / "building"  # the files, while they are made
        self.spec = spec

    @property
    def done(self) -> bool:
        """Whether it is complete, with every file as large as it was when it was made."""
        try:
            sizes = json.loads((self.folder / "done.json").read_bytes())["bytes"]
            return all((self.path / name).stat().st_size == sizes[name] for name in sizes)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def make(self, fill: Callable[[Path], Any], goes_on: bool = False) -> Path:
        """``path``, made by ``fill`` if it is not there as a whole.

        ``fill`` gets a folder, which is renamed to ``path`` when it is full. While another process
        fills it, this one waits and takes what it made.

        Args:
            fill: writes the files into the folder that it is given.
            goes_on: whether ``fill`` finds in its folder what a killed process has left there;
                else that is removed before.
        """
        if self.done:
            return self.path
        building = self.building
        with _locked(self.folder, self.spec, "lock", f"{self.folder}: another process makes it"):
            if self.done:
                return self.path
            for rest in (self.path,) if goes_on else (building, self.path):
                shutil.rmtree(rest, ignore_errors=True)
            (self.folder / "done.json").unlink(missing_ok=True)
            building.mkdir(exist_ok=True)
            fill(building)
            sizes = {}
            for file in building.rglob("*"):
                if file.is_file():
                    sizes[str(file.relative_to(building))] = file.stat().st_size
            os.replace(building, self.path)
            _publish(self.folder / "done.json", {"bytes": sizes})
        return self.path


@contextmanager
def _locked(folder: Path, spec: Json, name: str, notice: str = "") -> Iterator[int]:
    """The file ``name`` of a folder, locked, and created if need be; its descriptor.

    ``notice`` is said once where another process holds the lock.
    """
    with _explained(folder):
        # Harmful text may lie in a store: a new one is for its user alone.
        folder.parents[1].mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("ab", buffering=0) as file:
            _lock(file.fileno(), notice)
            if not (folder / "spec.json").exists():
                # Whoever else writes store.json at this moment writes the same bytes.
                (folder.parents[1] / "store.json").write_bytes(STORE)
                _publish(folder / "spec.json", spec)
            yield file.fileno()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn an error of the operating system that has a remedy into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in HINTS:
            raise
        problem = os.strerror(error.errno)
        raise BadInput(f"store: {folder}: {problem}; {HINTS[error.errno]}") from error


def _lock(file: int, notice: str) -> None:
    """Wait for the lock of a file, and say so if there is something to say."""
    if notice:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        print(f"{notice}; waiting for it", file=sys.stderr, flush=True)
    fcntl.flock(file, fcntl.LOCK_EX)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all.

    Several processes may write it: each has a temporary file of its own. Those that killed
    processes of this machine have left are removed.
    """
    begin = f".{path.name}.{platform.node()}."
    temporary = path.with_name(f"{begin}{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for left in path.parent.glob(f"{glob.escape(begin)}*.tmp"):
        number = left.name.removeprefix(begin).removesuffix(".tmp")
        if number.isdigit() and not _runs(int(number)):
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether a process of this machine still runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True


def _publish(path: Path, content: Json) -> None:
    """Write a JSON file so that it is there as a whole or not at all."""
    # The caller holds the lock: a temporary file of this name is left by a dead process.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)
