"""The page of ``ipo view``: one HTML file, with the traces as JSON and a script that shows them.

1. The file holds everything: it opens without a server, and its policy forbids any network.
2. Words are blacked out here, before they reach the file, unless the profile's text is harmless.
3. The script (``page.js``) writes text as text, so what a model wrote is never markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipo_lib.cli.explorer.stored import Continuation, StoredTrace
from ipo_lib.csr import curve_rows
from ipo_lib.plots import SAFE_COLOUR, UNSAFE_COLOUR
from ipo_lib.profiles.settings import Profile
from ipo_lib.viewer import shown

HERE = Path(__file__).parent
Json = dict[str, Any]


def write_page(path: Path, profile: Profile, traces: Sequence[StoredTrace]) -> None:
    """Write the page of some traces; one that would not change is left as it is.

    Args:
        path: of the HTML file. Its folder is made.
        profile: says whether the words may be read.
        traces: in the order in which they are listed.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string((HERE / "page.html.jinja").read_text("utf-8"))
    table = TextTable(profile.reveal)
    content = trace_data(traces, table)
    text = template.render(
        profile=profile,
        style=(HERE / "page.css").read_text("utf-8"),
        script=(HERE / "page.js").read_text("utf-8"),
        data=script_safe({**content, "texts": table.texts, "reveal": profile.reveal}),
        safe=SAFE_COLOUR,
        unsafe=UNSAFE_COLOUR,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text("utf-8") != text:
        path.write_text(text, encoding="utf-8")


class TextTable:
    """Every text once, by number: equal sentences have equal numbers, redacted or not.

    Args:
        reveal: keep the words; else every letter and digit is blacked out.
    """

    def __init__(self, reveal: bool) -> None:
        self.reveal = reveal
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a text, which is added if it is new."""
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(shown(text, self.reveal))
        return self._numbers[text]


def trace_data(traces: Sequence[StoredTrace], table: TextTable) -> Json:
    """What the script reads: the prompts by id, and the traces in order.

    Args:
        traces: what is shown.
        table: takes the texts; a text is named by its number.
    """
    prompts = {}
    for trace in traces:
        prompt = trace.prompt
        prompts[prompt.id] = {
            "text": table.number(prompt.text),
            "set": prompt.source,
            "category": prompt.category,
        }
    return {"prompts": prompts, "traces": [_trace(trace, table) for trace in traces]}


def _trace(trace: StoredTrace, table: TextTable) -> Json:
    """One trace."""
    rows = {row["cut"]: row for row in curve_rows(trace.points)}
    start = {"text": table.number(""), "s": _csr(rows.get(0)), "draws": _draws(trace, 0, table)}
    sentences = [start]
    for sentence in trace.sentences:
        end = sentence.token_end
        sentences.append(
            {
                "text": table.number(trace.text_of(sentence).strip()),
                "s": _csr(rows.get(end)),
                "draws": _draws(trace, end, table),
            }
        )
    return {
        "id": trace.rollout.id,
        "prompt": trace.prompt.id,
        "kind": trace.kind,
        "draw": trace.rollout.draw,
        "label": trace.label,
        "second": trace.second_label,
        "sentences": sentences,
        "answer": table.number(trace.answer),
        "cue": trace.cue,
        "turn": trace.turn,
        "origin": trace.origin,
        "changed": trace.changed,
    }


def _csr(row: dict[str, float] | None) -> list[float] | None:
    """S with its interval, and the counts behind it."""
    if not row or not row["n"]:
        return None
    return [int(row["n_safe"]), int(row["n"]), round(row["low"], 2), round(row["high"], 2)]


def _draws(trace: StoredTrace, cut: int, table: TextTable) -> list[list[Any]]:
    """The continuations after a cut, the unsafe ones first."""
    drawn: Sequence[Continuation] = trace.continuations.get(cut, ())
    ordered = sorted(drawn, key=lambda one: (one[0] != "unsafe", one[0] != "safe"))
    return [[label, table.number(text.strip())] for label, text in ordered]


def script_safe(content: Json) -> str:
    """JSON that may stand inside a script element: no text in it can end the element."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
