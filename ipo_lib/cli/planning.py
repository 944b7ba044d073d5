"""What a command line asks for, read and checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipo_lib.cli.arguments import checked, declared, for_notebook, known_parameters, parse
from ipo_lib.profiles.reading import checkout, read_profile
from ipo_lib.profiles.settings import Profile
from ipo_lib.records import digest
from ipo_lib.store import Store


@dataclass(frozen=True)
class Planned:
    """A command line, read: the profile's settings and notebooks, what each is given, and the folders of the run."""

    settings: Profile
    books: list[Path]
    values: dict[Path, dict[str, Any]]
    root: Path
    figures: Path
    runs: Path


def planned(profile: str, parameter: list[str], store: str, figures: str) -> Planned:
    """What the arguments mean; BadInput for a name that nothing knows or a value of another type."""
    given, root = parse(parameter), Store(store or None).root
    profile = str(Path(profile).resolve()) if profile.endswith(".yml") else profile
    chosen = read_profile(
        profile, {name: value for name, value in given.items() if name == "notebooks"}
    ).notebooks
    books = [checkout() / "notebooks" / f"{name}.ipynb" for name in chosen]
    known = {book: declared(book) for book in books}
    overrides = {
        name: value
        for name, value in given.items()
        if not any(name in names for names in known.values())
    }
    settings = read_profile(profile, overrides)
    known_parameters(
        settings.name, settings.parameters, {book.stem: declared(book) for book in notebooks()}
    )
    target = Path(figures).expanduser() if figures else checkout() / "figures" / settings.name
    common = {
        "profile": profile,
        "overrides": overrides,
        "store": str(root),
        "figures": str(target),
    }
    own = dict[Path, dict[str, Any]]()
    for book in books:
        values = {**for_notebook(settings.parameters, book.stem), **given}
        own[book] = {
            name: checked(name, value, known[book][name][0])
            for name, value in values.items()
            if name in known[book]
        }
    runs = root / "runs" / f"{settings.name}-{digest([str(target.resolve())], 6)}"
    return Planned(
        settings, books, {book: {**common, **own[book]} for book in books}, root, target, runs
    )


def billed(plan: Planned) -> tuple[Profile, dict[str, dict[str, Any]]]:
    """What a bill is made from: the settings, and every notebook's parameters with their defaults."""
    own = {}
    for book in plan.books:
        defaults = {name: value for name, (_, value) in declared(book).items()}
        own[book.stem] = {**defaults, **plan.values[book]}
    return plan.settings, own


def notebooks() -> list[Path]:
    """Every notebook of the checkout."""
    return sorted((checkout() / "notebooks").glob("*.ipynb"))
