"""The folder of public data sets, which ``IPO_DATA`` names. Nothing of it is in the project."""

from __future__ import annotations

import os
from pathlib import Path

NO_KIT = "needs the public data sets: set IPO_DATA to the folder that holds them"
FOLDER = os.environ.get("IPO_DATA")
KIT = Path(FOLDER) if FOLDER and (Path(FOLDER) / "MANIFEST.json").is_file() else None
