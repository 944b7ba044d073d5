"""Whether this machine can run a profile: each check says what it found and how to mend it, before hours are spent."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipo_lib.chat import Chat
from ipo_lib.cli import rehearsal
from ipo_lib.engines import hub
from ipo_lib.engines.openai_api import Server
from ipo_lib.judges.guards import known as known_guards
from ipo_lib.judges.people import known as labelled
from ipo_lib.profiles.run import build_component
from ipo_lib.profiles.settings import Component, Profile
from ipo_lib.prompts import PromptSet, data_folder, known_prompt_sets, located
from ipo_lib.records import BadInput, from_json

GIB = 2**30
LARGE, LARGE_MEMORY = (
    12 * GIB,
    40.0,
)  # bytes of weights (7B in 16 bits), or GiB asked for, from which a model is large
PATIENCE = 20.0  # seconds for a server to answer
BOOK = "10_judges_and_data"  # the notebook that reads labelled sets
NEEDED_DISK, NEEDED_MEMORY = 2 * GIB, 8 * GIB


@dataclass(frozen=True)
class Check:
    """One thing looked at; ``mend`` is empty where it is well."""

    name: str
    found: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.name:24} {self.found}" + (f"   -> {self.hint}" if self.hint else "")


def checks(root: Path) -> Iterator[Check]:
    """Python, pinned packages, torch and its device, memory, threads, the store and its disk."""
    yield Check(
        "python",
        sys.version.split()[0],
        "" if (3, 11) <= sys.version_info[:2] < (3, 13) else "use Python 3.11 or 3.12",
    )
    yield from _packages()
    yield _device()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    short = (
        "" if memory >= NEEDED_MEMORY else "a run of sandbox takes up to 8 GB; use the profile tiny"
    )
    yield Check("memory", f"{memory / GIB:.0f} GiB", short)
    yield Check(
        "threads",
        f"{os.cpu_count()} CPUs, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
    )
    yield _store(root)


def _packages() -> Iterator[Check]:
    """Every pinned dependency that is missing or has another version; one line when all are right."""
    pins = [
        re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        for line in importlib.metadata.requires("ipo_lib") or []
    ]
    wrong = []
    for name, wanted in (pin.groups() for pin in pins if pin):
        try:
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong.append(Check(name, found, f"pip install {name}=={wanted}"))
    yield from wrong or [
        Check("packages", f"all {sum(pin is not None for pin in pins)} pinned versions")
    ]


def _device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", str(error), "pip install torch==2.13.0")
    where = (
        torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return Check("device", where)


def _store(root: Path) -> Check:
    """The nearest folder that exists must be writable, with space left."""
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Check(
            "store", f"{root} cannot be written", "choose a writable folder with $IPO_STORE"
        )
    short = (
        "" if free >= NEEDED_DISK else "free some space, or choose another folder with $IPO_STORE"
    )
    return Check("store", f"{root}, {free / GIB:.0f} GiB free", short)


def needs(settings: Profile) -> Iterator[Check]:
    """What this profile needs beyond a sound machine: its model, servers, memory, prompt sets, judges with their keys."""
    yield from _model(settings)
    if not settings.model.server:  # else most of a GPU may be the server's
        yield from _memory(settings.expected.gpu_gib, settings.model.device)
    for name, spec in settings.prompts.items():
        yield from _prompts(name, spec)
    parts = {
        "judge": settings.judge,
        "second judge": settings.second_judge,
        "detector": settings.detector,
    }
    for name, part in parts.items():
        for one in part.all if part else ():
            yield from _part(name, one)
    if BOOK in settings.notebooks:
        folder = data_folder()
        lacking = [
            one.file
            for one in labelled().values()
            if not (folder and (folder / one.file).is_file())
        ]
        yield Check(
            "labelled sets",
            f"{len(lacking)} missing",
            f"{BOOK} reads {lacking[0]} under $IPO_DATA" if lacking else "",
        )
    if settings.evaluation.capability and any(
        settings.prompts[one].known for one in settings.evaluation.capability
    ):
        there = importlib.util.find_spec("lm_eval") is not None
        yield Check(
            "capability",
            "lm-eval" if there else "no lm-eval",
            "" if there else 'pip install -e ".[eval]"',
        )


def rehearsed(settings: Profile) -> Iterator[Check]:
    """A two-step training and a two-token draw with the profile's settings, on a small random model of its architecture."""
    try:
        for what, how in rehearsal.rehearse(settings, _at_hand(settings)):
            yield Check(f"rehearsal: {what}", how)
    except Exception as error:  # whatever stops a run is what this is for
        said = (str(error).splitlines() or [type(error).__name__])[0]
        yield Check(
            "rehearsal",
            f"{type(error).__name__}: {said}",
            "the run would stop here; change the setting it is about",
        )


def speed(settings: Profile, tokens: float) -> Iterator[Check]:
    """For a large model in this process: its speed, and how long ``tokens``, those of the profile's bill, take at it."""
    at = settings.expected
    if settings.model.server or not _large(settings):
        return
    here, there = (
        tokens / rate / 3600 for rate in (at.tokens_per_second, at.server_tokens_per_second)
    )
    said = f"in process {at.tokens_per_second:,.0f} tokens/s ({at.machine}): {here:.0f} hours of sampling"
    yield Check("speed", f"slow: {said}; behind vLLM, named as model.server, about {there:.0f}")


def _large(settings: Profile) -> bool:
    """Whether a model is about 7B or more: by its weights where they are here, else by the memory that the profile states."""
    folder = _at_hand(settings)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0
    return weights >= LARGE if weights else settings.expected.gpu_gib >= LARGE_MEMORY


def _at_hand(settings: Profile) -> Path | None:
    """The model's folder, where it is on this machine already. A model that a run would build is not built here."""
    find = settings.model.find
    if not find:
        folder = Path(settings.model.folder).expanduser()
        return folder if (folder / "config.json").is_file() else None
    if find.use != "ipo_lib.engines.hub:folder":
        return None
    held = hub.held(str(find.arguments["name"]), str(find.arguments["revision"]))
    return Path(build_component(find)) if held else None


def _model(settings: Profile) -> Iterator[Check]:
    model = settings.model
    if model.find and model.find.use == "ipo_lib.engines.hub:folder":
        yield _held(
            "model", str(model.find.arguments["name"]), str(model.find.arguments["revision"])
        )
    elif not model.find:
        yield _folder(Path(model.folder).expanduser() if model.folder else None, model.prefill)
    if model.server:
        yield from _server("model server", model.server)


def _folder(folder: Path | None, prefill: str) -> Check:
    """A model folder must be one that a chat can be held with."""
    if folder is None:
        return Check(
            "model", "no folder", "name one: -p model.folder=DIR, or ipo reproduce --model DIR"
        )
    try:
        return Check("model", f"{folder}, {len(Chat(folder, prefill=prefill).eos_ids)} end tokens")
    except BadInput as error:
        return Check("model", str(folder), str(error))


def _held(what: str, name: str, revision: str) -> Check:
    if hub.held(name, revision):
        return Check(what, f"{name} is here")
    hint = "connect to huggingface.co, ask for access where it is gated, and run hf auth login; or name a folder"
    return Check(what, f"{name}@{revision[:8]} is not here", hint)


def _server(what: str, server: Server) -> Iterator[Check]:
    if server.key and not os.environ.get(server.key):
        yield Check(what, f"{server.model}: no key", f"export {server.key}=...")
        return
    try:
        replace(server, attempts=1, timeout=PATIENCE).context()
    except BadInput as error:
        yield Check(what, f"{server.model}: not well", str(error))
        return
    yield Check(what, f"{server.model} behind {len(server.urls)} url(s)")


def _memory(wanted: float, device: str) -> Iterator[Check]:
    """The GPU's memory against the profile's; nothing where a profile asks for none."""
    if not wanted or device == "cpu":
        return
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        yield Check("GPU", "none", f"this profile wants {wanted:.0f} GiB of GPU memory")
        return
    free, total = torch.cuda.mem_get_info()
    hint = (
        ""
        if free >= wanted * GIB
        else f"this profile wants {wanted:.0f} GiB; free some, or lower batch_size and max_length"
    )
    yield Check("GPU", f"{free / GIB:.0f} of {total / GIB:.0f} GiB free", hint)


def _prompts(name: str, spec: PromptSet) -> Iterator[Check]:
    """Whether a prompt set is on this machine; a hub set that is not needs the network."""
    try:
        where = located(name, spec)
    except BadInput as error:
        yield Check(f"prompts {name}", "missing", str(error))
        return
    if where.file:
        there = Path(where.file).expanduser().is_file()
        yield Check(
            f"prompts {name}",
            where.file,
            "" if there else "put the file there or name another in the profile",
        )
    elif where.hub:
        entry = known_prompt_sets().get(spec.known, {})
        hint = entry.get("access", "connect to huggingface.co")
        hint += f", or put {entry['local']['file']} under $IPO_DATA" if entry else ""
        yield Check(
            f"prompts {name}", f"{where.hub}, from the hub", "" if hub.has_data(where.hub) else hint
        )
    templates = Path(where.templates).expanduser() if where.templates else None
    if templates and not (
        templates.is_file() or ((folder := data_folder()) and (folder / templates).is_file())
    ):
        yield Check(f"prompts {name}", f"no {templates}", "put it under $IPO_DATA")


def _part(name: str, part: Component) -> Iterator[Check]:
    """A judge or detector: its server and key, or its guard model."""
    given: Mapping[str, Any] = part.arguments
    if "server" in given:
        yield from _server(name, from_json(Server, dict(given["server"])))
    elif part.use == "ipo_lib.judges.guards:guard" and not given.get("folder"):
        guard = known_guards().get(str(given.get("name")))
        hint = f"choose one of {', '.join(known_guards())}"
        revision = str(given.get("revision", ""))
        yield (
            _held(name, guard.hub, revision)
            if guard
            else Check(name, f"{given.get('name')!r} is no guard", hint)
        )
    else:
        yield Check(name, part.use)
