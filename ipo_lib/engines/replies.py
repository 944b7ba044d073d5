"""What a chat model answered, whichever server it is behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CUT_OFF = ("length", "max_tokens", "model_length", "content_filter", "safety")


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: what the model wrote after its reasoning; "": nothing.
        missing: why there is no whole text; "": there is.
        usage: the server's count of tokens, as it came; None: it tells none.
    """

    text: str
    missing: str
    usage: Any


def read_reply(response: Any) -> Reply:
    """Read an answer of the chat route. Servers fill or leave out most fields as they like."""
    usage = getattr(response, "usage", None)
    choices = getattr(response, "choices", None)
    if not choices:
        return Reply("", "empty", usage)
    message = getattr(choices[0], "message", None)
    finish = str(getattr(choices[0], "finish_reason", None) or "").casefold()
    text = _text(getattr(message, "content", None))
    refusal = _text(getattr(message, "refusal", None))
    if finish in CUT_OFF:
        return Reply(text, f"cut off ({finish})", usage)
    if not text:
        return Reply("", f"declined: {refusal}" if refusal else "empty", usage)
    return Reply(text, "", usage)


def _text(content: Any) -> str:
    """Text that comes as a string or as a list of parts."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content if isinstance(content, list) else []:
        text = part.get("text") if isinstance(part, Mapping) else getattr(part, "text", None)
        if isinstance(text, str):
            parts.append(text)
    return "".join(parts)
