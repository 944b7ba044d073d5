"""Whether this machine can run a profile: each check says what it found and how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
NEEDED_DISK, NEEDED_MEMORY = 2 * GIB, 8 * GIB


@dataclass(frozen=True)
class Check:
    """One thing looked at; ``mend`` is empty where it is well."""

    name: str
    found: str
    mend: str = ""


def checks(root: Path) -> Iterator[Check]:
    """Python, pinned packages, torch and its device, memory, threads, the store and its disk."""
    yield Check("python", sys.version.split()[0], "" if (3, 11) <= sys.version_info[:2] < (3, 13) else "use Python 3.11 or 3.12")
    yield from _packages()
    yield _device()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    short = "" if memory >= NEEDED_MEMORY else "a run of sandbox takes up to 8 GB; use the profile tiny"
    yield Check("memory", f"{memory / GIB:.0f} GiB", short)
    yield Check("threads", f"{os.cpu_count()} CPUs, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}")
    yield _store(root)


def _packages() -> Iterator[Check]:
    """Every pinned dependency that is missing or has another version; one line when all are right."""
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in importlib.metadata.requires("ipo_lib") or []]
    wrong = []
    for name, wanted in (pin.groups() for pin in pins if pin):
        try:
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong.append(Check(name, found, f"pip install {name}=={wanted}"))
    yield from wrong or [Check("packages", f"all {sum(pin is not None for pin in pins)} pinned versions")]


def _device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", str(error), "pip install torch==2.13.0")
    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return Check("device", where)


def _store(root: Path) -> Check:
    """The nearest folder that exists must be writable, with space left."""
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Check("store", f"{root} cannot be written", "choose a writable folder with $IPO_STORE")
    short = "" if free >= NEEDED_DISK else "free some space, or choose another folder with $IPO_STORE"
    return Check("store", f"{root}, {free / GIB:.0f} GiB free", short)
