"""A run of ``ipo reproduce`` that is killed again and again must end as one that is not.

``python tests/kill_campaign.py FOLDER [--kills 100] [-p NAME=VALUE ...]`` takes an hour.
Pytest does not collect it.

1. ``FOLDER/whole`` gets a store and figures in one go.
2. ``FOLDER/killed`` gets the same from an empty folder, with SIGKILL at random moments: to all
   processes of the run, or to ``ipo`` alone, so that its kernel still writes while the next run
   starts. After the last kill it runs to its end.
3. Figures, artifacts and records of both must be equal: the files byte for byte, the records of a
   ledger line by line in any order, since draws are written as they end. The seconds that a cell
   of a table took are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[1]
EARLIEST = 0.5  # seconds after its start, before which no run is killed
IGNORED = ("runs", "lock")  # executed notebooks with their times; locks


def start(folder: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    """Start ``ipo reproduce tiny`` with the store and the figures of a folder."""
    command = [sys.executable, "-m", "ipo_lib.cli", "reproduce", "tiny"]
    command += ["--store", str(folder / "store"), "--figures", str(folder / "figures")]
    for setting in settings:
        command += ["-p", setting]
    environment = {"PYTHONPATH": str(REPOSITORY), "IPO_CHECKPOINT_SECONDS": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, cwd=REPOSITORY
        )


def finish(folder: Path, settings: list[str]) -> None:
    """Run to the end.

    Raises:
        SystemExit: the run fails.
    """
    if start(folder, settings).wait():
        raise SystemExit(f"the run failed: see {folder / 'log'}")


def kill(run: subprocess.Popen[bytes], alone: bool) -> None:
    """Kill a run with all its processes, or ``ipo`` alone, which leaves its kernel behind."""
    process = psutil.Process(run.pid)
    victims = [process] if alone else [process, *process.children(recursive=True)]
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue  # it has just ended
    run.wait()


def kill_often(
    folder: Path, settings: list[str], kills: int, latest: float, draw: random.Random
) -> Counter[str]:
    """Kill runs at random moments; how often, by what they were doing.

    Args:
        folder: for store and figures.
        settings: of the run, as ``name=value``.
        kills: how many; fewer if a run comes to its end before.
        latest: seconds after its start, after which no run is killed.
        draw: gives the moments.
    """
    seen: Counter[str] = Counter()
    while seen.total() < kills:
        run = start(folder, settings)
        # Even on the scale of logarithms: most runs are killed early, some come far.
        time.sleep(EARLIEST * (latest / EARLIEST) ** draw.random())
        if run.poll() is not None:
            break  # it has come to its end
        trains = any((folder / "store").glob("adapters/*/building"))
        kill(run, alone=draw.random() < 0.5)
        seen["while a training is unfinished" if trains else "elsewhere"] += 1
    return seen


def contents(folder: Path) -> dict[str, bytes | list[bytes]]:
    """What must be equal, by the file's name."""
    found: dict[str, bytes | list[bytes]] = {}
    for path in sorted(folder.glob("*/**/*")):
        name = path.relative_to(folder)
        if not path.is_file() or set(IGNORED) & set(name.parts):
            continue
        if path.name == "records.jsonl":
            lines = path.read_bytes().splitlines()
            found[str(name)] = sorted(map(without_seconds, lines))
        elif path.name == "done.json" and (path.parent / "records.jsonl").exists():
            found[str(name)] = b"done"  # the hash is of the records in their order
        else:
            found[str(name)] = path.read_bytes()
    return found


def without_seconds(line: bytes) -> bytes:
    """A line of a ledger; of the record of a cell all but its checksum and its seconds."""
    entry = json.loads(line)
    if "seconds" not in entry["record"]:
        return line
    del entry["crc"], entry["record"]["seconds"]
    return json.dumps(entry, sort_keys=True).encode()


def main() -> None:
    """Run the campaign.

    Raises:
        SystemExit: the two ends differ.
    """
    parser = argparse.ArgumentParser(description="Kill a run again and again.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latest", type=float, default=90.0)
    parser.add_argument("-p", dest="settings", action="append", default=[])
    asked = parser.parse_args()
    began = time.monotonic()
    finish(asked.folder / "whole", asked.settings)
    print(f"one run without a kill: {time.monotonic() - began:.0f} s", flush=True)
    draw = random.Random(asked.seed)
    killed = asked.folder / "killed"
    seen = kill_often(killed, asked.settings, asked.kills, asked.latest, draw)
    print(f"{seen.total()} kills: {dict(seen)}", flush=True)
    finish(killed, asked.settings)
    whole, killed = contents(asked.folder / "whole"), contents(killed)
    wrong = [name for name in {**whole, **killed} if whole.get(name) != killed.get(name)]
    print(f"{len(whole)} files compared, {len(wrong)} differ", *wrong, sep="\n  ")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
