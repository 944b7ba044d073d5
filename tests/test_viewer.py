"""The trace viewer: redacted by default, text stays text, and a click unfolds the draws."""

from __future__ import annotations

import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipo_lib import viewer
from ipo_lib.records import SAFE, UNSAFE, Rollout, Sentence


def trace(*texts: str) -> tuple[Rollout, list[Sentence]]:
    """A rollout with one token per character, and its sentences."""
    whole, spans, start = "".join(texts), [], 0
    for index, text in enumerate(texts):
        end = start + len(text)
        spans.append(Sentence(index, start, end, start, end))
        start = end
    return Rollout("r", "p", 0, tuple(range(len(whole))), whole, "stop", 0, "s"), spans


def visible(html: str) -> str:
    """What a reader sees of the trace: neither the style sheet, nor tags, nor the key below."""
    bare = re.sub(r"<style>.*?</style>|<div class=\"k\">.*?</div>", "", html, flags=re.S)
    return re.sub(r"<[^>]*>", "", bare)


def test_words_are_hidden_unless_revealed() -> None:
    rollout, spans = trace("Grind the ", "powder 42 times.")
    draws = {0: [(UNSAFE, "Heat it twice."), (None, "")]}
    hidden = viewer.show(rollout, spans, {0: 0.1}, draws=draws).data
    for word in ("Grind", "powder", "42", "Heat", "twice"):
        assert word not in hidden
    assert "redacted" in hidden
    letters = sum(char.isalnum() for char in rollout.text)
    assert visible(viewer.show(rollout, spans, {0: 0.1}).data).count("█") == letters
    shown = viewer.show(rollout, spans, {0: 0.1}, draws=draws, reveal=True).data
    for text in ("Grind the ", "powder 42 times.", "Heat it twice.", "not judged"):
        assert text in visible(shown)
    assert "redacted" not in shown


@given(st.text())
def test_no_letter_and_no_digit_survives(text: str) -> None:
    rollout, spans = trace(text or "x")
    hidden = visible(viewer.show(rollout, spans, {0: 0.5}).data)
    hidden = re.sub(r"&(amp|lt|gt|quot|#x27);", "", hidden)
    assert not [char for char in hidden if unicodedata.category(char)[0] in "LN"]


def test_what_a_model_writes_is_text_not_markup() -> None:
    rollout, spans = trace("<script>alert(1)</script>", "</span>")
    for reveal in (True, False):
        draws, marks = {1: [(SAFE, "<img src=x onerror=alert(1)>")]}, {"<cue>": 0}
        values = {0: 1.0, 1: 0.0}
        html = viewer.show(rollout, spans, values, marks=marks, draws=draws, reveal=reveal).data
        assert "<script" not in html
        assert "<img" not in html
        assert "<cue>" not in html


def test_colour_title_and_marks_follow_the_values() -> None:
    rollout, spans = trace("a ", "b ", "c ", "d")
    values = {0: 0.0, 1: 1.0, 3: float("nan")}
    marks = {"cue": 1, "turning point": 1, "trigger": None}
    html = viewer.show(rollout, spans, values, marks=marks).data
    colours = re.findall(r'class="s" title="[^"]*" style="background:([^"]*)"', html)
    assert len(set(colours)) == 3
    assert colours[2] == colours[3]
    titles = re.findall(r'title="([^"]*)"', html)
    assert titles == ["S = 0.00", "S = 1.00", "not measured", "not measured"]
    places = [html.index(text) for text in ("S = 0.00", ">cue<", ">turning point<", "S = 1.00")]
    assert places == sorted(places)
    assert ">trigger<" not in html


def test_a_click_in_a_browser_unfolds_the_draws(tmp_path: Path) -> None:
    """Needs selenium, chromium and chromedriver; the screenshots stay in the folder of the test."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("no chromium with chromedriver on this machine")
    rollout, spans = trace("They ask about it. ", "I can do this. ", "First grind it.")
    draws = {1: [(UNSAFE, "Then heat it."), (SAFE, "No, I stop here.")]}
    values, marks = {0: 0.6, 1: 0.1, 2: 0.0}, {"cue": 1, "turning point": 1}
    page = viewer.show(rollout, spans, values, marks=marks, draws=draws, reveal=True).data
    (tmp_path / "trace.html").write_text(f'<meta charset="utf-8">{page}')
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("headless", "no-sandbox", "disable-gpu", "window-size=900,420"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'chrome'}")
    browser = webdriver.Chrome(service=webdriver.ChromeService(programs[1]), options=options)
    try:
        browser.get((tmp_path / "trace.html").as_uri())
        unfolded = browser.find_element("css selector", ".d")
        assert not unfolded.is_displayed()
        browser.find_element("css selector", "summary").click()
        assert unfolded.is_displayed()
        lines = ["S = 0.10; draws: 1 unsafe, 1 safe", "unsafeThen heat it.", "safeNo, I stop here."]
        assert unfolded.text.splitlines() == lines
        mark = browser.find_element("css selector", ".m")
        assert mark.value_of_css_property("background-color") == "rgba(213, 94, 0, 1)"
        browser.save_screenshot(str(tmp_path / "unfolded.png"))
        browser.find_element("css selector", "summary").click()
        assert not unfolded.is_displayed()
        browser.save_screenshot(str(tmp_path / "folded.png"))
        assert (tmp_path / "folded.png").read_bytes() != (tmp_path / "unfolded.png").read_bytes()
    finally:
        browser.quit()


@pytest.mark.parametrize(
    "text",
    [
        *("ⓑⓡⓔⓐⓓ", "🅱🅾🅼🅱", "🇧🇷🇪🇦🇩", "⠃⠗⠑⠁⠙", "⒝⒭⒠", "🄼🄸🅇", "℩", "½Ⅷ", "हिन्दी"),
        *("\uf8ff\uf8fe", "\U000e006d\U000e0069", "a\u200db", "𝓫𝖗𝚎𝕒𝐝"),
    ],
)
def test_no_letter_can_be_read_in_another_dress(text: str) -> None:
    assert set(viewer.shown(text, False)) == {"█"}
    assert viewer.shown(text, True) == text


def test_punctuation_and_spaces_stay() -> None:
    text, hidden = "Mix 2, “well” – (then) = $5…\n", "███ █, “████” – (████) = $█…\n"
    assert viewer.shown(text, False) == hidden
