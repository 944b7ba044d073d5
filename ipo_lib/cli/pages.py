"""Pages of Markdown that hold numbers: each number is put there from the sidecars of the figures.

1. A *block* of lines between two marks, such as a table, is replaced as a whole. Its name says
   what it holds: ``findings``, ``turning points``, ``judges``, ``table PROFILE TABLE`` or
   ``claims PROFILE``.
2. A *marked number* stands in a sentence: a number, its interval and n, as far as the page gives
   them, then a comment that names profile and finding, as in ``85 % [71, 93]<!-- tiny: turns -->``.
   With ``less`` before the profile, the sign is turned round. ``= VERDICT`` after the name says
   which verdict the sentence tells, as in ``<!-- tiny: turns = holds -->``.
3. ``150<!-- tiny pairs: DPO on Part -->`` is the mean number of pairs of a row of Table 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ipo_lib.cli import findings
from ipo_lib.cli.report import in_order
from ipo_lib.experiments import study, study_cells
from ipo_lib.profiles.reading import checkout, read_profile
from ipo_lib.records import BadInput
from ipo_lib.stats import format_interval

TURNS = {  # rows of the table of turning points: (profile, traces in 09-cost, their name there)
    "simulated, 200 tokens": ("tiny", "made up, 200 tokens"),
    "simulated, 700 tokens": ("tiny", "made up, 700 tokens"),
    "recorded, `tiny`, safe": ("tiny", "recorded, safe traces"),
    "recorded, `tiny`, unsafe": ("tiny", "recorded, unsafe traces"),
    "recorded, `sandbox`, safe": ("sandbox", "recorded, safe traces"),
    "recorded, `sandbox`, unsafe": ("sandbox", "recorded, unsafe traces"),
}
JUDGED = re.compile(
    r"(?P<judge>.+) on (?P<set>[\w-]+) \((?P<answers>\d+) answers, [^)]*\): (?P<measure>\w+) "
)
BLOCK = re.compile(
    r"(?P<begin><!-- ipo (?P<name>[^:>]+): begin -->).*?(?P<end><!-- ipo (?P=name): end -->)",
    re.DOTALL,
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MARKED = re.compile(
    r"(?P<value>-?\d+(?:\.\d+)?)(?P<unit>\s+%)?"
    r"(?P<interval>\s+\[-?\d+(?:\.\d+)?,\s+-?\d+(?:\.\d+)?\])?"
    r"(?P<n>\s+\(n=\d+\))?"
    r"<!-- (?P<less>less )?(?P<profile>[\w-]+): (?P<name>[^>=]+?)"
    r"(?: = (?P<verdict>[^>]+?))? -->"
)

PAIRS = re.compile(r"\d+(?P<mark><!-- (?P<profile>[\w-]+) pairs: (?P<row>[^>]+?) -->)")


def write_pages(profiles: Sequence[str], house: Path) -> None:
    """Bring the numbers of README.md, figures/README.md and each profile's page up to date.

    Args:
        profiles: their names.
        house: the checkout.
    """
    for page in ("README.md", "figures/README.md"):
        path = house / page
        path.write_text(
            updated(page, path.read_text("utf-8"), profiles, house / "figures"), "utf-8"
        )
    for name in profiles:
        folder = house / "figures" / name
        if any(folder.glob("*.png")):
            (folder / "README.md").write_text(profile_page(name, folder), "utf-8")


def updated(page: str, text: str, profiles: Sequence[str], figures: Path) -> str:
    """The text of a page with today's numbers.

    Args:
        page: README.md, with the front findings, or figures/README.md, with all.
        text: of the page.
        profiles: the columns of the table of findings.
        figures: the folder with a folder of figures for each profile.
    """

    def update(match: re.Match[str]) -> str:
        what, *words = match["name"].split(" ", 2)
        if what == "findings":
            lines = findings.markdown(profiles, figures, front=page == "README.md")
        elif what == "turning":
            lines = turning_points(figures)
        elif what == "judges":
            lines = judges(figures)
        elif what == "table":
            lines = full_run(figures, *words)
        elif what == "claims":
            lines = claims(figures, *words)
        else:
            raise BadInput(f"{page}: a block {match['name']!r} is not known")
        return "\n".join([match["begin"], "", *lines, "", match["end"]])

    def pairs(match: re.Match[str]) -> str:
        cells, _ = study.read_committed(
            match["profile"], "table2", study_cells.Cell, figures / match["profile"]
        )
        counts = [cell.pairs for cell in cells if cell.row == match["row"]]
        if not counts:
            raise BadInput(f"{page}: Table 2 of {match['profile']} has no row {match['row']!r}")
        return f"{sum(counts) / len(counts):.0f}{match['mark']}"

    return update_numbers(PAIRS.sub(pairs, BLOCK.sub(update, text)), figures)


def update_numbers(text: str, figures: Path) -> str:
    """A page with every marked number as the sidecars have it, in as many digits as before.

    Args:
        text: of the page.
        figures: the folder with a folder of figures for each profile.

    Raises:
        BadInput: a mark names no claim, or a number has changed its sign, or a claim its verdict.
    """
    by_name = {finding.name: finding for finding in findings.read_findings() if finding.name}

    def update(match: re.Match[str]) -> str:
        profile, name = match["profile"], match["name"]
        if name not in by_name:
            raise BadInput(f"mark {name!r}: no finding has this name; see findings.yml")
        claim = findings.find_claim(by_name[name], profile, figures / profile)
        if claim is None:
            raise BadInput(f"mark {name!r}: the figures of {profile} have no such claim")
        if match["verdict"] not in (None, claim["verdict"]):
            raise BadInput(
                f"mark {name!r}: {match['verdict']!r} is now {claim['verdict']!r} in {profile}; "
                "write its sentence anew"
            )
        factor = 100 if by_name[name].unit == findings.PERCENT else 1
        numbers = [factor * number for number in (claim["value"], *claim["interval"])]
        if match["less"]:
            value, low, high = numbers
            numbers = [-value, -high, -low]
        if numbers[0] * float(match["value"]) < 0:
            raise BadInput(
                f"mark {name!r}: it was {match['value']} and is {numbers[0]:.3g} in {profile}; "
                "write its sentence anew"
            )
        parts = [_like(match["value"], numbers[0]), match["unit"] or ""]
        if match["interval"]:
            bounds = iter(numbers[1:])
            parts.append(NUMBER.sub(lambda old: _like(old[0], next(bounds)), match["interval"]))
        if match["n"]:
            parts.append(re.sub(r"\d+", str(claim["n"]), match["n"]))
        mark = match.group()[match.group().index("<!--") :]
        return "".join([*parts, mark])

    return MARKED.sub(update, text)


def _like(old: str, number: float) -> str:
    """A number with as many digits after the point as ``old`` has."""
    digits = len(old.partition(".")[2])
    text = f"{number:.{digits}f}"
    return text.lstrip("-") if not float(text) else text


def full_run(figures: Path, profile: str, table: str) -> list[str]:
    """A table of the last full run of a profile, under a line with its date."""
    from ipo_lib.experiments import results

    cells, date = study.read_committed(profile, table, study_cells.Cell, figures / profile)
    return [f"`{profile}`, full run of {date}", "", *results.markdown(cells)]


def claims(figures: Path, profile: str) -> list[str]:
    """What the last full run of a profile says of the paper's claims on methods."""
    from ipo_lib.experiments import claim_rule
    from ipo_lib.experiments.kl import Divergence

    cells, _ = study.read_committed(profile, "table2", study_cells.Cell, figures / profile)
    divergences, _ = study.read_committed(profile, "kl", Divergence, figures / profile)
    calibrated = read_profile(profile).calibrated
    head = ["verdict", "claim of the paper", "comparison", "measure", "difference", "n", "seeds"]
    lines = [f"| {' | '.join([*head, 'p'])} |", "|" + " --- |" * (len(head) + 1)]
    for row in claim_rule.decide_claims(cells, divergences):
        change, star = row["change"], "*" if row["kind"] in calibrated else ""
        numbers = format_interval(change, percent=row["measure"] != "KL").rpartition(", n=")[0]
        cells_of_line = [
            f"**{row['verdict']}{star}**",
            row["claim"],
            row["comparison"],
            row["measure"],
            numbers.replace(" %", ""),
            str(change.n),
            str(len(row["by seed"])),
            str(row["p"]),
        ]
        lines.append(f"| {' | '.join(cells_of_line)} |")
    return lines


def turning_points(figures: Path) -> list[str]:
    """The table of estimators of the turning point, from 09-cost of two profiles."""
    head = ["traces", "estimator", "within one sentence", "minus 32 a token", "kind right"]
    head += ["rollouts (95th pct)", "times fewer tokens"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for title, (profile, traces) in TURNS.items():
        sidecar = json.loads((figures / profile / "09-cost.json").read_text("utf-8"))
        for number, (estimator, row) in enumerate(sidecar["artifacts"][traces].items()):
            share, _, n = row["within one sentence"].rpartition(", ")
            difference = row["difference"].rpartition(", ")[0].replace(" %", "")
            cells = [
                "" if number else f"{title}, {n}",
                estimator,
                share.partition(" ")[0],
                difference if number else "",
                row["kind of trace"].partition(" [")[0],
                f"{row['rollouts']} ({row['rollouts, 95th percentile']})",
                row["times fewer tokens"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def judges(figures: Path) -> list[str]:
    """How judges agree with labels by people, from 10-judges."""
    sidecar = json.loads((figures / "judges" / "10-judges.json").read_text("utf-8"))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for claim in sidecar["claims"]:
        if match := JUDGED.match(claim["claim"]):
            low, high = claim["interval"]
            text = f"{claim['value']:.2f} [{low:.2f}, {high:.2f}]"
            key = match["set"], match["judge"], match["answers"]
            rows.setdefault(key, {})[match["measure"]] = text
    head = ["set", "judge", "answers", "kappa", "sensitivity", "specificity"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for names, measures in rows.items():
        cells = [*names, *(measures.get(name, "") for name in head[3:])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def profile_page(profile: str, figures: Path) -> str:
    """All figures of a profile with what each claims, as a page of Markdown.

    Args:
        profile: its name.
        figures: the folder of its figures.
    """
    lines = [
        f"# Figures of `{profile}`",
        "",
        "`ipo findings --write` makes this page. [The page of all results](../README.md) explains "
        "them, and [the notebooks' page](../../notebooks/README.md) their words. A claim that ends "
        "in no verdict only states a number.",
    ]
    for notebook in sorted((checkout() / "notebooks").glob("*.ipynb")):
        for number, sidecar in enumerate(in_order(notebook.stem, figures)):
            if not number:
                lines += ["", f"## [{notebook.stem}](../../notebooks/{notebook.name})"]
            lines += ["", f"![{sidecar.stem}]({sidecar.stem}.png)", ""]
            for claim in json.loads(sidecar.read_text("utf-8"))["claims"]:
                words = claim["claim"].replace("<", "&lt;").replace(">", "&gt;")
                lines.append(f"- {words}")
    return "\n".join(lines) + "\n"
