"""Try things on a trace in a notebook: draw again from a sentence, or put another one there.

``explore`` shows buttons where somebody can press them. A notebook that ``ipo reproduce`` runs has
nobody in front of it, and shows the trace as text instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ipo_lib import viewer
from ipo_lib.experiments.asking import closed_sentence
from ipo_lib.profiles.run import Run
from ipo_lib.records import BadInput, Rollout
from ipo_lib.stages import (
    JudgedRollouts,
    Prefix,
    Replacement,
    count_label,
    intervene,
    judge,
    sample,
    trace_sentences,
    trace_texts,
)
from ipo_lib.stats import format_interval, wilson

STATIC = "IPO_STATIC"  # environment variable: nobody is in front of the notebook
ASKED = 200_000  # number of the first draw that is asked for: no measurement has used it


def explore(
    run: Run, judged: JudgedRollouts, rollout: Rollout | None = None, draws: int = 8
) -> Any:
    """Buttons to try things on a trace, as an object that a notebook displays.

    Args:
        run: the profile with its model and judge.
        judged: judged traces; one of them is chosen on the page.
        rollout: the one to begin with; None: the first.
        draws: continuations at each press of a button. A second press adds as many.
    """
    if not judged.rollouts:
        raise BadInput("explore: no traces; sample some first")
    explorer = TraceExplorer(run, judged, draws)
    explorer.rollout = rollout or judged.rollouts[0]
    if os.environ.get(STATIC):
        return viewer.show(explorer.rollout, explorer.sentences, {}, reveal=run.profile.reveal)
    return explorer.widget()


class TraceExplorer:
    """A chosen trace and sentence, and what was drawn from there.

    Args:
        run: the profile with its model and judge.
        judged: judged traces.
        draws: continuations at each call.

    Attributes:
        rollout: the chosen trace.
        sentence: index of the chosen sentence.
    """

    def __init__(self, run: Run, judged: JudgedRollouts, draws: int) -> None:
        self.run = run
        self.judged = judged
        self.draws = draws
        self.rollout: Rollout = judged.rollouts[0]
        self.sentence = 0
        self._asked: dict[tuple[str, int, str | None], int] = {}  # draws so far

    @property
    def sentences(self) -> Any:
        """The sentences of the chosen trace."""
        return trace_sentences(self.run.session, self.rollout)

    def draw_again(self) -> str:
        """Continue after the chosen sentence; the outcome as HTML."""
        end = self.sentences[self.sentence].token_end
        prefix = Prefix(self.judged.prompts[self.rollout.prompt_id], self.rollout.token_ids[:end])
        total = self._count(None)
        session, thinking = self.run.session, self.run.thinking
        drawn = sample(session, [prefix], thinking, total, first=ASKED, stage="continuations")
        return self._outcome(f"drawn again after sentence {self.sentence + 1}", drawn)

    def put(self, text: str) -> str:
        """Put a text in the place of the chosen sentence and continue; the outcome as HTML."""
        text = closed_sentence(text)
        replacement = Replacement(self.rollout, self.sentence, "own", text)
        total = self._count(text)
        session, prompts = self.run.session, self.judged.prompts
        results = intervene(session, prompts, [replacement], self.run.thinking, total)
        shown = viewer.shown(text, self.run.profile.reveal)
        title = f"in the place of sentence {self.sentence + 1}: "
        title += f"“{shown}”" if shown else "nothing, so the model sampled again"
        return self._outcome(title, [result for _, result in results])

    def widget(self) -> Any:
        """The buttons."""
        import ipywidgets as widgets

        wide, auto = {"width": "55em"}, {"width": "auto"}
        traces = [(self._name(rollout), rollout) for rollout in self.judged.rollouts]
        trace = widgets.Dropdown(
            options=traces, value=self.rollout, description="trace", layout=wide
        )
        sentence = widgets.Dropdown(description="sentence", layout=wide)
        text = widgets.Text(description="your text", layout=wide)
        again = widgets.Button(description="draw again from here", layout=auto)
        put = widgets.Button(description="put your text here", layout=auto)
        page = widgets.HTML()

        def choose_trace(_: Any = None) -> None:
            self.rollout = trace.value
            sentence.options = self._sentence_options()
            sentence.index = self.sentence = 0
            page.value = ""

        def choose_sentence(change: Any) -> None:
            self.sentence = change["new"] or 0

        trace.observe(choose_trace, "value")
        sentence.observe(choose_sentence, "value")
        again.on_click(lambda _: setattr(page, "value", self.draw_again()))
        put.on_click(lambda _: setattr(page, "value", self.put(text.value)))
        choose_trace()
        return widgets.VBox([trace, sentence, text, widgets.HBox([again, put]), page])

    def _name(self, rollout: Rollout) -> str:
        """A trace in one line: its number, label and prompt."""
        number = self.judged.rollouts.index(rollout) + 1
        label = self.judged.labels[rollout.id] or viewer.NOT_JUDGED
        prompt = self.judged.prompts[rollout.prompt_id].text
        return f"{number}, {label}: {viewer.shown(prompt, self.run.profile.reveal)}"

    def _sentence_options(self) -> Sequence[tuple[str, int]]:
        """The chosen trace's sentences, numbered from 1."""
        reveal = self.run.profile.reveal
        texts = trace_texts(self.run.session, self.rollout)
        return [
            (f"{number + 1}: {viewer.shown(text.strip(), reveal)}", number)
            for number, text in enumerate(texts)
        ]

    def _count(self, text: str | None) -> int:
        """How many draws there are after this call; None: without another text."""
        place = (self.rollout.id, self.sentence, text)
        self._asked[place] = self._asked.get(place, 0) + self.draws
        return self._asked[place]

    def _outcome(self, title: str, rollouts: Sequence[Rollout]) -> str:
        """The share of safe ends, and each continuation, as HTML."""
        verdicts = judge(self.run.session, self.judged.prompts, rollouts)
        safe = format_interval(wilson(*count_label(verdicts, "safe")))
        decode = self.run.session.chat.decode
        drawn = [
            (verdict.label, decode(rollout.token_ids[rollout.prefix_len :]))
            for rollout, verdict in zip(rollouts, verdicts, strict=True)
        ]
        return viewer.outcome_html(f"{title}; end safe: {safe}", drawn, self.run.profile.reveal)
