"""The public data sets beside the project, where they are: tests read them there, nothing of them is in the project."""

from __future__ import annotations

import os
from pathlib import Path

NO_KIT = "needs the data kit: set IPO_DATA, or lay it at ../shared/data"
PLACES = (
    Path(os.environ.get("IPO_DATA") or "/nowhere"),
    Path(__file__).parents[2] / "shared" / "data",
)
KIT = next((one for one in PLACES if (one / "MANIFEST.json").is_file()), None)
