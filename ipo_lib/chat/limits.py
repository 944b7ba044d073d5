"""A bound on the time of somebody else's code, such as a chat template."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises, if it ends in time.

    Raises:
        TimeoutError: it does not. It goes on in its thread until the process ends.
    """
    ended: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            ended.append((call(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError
    result, error = ended[0]
    if error:
        raise error
    return result
