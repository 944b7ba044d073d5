"""Claims: sentences that hold a measured number, with its interval, its n and its origin.

1. An *estimate* states a number. A *claim* also says what the number should be, and ends in its
   verdict: *holds*, *the other way round*, *undecided* or *within the margin*.
2. The *origin* is *calibrated* where the world was built or fitted to show the number, which is
   then no finding, and *emergent* otherwise.
3. ``about`` says what a sentence is about. Where a model closes too few of its traces,
   ``withheld`` drops all sentences about traces.
4. ``save_figure`` writes a figure, and beside it its *sidecar*: a JSON file with the claims.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ipo_lib import plots, stats
from ipo_lib.records import BadInput
from ipo_lib.stats import Interval, format_interval
from ipo_lib.store import write_whole

Claim = Mapping[str, Any]
ORIGINS = CALIBRATED, EMERGENT = ("calibrated", "emergent")
BUILT = " The world was built or fitted for this."
# What a claim is about. Only claims about traces depend on whether traces are closed.
SUBJECTS = TRACES, ANSWERS, COSTS, INTERVALS, JUDGES, DATA = (
    "traces",
    "answers",
    "costs",
    "intervals",
    "judges",
    "data",
)


def estimate(
    sentence: str,
    value: Interval,
    *,
    origin: str,
    about: str = TRACES,
    percent: bool = True,
    paper: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A measured number that claims nothing.

    Args:
        sentence: with ``{}`` where the number, its interval and n belong.
        value: the number.
        origin: ``calibrated`` or ``emergent``.
        about: what the sentence is about, one of ``SUBJECTS``.
        percent: whether the number is printed as percent.
        paper: what ``paper.reported`` returns for the same number in the paper.

    Raises:
        BadInput: an unknown ``origin`` or ``about``.
    """
    if origin not in ORIGINS:
        raise BadInput(f"claim origin {origin!r} is unknown; known: {', '.join(ORIGINS)}")
    if about not in SUBJECTS:
        raise BadInput(f"claim about {about!r} is unknown; known: {', '.join(SUBJECTS)}")
    # Not ``format``: a mined sentence in the words of a claim may hold braces.
    before, slot, after = sentence.rpartition("{}")
    if not slot:
        raise BadInput(f"claim {sentence!r}: write {{}} where the number belongs")
    text = before + format_interval(value, percent) + after
    row: dict[str, Any] = {
        "claim": text + BUILT if origin == CALIBRATED else text,
        "value": None if math.isnan(value.value) else round(value.value, 6),
        "interval": [round(value.low, 6), round(value.high, 6)],
        "n": value.n,
        "method": value.method,
        "origin": origin,
        "verdict": None,
        "about": about,
    }
    if paper:
        row["paper"] = {**paper, "as": "reported second-hand"}
    return row


def claim(
    sentence: str,
    value: Interval,
    *,
    origin: str,
    above: bool = True,
    than: float = 0.0,
    small: float | None = None,
    margin: float | None = None,
    verdict: str = "",
    **more: Any,
) -> dict[str, Any]:
    """A claim that the number can support or refute; its sentence ends in the verdict.

    Args:
        sentence: with ``{}`` where the number, its interval and n belong.
        value: the number.
        origin: ``calibrated`` or ``emergent``.
        above: the claim says that the number lies above ``than``; False: below.
        than: what the number is compared with.
        small: an interval that holds ``than`` and lies wholly within this of it is ``within the
            margin`` instead of ``undecided``. The other verdicts stay.
        margin: the claim says instead that there is no difference, up to this much.
        verdict: where another rule decides (``claim_rule.apply_rule``), what it decided.
        more: ``about``, ``percent`` and ``paper``, as in ``estimate``.
    """
    if margin is not None:
        verdict = verdict or stats.no_difference(value, margin)
    verdict = verdict or stats.verdict(value, above, than, small)
    row = estimate(sentence.rstrip("."), value, origin=origin, **more)
    text = row["claim"].removesuffix(BUILT)
    if origin == CALIBRATED:
        text += f" ({BUILT.strip(' .').lower()})"
    if small is not None:
        row["small"] = small
    if margin is not None:
        row["margin"] = margin
    return {**row, "claim": f"{text}: {verdict}.", "verdict": verdict}


def withheld(claims: Sequence[Claim], profile: str, closed: Interval) -> list[Claim]:
    """The claims that are not about traces, and one more that says how many are withheld.

    Args:
        claims: all claims of a figure.
        profile: name of the profile, whose model closes less than half of its traces.
        closed: the share of traces that were closed.
    """
    kept = [row for row in claims if row["about"] != TRACES]
    sentence = (
        f"Profile {profile}: traces that were closed: {{}}. "
        f"Under half: {len(claims) - len(kept)} claims about traces are withheld."
    )
    return [*kept, estimate(sentence, closed, origin=EMERGENT)]


def save_figure(
    fig: Any,
    folder: Path,
    name: str,
    claims: Sequence[Claim],
    *,
    profile: str,
    about: str,
    artifacts: Mapping[str, Any],
    tokens: int = 0,
) -> None:
    """Write ``name``.pdf, .png and the sidecar ``name``.json; the same input gives the same bytes.

    Args:
        fig: a matplotlib figure.
        folder: where to write; made if it is missing.
        name: of the files, without ending.
        claims: from ``claim`` and ``estimate``.
        profile: name of the profile.
        about: what the profile is, printed below the figure.
        artifacts: what the figure was made from, as JSON values.
        tokens: how many tokens were generated for its data.
    """
    plots.save(fig, folder, name, caption=f"profile {profile}: {about}")
    rows = [{key: row[key] for key in row if key != "about"} for row in claims]
    sidecar = {"profile": profile, "about": about, "claims": rows, "tokens": tokens}
    sidecar["artifacts"] = dict(sorted(artifacts.items()))
    text = json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / f"{name}.json", text)
