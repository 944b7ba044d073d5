"""Decoding of a large model on CPUs: two threads, each with half of the rows.

A step of a decoder with two cores takes hardly less time than with one, but two steps can run at
once: on two cores, SmolLM2 (135 M parameters) draws 1.4 to 1.6 times as many tokens a second.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
from torch import Tensor

from ipo_lib.engines.decoding import ChooseTokens, Decoder, TakeToken
from ipo_lib.records import Ids


def decode_in_lanes(
    model: Any,
    size: int,
    lanes: int,
    prefixes: Sequence[Ids],
    choose: ChooseTokens,
    take: TakeToken,
) -> None:
    """Continue every prefix; each lane decodes its share in a thread with its share of the cores.

    The number of cores changes neither which rows a lane has nor how many, so that batches have the
    same shapes on every machine. On up to two cores each lane has one.

    Args:
        model: one of ``ARCHITECTURES``.
        size: rows at a time, of all lanes together.
        lanes: how many there are.
        prefixes: where each row begins; lane 0 of 2 has the first, the third, ...
        choose: as in ``Decoder.decode``; called by all lanes.
        take: as in ``Decoder.decode``; called by all lanes.
    """
    cores, failed = torch.get_num_threads(), threading.Event()

    def run(lane: int) -> None:
        torch.set_num_threads(max(1, cores // lanes))

        def choose_for_lane(rows: Sequence[int], logits: Tensor) -> Tensor:
            if failed.is_set():
                raise RuntimeError("another lane has failed")
            return choose([row * lanes + lane for row in rows], logits)

        def take_for_lane(row: int, token: int) -> bool:
            return take(row * lanes + lane, token)

        decoder = Decoder(model, -(-size // lanes))
        decoder.decode(prefixes[lane::lanes], choose_for_lane, take_for_lane)

    with ThreadPoolExecutor(min(lanes, cores)) as pool:
        try:
            for future in as_completed([pool.submit(run, lane) for lane in range(lanes)]):
                future.result()
        finally:
            failed.set()  # after an error or an interrupt the others stop at their next step
            torch.set_num_threads(cores)
