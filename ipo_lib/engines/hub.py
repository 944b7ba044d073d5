"""Model folders from the hub at a pinned revision: the only module that downloads models."""

from __future__ import annotations

from pathlib import Path

from ipo_lib.records import BadInput

FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")
CHAT = ("*.json", "*.jinja", "tokenizer.model")  # all that a model behind a server needs here


def folder(name: str, revision: str, chat_only: bool = False) -> str:
    """The folder of a hub model at a commit, downloaded once; without its weights where ``chat_only``. BadInput: no such model or
    commit, no access, no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not revision:
        raise BadInput(f"model {name!r}: no revision; name the commit")
    try:
        return str(
            snapshot_download(
                name, revision=revision, allow_patterns=[*(CHAT if chat_only else FILES)]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "ask for access on its page and run hf auth login, mend the commit, or set model.find to null and model.folder"
        raise BadInput(f"model {name}@{revision} cannot be had ({said}); {hint}") from None


def held(name: str, revision: str) -> Path | None:
    """The folder of a model that is here already, weights included; None where it is not. Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    there = Path(found).parent if isinstance(found, str) else None
    return there if there and any(there.glob("*.safetensors")) else None


def has_data(pinned: str) -> bool:
    """Whether a data set ``name@revision`` has been downloaded before. Asks no network."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return False
    return any(
        one.repo_type == "dataset" and one.repo_id == pinned.partition("@")[0] for one in repos
    )
