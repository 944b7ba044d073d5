"""The report of a run: one HTML page with every figure, claim, interval, time and token count.

Its template ``report.html.jinja`` lies beside this file. The page needs no server and no network.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipo_lib.plots import SAFE_COLOUR, UNSAFE_COLOUR
from ipo_lib.profiles.reading import checkout
from ipo_lib.profiles.settings import Profile

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(
    page: Path, settings: Profile, records: Mapping[str, Mapping[str, Any]], figures: Path
) -> None:
    """Write the page; one that would not change is left as it is.

    Args:
        page: its file.
        settings: the profile.
        records: the record of each notebook's last run, by the notebook's name.
        figures: the folder of the figures.
    """
    import jinja2

    notebooks = []
    for name, record in records.items():
        shown = [read_figure(path) for path in in_order(name, figures)]
        notebooks.append({**record, "notebook": name, "figures": shown})
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    colours = {"safe": SAFE_COLOUR, "unsafe": UNSAFE_COLOUR}
    text = template.render(profile=settings, records=notebooks, colours=colours)
    if not page.is_file() or page.read_text("utf-8") != text:
        page.write_text(text, encoding="utf-8")


def in_order(notebook: str, figures: Path) -> list[Path]:
    """The figures' claims of a notebook, as it shows them from top to bottom."""
    path = checkout() / "notebooks" / f"{notebook}.ipynb"
    source = path.read_text("utf-8") if path.is_file() else ""
    sidecars = sorted(figures.glob(f"{notebook[:2]}-*.json"))
    return sorted(sidecars, key=lambda sidecar: source.find(sidecar.stem))


def read_figure(sidecar: Path) -> dict[str, Any]:
    """A figure's claims and tokens with its image, where that is still there."""
    path = sidecar.with_suffix(".png")
    image = path.read_bytes() if path.is_file() else b""
    figure: dict[str, Any] = json.loads(sidecar.read_text("utf-8"))
    figure |= {"name": sidecar.stem, "image": base64.b64encode(image).decode()}
    return figure
