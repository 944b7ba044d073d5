"""Models and adapters from folders that others made: loaded as a whole, and without their code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ipo_lib.records import BadInput

INTACT = "put an intact copy there"


def load_causal_lm(folder: Path | str, **options: Any) -> Any:
    """The causal language model of a folder.

    No code of the folder is run, and nothing is downloaded.

    Args:
        folder: with config.json and safetensors.
        options: of ``from_pretrained``.

    Raises:
        BadInput: a file is broken or missing, or the model needs code of its own.
    """
    import transformers

    options |= {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )

    model, found = _explained(load, f"model {folder}")
    lost = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lost:
        raise BadInput(
            f"model {folder}: {len(lost)} weights are missing or of another shape, the first is "
            f"{lost[0]}; {INTACT}"
        )
    return model


def load_adapter(model: Any, folder: Path | str) -> Any:
    """A model with the LoRA adapter of a folder.

    Raises:
        BadInput: a file is broken, or the adapter belongs to another model.
    """
    from peft import PeftModel

    return _explained(lambda: PeftModel.from_pretrained(model, str(folder)), f"adapter {folder}")


def _explained(load: Callable[[], Any], what: str) -> Any:
    """What ``load`` returns; any error of the libraries is one line."""
    try:
        return load()
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise nearly every kind
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = INTACT
        if "custom code" in str(error):
            reason = "it needs Python code of its own, which is never run"
            hint = "take a model of an architecture that transformers knows"
        raise BadInput(f"{what} cannot be loaded ({reason:.200}); {hint}") from error
