"""The paper's findings as one table, made from the sidecars of a profile's figures.

``findings.yml`` lists the findings: for each, the figure and the words of the claim that answers
it. A finding that a profile's figures do not answer has an empty cell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ipo_lib.records import from_json
from ipo_lib.stats import HOLDS, OTHER_WAY, Interval, format_interval

PERCENT = "%"
VOID = "void"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    finding: str
    figure: str  # name of the figure's sidecar
    claim: str  # pattern of words in the claim's sentence
    paper: str = ""  # the paper's number, second-hand
    unit: str = PERCENT  # "": the number is no share
    front: bool = False  # whether README.md shows it, too
    name: str = ""  # by which a sentence of a page names it
    shown: bool = True  # in the table; False: sentences of a page only
    # The null world confirms it, too, so that it decides nothing; a test looks at its figures.
    void: bool = False


def read_findings() -> list[Finding]:
    """All findings, in the order of the notebooks."""
    text = resources.files(__package__).joinpath("findings.yml").read_text("utf-8")
    return [from_json(Finding, line) for line in yaml.safe_load(text)]


def find_claim(finding: Finding, profile: str, figures: Path) -> dict[str, Any] | None:
    """The claim about a profile that answers a finding; None where its figures have none.

    Args:
        finding: what is asked.
        profile: the profile's name.
        figures: the folder of its figures.
    """
    sidecar = figures / f"{finding.figure}.json"
    if not sidecar.is_file():
        return None
    pattern = re.compile(rf"Profile {re.escape(profile)}(?![\w-]).*{finding.claim}")
    for claim in json.loads(sidecar.read_text("utf-8"))["claims"]:
        if pattern.match(claim["claim"]):
            found: dict[str, Any] = claim
            return found
    return None


def describe(claim: dict[str, Any] | None, unit: str = PERCENT, void: bool = False) -> str:
    """A claim in short: number, interval, n, verdict; a star where it is calibrated.

    Args:
        claim: of a sidecar; None: there is none.
        unit: "%", or "" for a number that is no share.
        void: the null world shows the same, so that the claim decides nothing.
    """
    if claim is None:
        return ""
    value = float("nan") if claim["value"] is None else claim["value"]
    low, high = claim["interval"]
    interval = Interval(value, low, high, claim["n"], claim["method"])
    text = format_interval(interval, percent=unit == PERCENT).replace(" %", "")
    if void:
        text += f" **{VOID}**"
    elif claim["verdict"]:
        text += f" **{outcome(claim)}**"
    return text + ("*" if claim["origin"] == "calibrated" else "")


def outcome(claim: dict[str, Any]) -> str:
    """A claim's verdict in words: a claim of no difference that holds is ``no difference``."""
    return "no difference" if "margin" in claim and claim["verdict"] == HOLDS else claim["verdict"]


def differs_in_null_world(claim: dict[str, Any] | None) -> bool:
    """Whether a claim of a null world, in which nothing is a cause, shows a difference."""
    return bool(claim and "margin" in claim and claim["verdict"] == OTHER_WAY)


def markdown(profiles: Sequence[str], figures: Path, front: bool = False) -> list[str]:
    """The table as lines of Markdown: one row for each finding, one column for each profile.

    Args:
        profiles: their names.
        figures: the folder with a folder of figures for each.
        front: only the findings that README.md shows.
    """
    head = ["in percent, or as said", "paper, second-hand", *(f"`{name}`" for name in profiles)]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for finding in read_findings():
        if not finding.shown or (front and not finding.front):
            continue
        claims = [find_claim(finding, name, figures / name) for name in profiles]
        if any(claims):
            null = next(filter(differs_in_null_world, claims), None)
            cells = []
            for claim in claims:
                void = finding.void or (bool(null) and claim is not null)
                cells.append(describe(claim, finding.unit, void))
            lines.append(f"| {' | '.join([finding.finding, finding.paper, *cells])} |")
    return lines


def verdicts(
    profile: str, figures: Path, notebooks: Sequence[str], null_world: str = ""
) -> list[str]:
    """One line for each finding of a profile that has a verdict.

    Args:
        profile: its name.
        figures: the folder of its figures.
        notebooks: only findings of the figures of these notebooks.
        null_world: the profile in which nothing is a cause, if its claims stand in these figures.
    """
    lines = []
    begins = tuple(f"{Path(name).name[:2]}-" for name in notebooks)
    for finding in read_findings():
        claim = find_claim(finding, profile, figures)
        if finding.shown and finding.figure.startswith(begins) and claim and claim["verdict"]:
            number = describe(claim | {"verdict": None}, finding.unit)
            null = find_claim(finding, null_world, figures) if null_world else None
            void = finding.void or differs_in_null_world(null)
            verdict = VOID if void else outcome(claim)
            lines.append(f"{verdict:20} {finding.finding}: {number}")
    return lines
