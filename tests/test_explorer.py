"""The page of ``ipo view``: it shows what the store holds, hides words, and each control works."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import CUE, PROMPTS, STEP, TRIGGER, StepJudge, session, world

from ipo_lib import prompts as prompt_sets
from ipo_lib.chat import Chat
from ipo_lib.cli.explorer.page import TextTable, script_safe, trace_data, write_page
from ipo_lib.cli.explorer.stored import StoredTrace, find_origin, read_traces
from ipo_lib.csr import CsrSettings
from ipo_lib.judges import people
from ipo_lib.profiles.reading import read_profile
from ipo_lib.profiles.run import Run
from ipo_lib.records import SAFE, UNSAFE, BadInput, Prompt, Rollout, Sentence
from ipo_lib.stages import Replacement, find_cues, intervene, measure_csr, sample_and_judge
from ipo_lib.store import Store

CSR = CsrSettings(draws=12)
HOSTILE = (
    "</script><script>document.title='stolen'</script><img src=x onerror=\"document.title=1\">"
)


@pytest.fixture
def run(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run in the scripted world, with nothing in its store."""
    profile = replace(read_profile("tiny", {"csr.draws": CSR.draws}), detector=None)
    monkeypatch.setattr(prompt_sets, "load_prompts", lambda *_: PROMPTS)
    monkeypatch.setattr("ipo_lib.profiles.run.load_prompts", lambda *_: PROMPTS)
    return Run(profile, session(tmp_path / "store", chat, world(chat)), tmp_path, tmp_path)


def fill(run: Run) -> tuple[Rollout, Rollout]:
    """Draw traces, measure one, replace its cue; the measured trace and the result."""
    judged = sample_and_judge(run.session, PROMPTS, run.thinking, 4)
    detector = run.detector(judged.rollouts, judged.verdicts)
    cues = find_cues(run.session, judged.prompts, judged.rollouts, detector)
    unsafe = next(rollout for rollout in judged.labelled(UNSAFE) if CUE in rollout.text)
    measure_csr(run.session, judged.prompts, [unsafe], CSR, run.thinking)
    place = cues[unsafe.id]
    assert place is not None
    change = [Replacement(unsafe, place, "t", TRIGGER)]
    ((_, result),) = intervene(run.session, judged.prompts, change, run.thinking)
    return unsafe, result


def test_a_page_needs_a_store_that_holds_traces(run: Run) -> None:
    with pytest.raises(BadInput, match="holds no trace of profile 'tiny'; run ipo reproduce tiny"):
        read_traces(run)


def test_traces_come_with_all_that_the_store_holds_and_nothing_is_drawn(run: Run) -> None:
    unsafe, result = fill(run)
    asked = len(run.session.sampler.answered)  # type: ignore[attr-defined]
    traces = read_traces(run, ["direct"])
    assert len(run.session.sampler.answered) == asked  # type: ignore[attr-defined]
    assert [trace.kind for trace in traces] == ["sampled"] * 32 + ["intervened"]
    first = traces[0]  # what was measured comes first
    assert (first.rollout.id, first.label) == (unsafe.id, UNSAFE)
    assert [point.cut for point in first.points] == [
        0,
        *(sentence.token_end for sentence in first.sentences),
    ]
    assert {point.n for point in first.points} == {CSR.draws}
    assert all(len(drawn) == CSR.draws for drawn in first.continuations.values())
    for point in first.points:
        found = [label for label, _ in first.continuations[point.cut]]
        assert (found.count(SAFE), found.count(UNSAFE)) == (point.n_safe, point.n_unsafe)
    assert first.cue is not None
    assert first.text_of(first.sentences[first.cue]).strip() == CUE
    assert first.turn == first.cue  # in this world a cue decides
    last = traces[-1]
    assert (last.rollout.id, last.origin, last.changed) == (result.id, unsafe.id, first.cue)
    assert not last.points
    assert {trace.second_label for trace in traces} == {None}  # the second judge said nothing yet


def test_traces_of_prompts_of_ones_own_come_first(run: Run) -> None:
    fill(run)
    with pytest.raises(BadInput, match="a prompt is ' '"):
        read_traces(run, own=[" "])
    assert len(read_traces(run, own=["Mine?"])) == 33  # it was never asked
    run.ask("Mine?", 3)
    traces = read_traces(run, own=["Mine?"])
    assert [trace.prompt.text for trace in traces[:4]] == [*["Mine?"] * 3, traces[3].prompt.text]
    assert len(traces) == 36


def test_a_limit_is_for_each_kind_and_keeps_what_is_compared(run: Run) -> None:
    unsafe, result = fill(run)
    assert [trace.rollout.id for trace in read_traces(run, limit=1)] == [unsafe.id, result.id]


def test_an_origin_is_a_trace_that_begins_so_and_has_another_sentence_there() -> None:
    def trace(id_: str, ids: tuple[int, ...], label: str, given: int = 0) -> StoredTrace:
        spans = [Sentence(at, 0, 0, 2 * at, 2 * at + 2) for at in range(len(ids) // 2)]
        rollout = Rollout(id_, "p", given, ids, "", "stop", 0, "s")
        return StoredTrace(rollout, PROMPTS[0], "sampled", spans, label, None, "")

    traces = [trace("a", (1, 2, 3, 4), SAFE), trace("b", (1, 2, 5, 6), UNSAFE)]
    for given, origin in (
        ((1, 2, 3, 4), ("b", 1)),  # what was put there is what the safe one says by itself
        ((1, 2, 5, 6), ("a", 1)),
        ((1, 2, 9, 9), ("b", 1)),  # both begin so
        ((9, 9), ("b", 0)),
        ((), ("b", 0)),  # nothing was put in the place of the first sentence
        ((1, 2, 9, 9, 8, 8), ("", None)),
    ):
        result = trace("r", (*given, 7, 7), SAFE, len(given))
        assert find_origin(result, traces) == origin, given
    (alone,) = traces[1:]
    assert find_origin(trace("r", (1, 2, 5, 6, 7, 7), SAFE, 4), [alone]) == ("b", 2)


def made_up(count: int = 3, draws: int = 20) -> list[StoredTrace]:
    """Traces with S and continuations, the first of them hostile; the second is made of it."""
    from ipo_lib.records import CsrPoint

    traces = []
    for number in range(count):
        texts = [
            HOSTILE if number == 0 else f"Sentence {number}. ",
            "I can do this. ",
            "So grind. ",
        ]
        if number == 1:
            texts[0] = HOSTILE
        ends = [0]
        for text in texts:
            ends.append(ends[-1] + len(text))
        spans = [
            Sentence(at, ends[at], ends[at + 1], ends[at], ends[at + 1]) for at in range(len(texts))
        ]
        whole = "".join(texts)
        rollout = Rollout(
            f"r{number}", f"p{number // 2}", 0, (1,) * len(whole), whole, "stop", 0, "s"
        )
        prompt = Prompt(
            f"p{number // 2}", f"Prompt {number // 2} {HOSTILE}?", "mine", True, "kites"
        )
        points = [CsrPoint(rollout.id, cut, draws // 4, draws - draws // 4, 0) for cut in ends]
        texts_drawn = [
            (SAFE if at < draws // 4 else UNSAFE, f"Draw {at} {HOSTILE}") for at in range(draws)
        ]
        label, second = (UNSAFE, SAFE) if number == 0 else (SAFE, SAFE)
        trace = StoredTrace(
            rollout, prompt, "sampled", spans, label, second, f"Answer {HOSTILE}", points,
            {cut: texts_drawn for cut in ends}, cue=1, turn=1,
        )  # fmt: skip
        if number == 1:
            trace = replace(trace, kind="intervened", origin="r0", changed=1)
        traces.append(trace)
    return traces


def test_equal_texts_have_equal_numbers_and_hidden_words_stay_out_of_the_file(
    tmp_path: Path,
) -> None:
    table = TextTable(reveal=False)
    assert [table.number(text) for text in ("one", "two", "one")] == [0, 1, 0]
    assert table.texts == ["███", "███"]
    profile = replace(read_profile("tiny"), reveal=False)
    write_page(tmp_path / "hidden.html", profile, made_up())
    page = (tmp_path / "hidden.html").read_text("utf-8")
    for word in ("grind", "Sentence", "stolen", "Draw 1", "Prompt 0", "Answer"):
        assert word not in page.partition('id="data">')[2].partition("</script>")[0]
    assert "blacked out" in page
    assert re.search(r'<button id="blind"[^>]* disabled', page)
    write_page(tmp_path / "shown.html", replace(profile, reveal=True), made_up())
    assert "grind" in (tmp_path / "shown.html").read_text("utf-8")


def test_the_file_loads_nothing_and_no_text_can_end_its_data(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", read_profile("tiny"), made_up())
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|src=\"|href=\"", page.replace("src=x", ""))
    assert page.count("</script>") == 2  # the data's and the script's own
    assert json.loads(script_safe({"a": HOSTILE + "&"})) == {"a": HOSTILE + "&"}
    before = (tmp_path / "page.html").stat().st_mtime_ns
    write_page(tmp_path / "page.html", read_profile("tiny"), made_up())
    assert (tmp_path / "page.html").stat().st_mtime_ns == before


def test_what_the_script_reads_has_counts_and_intervals() -> None:
    table = TextTable(reveal=True)
    data = trace_data(made_up(), table)
    sentence = data["traces"][0]["sentences"][1]
    assert table.texts[sentence["text"]] == HOSTILE
    assert sentence["s"] == [5, 20, 0.11, 0.47]
    labels = [label for label, _ in sentence["draws"]]
    assert labels == [UNSAFE] * 15 + [SAFE] * 5


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Chromium without a window. Needs selenium, chromium and chromedriver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("headless", "no-sandbox", "disable-gpu", "window-size=1300,900"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'chrome'}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(service=webdriver.ChromeService(programs[1]), options=options)
    yield driver
    driver.quit()


class Page:
    """The page in a browser, by what a reader does."""

    def __init__(self, browser: Any, folder: Path, traces: list[StoredTrace]) -> None:
        self.browser, self.folder = browser, folder
        write_page(folder / "page.html", replace(read_profile("tiny"), reveal=True), traces)
        browser.get((folder / "page.html").as_uri())

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def choose(self, name: str, value: str) -> str:
        self.find(f"#{name} option[value='{value}']").click()
        return str(self.find("#count").text)

    def press(self, keys: str) -> None:
        self.find("body").send_keys(keys)

    def saved(self, name: str) -> str:
        """A file that the page saved, once it is whole."""
        for _ in range(100):
            if (self.folder / name).is_file():
                return (self.folder / name).read_text("utf-8")
            time.sleep(0.05)
        raise AssertionError(f"{name} was not saved")


def test_in_a_browser_filters_links_and_keys(browser: Any, tmp_path: Path) -> None:
    page = Page(browser, tmp_path, made_up())
    assert page.find("#count").text == "3 of 3 traces"
    assert page.choose("label", "unsafe") == "1 of 3 traces"
    page.choose("label", "")
    assert page.choose("kind", "intervened") == "1 of 3 traces"
    page.choose("kind", "")
    assert page.choose("set", "mine") == "3 of 3 traces"
    assert page.choose("category", "kites") == "3 of 3 traces"
    page.find("#disagree").click()
    assert page.find("#count").text == "1 of 3 traces"
    page.find("#disagree").click()
    page.find("#measured").click()
    assert page.find("#count").text == "3 of 3 traces"
    page.find("#words").send_keys("prompt 1")
    assert page.find("#count").text == "1 of 3 traces"
    page.find("#words").clear()
    page.find("#words").send_keys(" ")
    assert page.find("#count").text == "3 of 3 traces"
    page.find("[data-id=r0]").click()
    assert browser.current_url.endswith("#trace=r0")
    page.press("jj")
    assert browser.current_url.endswith("#trace=r2")
    page.press("knnn")
    assert browser.current_url.endswith("#trace=r1&sentence=2")
    page.press("p")
    assert browser.current_url.endswith("#trace=r1&sentence=1")
    page.press("\ue007")  # Enter
    assert page.find(".draws").text.startswith("20 continuations: 15 unsafe, 5 safe")
    assert "page 1 of 3" in page.find(".draws").text
    page.press("]")
    assert "page 2 of 3" in page.find(".draws").text
    page.press("[")
    assert "page 1 of 3" in page.find(".draws").text
    page.find(".next").click()
    page.find(".next").click()
    assert "page 3 of 3" in page.find(".draws").text
    assert not page.find(".next").is_enabled()
    page.find(".previous").click()
    page.press("b")
    assert browser.current_url.endswith("&beside=r0")
    browser.get((tmp_path / "page.html").as_uri() + "#trace=r2&sentence=3")
    browser.refresh()
    assert page.find(".sentence.current").text.endswith("So grind.")
    assert not page.find("#keys").is_displayed()
    page.find("#help").click()
    assert page.find("#keys").is_displayed()
    assert browser.get_log("browser") == []


def test_in_a_browser_two_traces_stand_aligned_and_text_is_text(
    browser: Any, tmp_path: Path
) -> None:
    page = Page(browser, tmp_path, made_up())
    page.find("[data-id=r0]").click()
    page.choose("beside", "r1")
    rows = {box.rect["y"] for box in page.all(".sentence[data-sentence='1']")}
    assert len(rows) == 1  # the hostile sentence is in both
    marks = [mark.text for mark in page.all(".sentence .mark")]
    assert marks.count("detector's cue") == marks.count("S turns here") == 2
    assert {"replaced", "put here"} <= set(marks)
    page.find(".sentence[data-sentence='1']").click()
    shown = page.find("#trace").text
    assert HOSTILE in shown
    assert f"Draw 0 {HOSTILE}" not in shown  # the unsafe ones come first
    assert f"Draw 19 {HOSTILE}" not in shown
    assert f"Draw 5 {HOSTILE}" in shown
    assert page.all("img") == []
    assert browser.title == "Traces of tiny"
    assert browser.get_log("browser") == []
    page.find(".sentence[data-trace=r1][data-sentence='2']").click()  # now that one is the first
    assert browser.current_url.endswith("#trace=r1&sentence=2&beside=r0")


def test_in_a_browser_traces_are_saved_and_labelled(browser: Any, tmp_path: Path) -> None:
    page = Page(browser, tmp_path, made_up())
    page.find("[data-id=r2]").click()
    page.find("#text").click()
    assert "So grind.  [S 0.25, 5 of 20 [0.11, 0.47]]" in page.saved("r2.txt")
    page.find("#json").click()
    (one,) = json.loads(page.saved("r2.json"))
    assert one["sentences"][1]["s"] == {"safe": 5, "n": 20, "low": 0.11, "high": 0.47}
    assert len(one["sentences"][1]["continuations"]) == 20
    page.find("#all").click()
    assert [trace["id"] for trace in json.loads(page.saved("traces.json"))] == ["r0", "r1", "r2"]

    page.find("#blind").click()
    for hint in (".mark", ".number"):
        assert page.all(hint) == []
    page.find("[data-id=r0]").click()
    page.press("us")
    page.press("xk")
    page.find("#labels").click()
    lines = page.saved("labels.jsonl").splitlines()
    assert [json.loads(line)["rollout"] for line in lines] == ["r0", "r1"]
    judges = {"step": StepJudge()}
    (score,) = people.report(judges, [str(tmp_path / "labels.jsonl")], Store(tmp_path / "s"))
    assert (score.judge, score.n, score.sensitivity.value) == ("step", 2, 0.0)
    assert STEP not in "".join(lines)  # so the judge calls both safe, and misses the unsafe one
    page.find("#blind").click()
    assert page.all(".mark")


def test_own_labels_with_an_unknown_word_are_one_line(tmp_path: Path) -> None:
    line = {"prompt": "p", "response": "r", "label": "fine", "rollout": "r0"}
    (tmp_path / "labels.jsonl").write_text(json.dumps(line))
    with pytest.raises(BadInput, match="answer 1: label 'fine'; give one of safe, unsafe"):
        people.load(str(tmp_path / "labels.jsonl"))
