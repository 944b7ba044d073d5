"""The run store: content-addressed, append-only, resumable, readable by eye, the same bytes whenever it was made.
``<root>/<stage>/<digest>/`` holds ``spec.json``, then ``records.jsonl`` (a ledger) or ``files/`` (an artifact), then
``done.json``. A kill at any instant costs unfinished work only; locks (``flock``) end with their process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from ipo_lib.records import BadInput, canonical, digest

STORE = b'{"version": 1}\n'  # what store.json says; raise the number when the layout changes
LINE = b'{"crc":"%08x",%b\n'  # of records: canonical JSON that begins with the CRC-32 of what follows it
ELSEWHERE, FREE = (
    "choose a writable folder with $IPO_STORE",
    "free space and run again, finished records are kept",
)
HINTS = dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR), ELSEWHERE
)
HINTS |= {
    errno.ENOSPC: FREE,
    errno.EDQUOT: FREE,
    errno.EWOULDBLOCK: "another process is building this; let it finish",
}
Json = dict[str, Any]


def default_root() -> Path:
    """``$IPO_STORE``, else ``~/.cache/ipo_lib``."""
    return Path(os.environ.get("IPO_STORE") or "~/.cache/ipo_lib").expanduser()


class Store:
    """Ledgers and artifacts by (stage, version, spec). Looking at them writes nothing; another version is BadInput."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = default_root() if root is None else Path(root).expanduser()
        self._ledgers: dict[
            Path, Ledger
        ] = {}  # read once; a search asks for the same one in every round
        self.drawn: dict[
            str, int
        ] = {}  # generated tokens of every rollout asked for in this process, stored before or not
        self.unread = set[str]()  # rollouts whose cue a detector was asked for in vain
        self.closed: dict[
            str, bool
        ] = {}  # whether the trace of every whole response asked for was closed
        if (path := self.root / "store.json").exists() and not STORE.startswith(
            found := path.read_bytes()
        ):
            raise BadInput(f"store: {self.root} says {found!r:.60}, this is {STORE!r}; {ELSEWHERE}")

    def ledger(self, stage: str, version: int, spec: Json) -> Ledger:
        """The records of ``spec``; raise ``version`` when the meaning of the stage changes."""
        found = Ledger(self.root / stage, {"stage": stage, "version": version, "spec": spec})
        found = self._ledgers.setdefault(found.folder, found)
        found.read()
        return found

    def artifact(self, stage: str, version: int, spec: Json) -> Artifact:
        """The files (an adapter, a merged model) of ``spec``."""
        return Artifact(self.root / stage, {"stage": stage, "version": version, "spec": spec})


class Ledger(dict[str, Json]):
    """The records of a spec by key, as last seen on disk; only ``append`` writes, and never a key that is there."""

    def __init__(self, parent: Path, spec: Json) -> None:
        self.folder, self.spec, self._seen, self._sha = parent / digest(spec), spec, 0, sha256()

    def read(self) -> None:
        """Take in what is on the disk and was not seen yet; all of it where somebody has cleared the folder."""
        path = self.folder / "records.jsonl"
        if self._seen and (not path.exists() or path.stat().st_size < self._seen):
            self.clear()
            self._seen, self._sha = 0, sha256()
        self._take_in()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that no worker has written yet, each once, in their order."""
        self._take_in()
        return [key for key in dict.fromkeys(keys) if key not in self]

    def append(self, records: Mapping[str, Json] | Iterable[tuple[str, Json]]) -> int:
        """Brings one batch to the disk (one fsync, canonical JSON lines); how many of its records were new."""
        texts = {
            key: canonical({"key": key, "record": record})[1:]
            for key, record in dict(records).items()
        }
        with _locked(self.folder, self.spec, "records.jsonl") as file:
            self._take_in(file)
            new = [
                text.encode(errors="surrogatepass")
                for key, text in texts.items()
                if key not in self
            ]
            if data := b"".join(LINE % (zlib.crc32(rest), rest) for rest in new):
                (self.folder / "done.json").unlink(missing_ok=True)
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
            self._take_in(file)
        return len(new)

    def collect(self, records: Iterable[tuple[str, Json]], every: int) -> None:
        """Append records as they come, ``every`` so many, and finish; those that came before a failure are kept, too."""
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
        """Writes ``done.json``, unless it is there: how many records, the SHA-256 of their file. A new record removes it."""
        if (self.folder / "done.json").exists():
            return
        with _locked(self.folder, self.spec, "records.jsonl") as file:
            self._take_in(file)
            _publish(
                self.folder / "done.json", {"records": len(self), "sha256": self._sha.hexdigest()}
            )

    def _take_in(self, locked: int | None = None) -> None:
        """Reads on, under a lock. A last line without its newline is torn (kill, full disk); a writer cuts it off."""
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            (self.folder / "records.jsonl").open("rb") as file,
        ):
            if locked is None:
                fcntl.flock(file, fcntl.LOCK_SH)
            file.seek(self._seen)
            for line in file:
                if not line.endswith(b"\n"):
                    return None if locked is None else os.ftruncate(locked, self._seen)
                rest = line.partition(b",")[2][:-1]
                entry = json.loads(b"{" + rest) if line == LINE % (zlib.crc32(rest), rest) else None
                if entry is None or entry["key"] in self:
                    hint = "delete this line and run again, only its record is computed anew"
                    raise BadInput(
                        f"store: {file.name}, line {len(self) + 1}: corrupted or repeated record; {hint}"
                    )
                self[entry["key"]], self._seen = entry["record"], self._seen + len(line)
                self._sha.update(line)


class Artifact:
    """A folder of files, ``path``, that is there as a whole (``done``) or not at all."""

    def __init__(self, parent: Path, spec: Json) -> None:
        self.folder, self.spec = parent / digest(spec), spec
        self.path = self.folder / "files"

    @property
    def done(self) -> bool:
        """Whether it was built to the end."""
        return (self.folder / "done.json").exists()

    @contextmanager
    def build(self) -> Iterator[Path]:
        """A folder to fill, renamed to ``path`` at the end. A dead build's leavings go; a live one is BadInput."""
        with _locked(self.folder, self.spec, "lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
            if self.done:
                raise BadInput(
                    f"store: {self.path} is already built; delete {self.folder} to build it again"
                )
            for leaving in (building := self.folder / "building", self.path):
                shutil.rmtree(leaving, ignore_errors=True)
            building.mkdir()
            yield building
            files = {
                str(f.relative_to(building)): f.stat().st_size
                for f in building.rglob("*")
                if f.is_file()
            }
            os.replace(building, self.path)
            _publish(self.folder / "done.json", {"bytes": files})


@contextmanager
def _locked(folder: Path, spec: Json, name: str, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """The file ``name`` of a folder, locked and made if need be. What a user can mend becomes one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("ab", buffering=0) as file:
            fcntl.flock(file, how)
            if not (folder / "spec.json").exists():
                (folder.parents[1] / "store.json").write_bytes(
                    STORE
                )  # same bytes, whoever else writes it now
                _publish(folder / "spec.json", spec)
            yield file.fileno()
    except OSError as error:
        if error.errno not in HINTS:
            raise
        raise BadInput(
            f"store: {folder}: {os.strerror(error.errno)}; {HINTS[error.errno]}"
        ) from error


def _publish(path: Path, content: Json) -> None:
    temporary = path.with_suffix(
        ".tmp"
    )  # the caller's lock makes it ours, even if a dead process left it
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)
