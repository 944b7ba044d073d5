"""Model folders from the hub at a pinned revision: the only module that downloads models."""

from __future__ import annotations

from pathlib import Path

from ipo_lib.records import BadInput

CHAT = ["*.json", "*.jinja", "tokenizer.model"]  # all that a model behind a server needs here
FILES = [*CHAT, "*.safetensors"]


def folder(name: str, revision: str, chat_only: bool = False) -> str:
    """The folder of a hub model at a commit, downloaded once; ``chat_only``: without its weights.

    BadInput: no such model or commit, no access, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not revision:
        raise BadInput(f"model {name!r}: no revision; name the commit")
    patterns = CHAT if chat_only else FILES
    try:
        return str(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise BadInput(
            f"model {name}@{revision} cannot be had ({lines[0]}); "
            "ask for access on its page and run hf auth login, correct the commit, "
            "or set model.find to null and model.folder"
        ) from None


def local_folder(name: str, revision: str) -> Path | None:
    """The folder of a downloaded model with its weights, None where there is none; no network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    model_folder = Path(config).parent
    return model_folder if any(model_folder.glob("*.safetensors")) else None


def has_dataset(pinned: str) -> bool:
    """Whether a data set ``name@revision`` has been downloaded before; asks no network."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    name = pinned.partition("@")[0]
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return False
    return any(
        repository.repo_type == "dataset" and repository.repo_id == name
        for repository in repositories
    )
