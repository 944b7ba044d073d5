"""Checks whether this machine can run a profile, before hours are spent."""

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
from ipo_lib.judges import guards
from ipo_lib.profiles.run import build_component
from ipo_lib.profiles.settings import Component, Model, Profile
from ipo_lib.prompts import PromptSet, data_folder, known_prompt_sets, located, object_named
from ipo_lib.records import BadInput, from_json

GIB = 2**30
NEEDED_DISK, NEEDED_MEMORY = 2 * GIB, 8 * GIB
LARGE_WEIGHTS = 12 * GIB  # bytes, from which a model is large: 7B in 16 bits
LARGE_MEMORY = 40.0  # GiB of GPU memory asked for, where the weights are not here
SERVER_TIMEOUT = 20.0  # seconds
HUB_FOLDER = "ipo_lib.engines.hub:folder"
GUARD = "ipo_lib.judges.guards:guard"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str
    hint: str = ""  # what to do; empty where all is well

    def __str__(self) -> str:
        hint = f"   -> {self.hint}" if self.hint else ""
        return f"{self.name:24} {self.found}{hint}"


# The machine.


def check_machine(root: Path) -> Iterator[Check]:
    """Python, pinned packages, torch and its device, memory, threads, the store and its disk."""
    supported = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Check("python", sys.version.split()[0], "" if supported else "use Python 3.11 or 3.12")
    yield from _check_packages()
    yield _check_device()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hint = "a run of sandbox takes up to 8 GB; use the profile tiny"
    yield Check("memory", f"{memory / GIB:.0f} GiB", hint if memory < NEEDED_MEMORY else "")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Check("threads", f"{os.cpu_count()} CPUs, OMP_NUM_THREADS {threads}")
    yield _check_store(root)


def _check_packages() -> Iterator[Check]:
    """Each pinned dependency that is missing or has another version; else one line."""
    right, wrong = 0, []
    for requirement in importlib.metadata.requires("ipo_lib") or []:
        pin = re.fullmatch(r"([\w.-]+)==([\w.]+)", requirement)
        if not pin:
            continue
        name, wanted = pin.groups()
        try:
            version = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version == wanted:
            right += 1
        else:
            wrong.append(Check(name, version, f"pip install {name}=={wanted}"))
    yield from wrong or [Check("packages", f"all {right} pinned versions")]


def _check_device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", str(error), "pip install torch==2.13.0")
    if torch.cuda.is_available():
        return Check("device", torch.cuda.get_device_name(0))
    return Check("device", f"CPU, {torch.get_num_threads()} threads")


def _check_store(root: Path) -> Check:
    """The nearest folder that exists must be writable, with space left."""
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        return Check("store", f"{root} cannot be written", "choose another one with $IPO_STORE")
    hint = "free some space, or choose another folder with $IPO_STORE"
    return Check("store", f"{root}, {free / GIB:.0f} GiB free", hint if free < NEEDED_DISK else "")


# The needs of a profile.


def check_needs(settings: Profile, parameters: Mapping[str, Mapping[str, Any]]) -> Iterator[Check]:
    """The model of a profile, its servers, memory, prompt sets, and judges with their keys.

    Args:
        settings: the profile.
        parameters: the parameters of each of its notebooks, by the notebook's name.
    """
    yield from _check_model(settings)
    if not settings.model.server:  # else most of a GPU may be the server's
        yield from _check_gpu(settings.expected.gpu_gib, settings.model.device)
    for name, prompt_set in settings.prompts.items():
        yield from _check_prompts(name, prompt_set)
    for role in ("judge", "second_judge", "detector"):
        component = getattr(settings, role)
        for inner in component.with_inner() if component else ():
            yield from _check_component(role.replace("_", " "), inner)
    yield from _check_labelled_sets(parameters)
    capability = settings.evaluation.capability
    if any(settings.prompts[name].known for name in capability):
        installed = importlib.util.find_spec("lm_eval") is not None
        yield Check(
            "capability",
            "lm-eval" if installed else "no lm-eval",
            "" if installed else 'pip install -e ".[eval]"',
        )


def _check_labelled_sets(parameters: Mapping[str, Mapping[str, Any]]) -> Iterator[Check]:
    """The labelled sets that notebooks name under their parameter ``sets``; none named: all."""
    from ipo_lib.judges import people  # loads pandas

    folder, labelled = data_folder(), people.labelled_sets()
    for notebook, values in parameters.items():
        if "sets" not in values:
            continue
        names = values["sets"] or labelled
        files = [labelled[name].file for name in names if name in labelled]
        missing = [file for file in files if not (folder and (folder / file).is_file())]
        hint = f"{notebook} reads {missing[0]} under $IPO_DATA" if missing else ""
        yield Check("labelled sets", f"{len(missing)} missing", hint)


def _check_model(settings: Profile) -> Iterator[Check]:
    model = settings.model
    if model.find and model.find.use == HUB_FOLDER:
        arguments = model.find.arguments
        yield _check_hub_model("model", str(arguments["name"]), str(arguments["revision"]))
    elif not model.find:
        yield _check_folder(model)
    if model.server:
        yield from _check_server("model server", model.server)


def _check_folder(model: Model) -> Check:
    """A model folder must be one that a chat can be held with."""
    if not model.folder:
        hint = "name one: -p model.folder=DIR, or ipo reproduce --model DIR"
        return Check("model", "no folder", hint)
    path = Path(model.folder).expanduser()
    try:
        chat = Chat(path, prefill=model.prefill, system=model.system, variables=model.variables)
    except BadInput as error:
        return Check("model", str(path), str(error))
    return Check("model", f"{path}, {len(chat.eos_ids)} end tokens")


def _check_hub_model(name: str, model: str, revision: str) -> Check:
    if hub.local_folder(model, revision):
        return Check(name, f"{model} is here")
    hint = (
        "connect to huggingface.co, ask for access where it is gated, and run hf auth login; "
        "or name a folder"
    )
    return Check(name, f"{model}@{revision[:8]} is not here", hint)


def _check_server(name: str, server: Server) -> Iterator[Check]:
    if server.key and not os.environ.get(server.key):
        yield Check(name, f"{server.model}: no key", f"export {server.key}=...")
        return
    try:
        replace(server, attempts=1, timeout=SERVER_TIMEOUT).context()
    except BadInput as error:
        yield Check(name, f"{server.model}: does not answer", str(error))
        return
    yield Check(name, f"{server.model} behind {len(server.urls)} url(s)")


def _check_gpu(needed_gib: float, device: str) -> Iterator[Check]:
    """The GPU's memory against the profile's; nothing where a profile asks for none."""
    if not needed_gib or device == "cpu":
        return
    try:
        import torch
    except ImportError:
        return
    hint = f"this profile wants {needed_gib:.0f} GiB of GPU memory"
    if not torch.cuda.is_available():
        yield Check("GPU", "none", hint)
        return
    free, total = torch.cuda.mem_get_info()
    hint += "; free some, or lower batch_size and max_length"
    enough = free >= needed_gib * GIB
    text = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"
    yield Check("GPU", text, "" if enough else hint)


def _check_prompts(name: str, prompt_set: PromptSet) -> Iterator[Check]:
    """Whether a prompt set is on this machine; a hub set that is not needs the network."""
    try:
        source = located(name, prompt_set)
    except BadInput as error:
        yield Check(f"prompts {name}", "missing", str(error))
        return
    if source.file:
        exists = Path(source.file).expanduser().is_file()
        hint = "put the file there or name another in the profile"
        yield Check(f"prompts {name}", source.file, "" if exists else hint)
    elif source.hub:
        entry = known_prompt_sets().get(prompt_set.known, {})
        hint = entry.get("access", "connect to huggingface.co")
        if entry:
            hint += f", or put {entry['local']['file']} under $IPO_DATA"
        cached = hub.has_dataset(source.hub)
        yield Check(f"prompts {name}", f"{source.hub}, from the hub", "" if cached else hint)
    if source.templates:
        path = Path(source.templates).expanduser()
        folder = data_folder()
        if not path.is_file() and not (folder and (folder / path).is_file()):
            yield Check(f"prompts {name}", f"no {path}", "put it under $IPO_DATA")


def _check_component(role: str, component: Component) -> Iterator[Check]:
    """A judge or detector: its server and key, or its guard model."""
    arguments = component.arguments
    if "server" in arguments:
        yield from _check_server(role, from_json(Server, dict(arguments["server"])))
    elif component.use == GUARD and not arguments.get("folder"):
        all_guards, name = guards.load_guards(), str(arguments.get("name"))
        if name in all_guards:
            revision = str(arguments.get("revision", ""))
            yield _check_hub_model(role, all_guards[name].hub, revision)
        else:
            yield Check(role, f"{name!r} is no guard", f"choose one of {', '.join(all_guards)}")
    else:
        yield _check_object(role, component.use)


def _check_object(role: str, path: str) -> Check:
    """Whether what ``module:name`` names can be imported."""
    try:
        object_named(path)
    except BadInput as error:
        return Check(role, path, str(error))
    return Check(role, path)


# Speed and rehearsal.


def check_speed(settings: Profile, tokens: float) -> Iterator[Check]:
    """For a large model in this process: how long sampling takes.

    Args:
        settings: the profile.
        tokens: those of the profile's bill.
    """
    expected = settings.expected
    if settings.model.server or not _is_large(settings):
        return
    speed = expected.tokens_per_second
    hours = tokens / speed / 3600
    server_hours = tokens / expected.server_tokens_per_second / 3600
    yield Check(
        "speed",
        f"slow: in process {speed:,.0f} tokens/s ({expected.machine}): {hours:.0f} hours of "
        f"sampling; behind vLLM, named as model.server, about {server_hours:.0f}",
    )


def _is_large(settings: Profile) -> bool:
    """Whether a model has about 7B parameters or more: by its weights, where they are here."""
    folder = model_folder(settings)
    weights = 0
    if folder:
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if weights:
        return weights >= LARGE_WEIGHTS
    return settings.expected.gpu_gib >= LARGE_MEMORY


def model_folder(settings: Profile) -> Path | None:
    """The model's folder, where it is on this machine; a model that a run builds is not built."""
    find = settings.model.find
    if not find:
        folder = Path(settings.model.folder).expanduser()
        return folder if (folder / "config.json").is_file() else None
    if find.use != HUB_FOLDER:
        return None
    name, revision = str(find.arguments["name"]), str(find.arguments["revision"])
    return Path(build_component(find)) if hub.local_folder(name, revision) else None


def check_rehearsal(settings: Profile) -> Iterator[Check]:
    """Two steps of training and two tokens on a small random model of the same architecture."""
    try:
        for what, result in rehearsal.rehearse(settings, model_folder(settings)):
            yield Check(f"rehearsal: {what}", result)
    except Exception as error:  # whatever stops a run is what this is for
        kind = type(error).__name__
        lines = str(error).splitlines() or [kind]
        hint = "the run would stop here; change the setting it is about"
        yield Check("rehearsal", f"{kind}: {lines[0]}", hint)
