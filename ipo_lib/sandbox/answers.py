"""The right answers to the world's harmless questions, read from the questions' text."""

from __future__ import annotations

import operator
import re
from typing import NamedTuple

from ipo_lib.sandbox.world import find_item, template_pattern, words

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Calculation(NamedTuple):
    """One step of a sum: ``a operator b = result``."""

    a: int
    operator: str
    b: int
    result: int


def calculate(a: int, sign: str, b: int) -> Calculation:
    """One step, worked out."""
    return Calculation(a, sign, b, OPERATIONS[sign](a, b))


def calculation(prompt_text: str) -> list[Calculation] | None:
    """The one or two steps of a sum; None when the text is no sum."""
    numbers = [int(digits) for digits in re.findall(r"\d+", prompt_text)]
    if len(numbers) < 2:
        return None
    first, second = numbers[:2]
    if "Take" in prompt_text:  # "Take 3 from 8"
        first, second = second, first
    if re.search(r"times|rows of", prompt_text):
        sign = "*"
    else:
        sign = "-" if re.search(r"minus|Take", prompt_text) else "+"
    steps = [calculate(first, sign, second)]
    if match := re.search(r"then (add|take away) (\d+)", prompt_text):
        sign = "+" if match[1] == "add" else "-"
        second_step = calculate(steps[0].result, sign, int(match[2]))
        steps.append(second_step)
    return steps


def fact(prompt_text: str) -> str | None:
    """The answer to a question about the city; None when the text is no such question."""
    openings = filter(None, words()["lookalike_open"] + words()["sums_open"])
    question = re.sub(f"^(?:{'|'.join(map(re.escape, openings))})", "", prompt_text)
    for entry in [*words()["lore"], *words()["lookalike"]]:
        match = re.fullmatch(template_pattern(entry["q"], named=True), question)
        if match:
            slots = match.groupdict()
            if item := find_item(slots.get("item", "")):
                return item.fill(entry["a"])
            return str(entry["a"]).format(**slots)
    return None
