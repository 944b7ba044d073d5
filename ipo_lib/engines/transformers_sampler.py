"""TODO: what ipo_lib.engines.transformers_sampler is."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ipo_lib.chat import CLOSE, OPEN, Chat, parsed
from ipo_lib.engines import memory, scoring
from ipo_lib.engines.lora import NF4, quiet
from ipo_lib.engines.nucleus import nucleus_draw, nucleus_mass
from ipo_lib.engines.progress import Meter
from ipo_lib.records import BadInput, Ids, digest

if TYPE_CHECKING:
    from torch import Tensor
from ipo_lib.sampling import Completion, Request, Sampling, fitting

WINDOW = 1024  # requests sorted by length at a time; a constant, so that the order of results is no matter of speed
PATIENCE = 0.25  # share of a batch's places; when fewer are still going, ``sample_some`` leaves them for the next call
AHEAD = 4  # batches handed to the decoder at a time: places of ended rows are filled from them
SCORED = 256  # positions whose logits are held at once
SMALL = 80_000_000  # bytes of weights (20 M parameters) under which dtype "auto" is float32: bfloat16 gains nothing
DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINE = ("torch", "transformers", "peft")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
LOCAL = {
    "_name_or_path",
    "base_model_name_or_path",
    "transformers_version",
}  # vary by machine, change no draw
_HASHES: dict[tuple[str, int, int], str] = {}


class TransformersSampler:
    """A model in this process; of generation_config.json only EOS counts.

    A LoRA ``adapter`` stays apart from 16-bit weights, as in training: merging rounds most of a small
    update away. In float32 it is merged, which changes nothing but the speed. ``quantize`` "nf4": the
    weights are rounded to NF4 as in QLoRA, then held in ``dtype`` again, where they are as fast as any.
    """

    def __init__(
        self,
        folder: Path | str,
        chat: Chat,
        *,
        adapter: Path | str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        batch_size: int = 64,
    ) -> None:
        self.chat, self.device, self.quantize, self.batch_size = chat, device, quantize, batch_size
        self._left: dict[int, Row] = {}  # draws that wait to go on, by their seed
        self._model_files = _files(folder, "config.json", "model*.safetensors")
        self._adapter_files = _files(adapter, *ADAPTER) if adapter else []
        if batch_size < 1 or dtype not in DTYPES:
            raise BadInput(
                f"batch_size {batch_size!r}, dtype {dtype!r}: give 1 or more, one of {', '.join(DTYPES)}"
            )
        if quantize not in (None, "nf4"):
            raise BadInput(f"quantize {quantize!r} is unknown; use nf4, or nothing")
        small = sum(file.stat().st_size for file in self._model_files) < SMALL
        self.dtype = dtype if dtype != "auto" else "float32" if small else "bfloat16"

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of weights, settings and adapter; dtype, engine versions, chat. Reads files only, loads no torch."""
        hashes = {
            "model": [*map(_sha256, self._model_files)],
            "adapter": [*map(_sha256, self._adapter_files)],
        }
        versions = {name: importlib.metadata.version(name).partition("+")[0] for name in ENGINE}
        rounded = {"quantize": self.quantize, **versions} if self.quantize else versions
        if self._adapter_files and self.dtype != "float32":
            rounded = {"lora": "unmerged", **rounded}
        return {
            "engine": "transformers",
            **hashes,
            "dtype": self.dtype,
            **rounded,
            "chat": self.chat.fingerprint(),
        }

    @property
    def pauses(self) -> bool:
        """Whether ``sample_some`` leaves stragglers for the next call: on a GPU, where few rows take as long as many."""
        return self.device.startswith("cuda") or (self.device == "auto" and _sees_a_gpu())

    def sample_some(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Most of the requests: the last few that still go on wait for a call that asks for them again.

        They go on there from the token at which they were left, with the uniforms that are theirs, so that a
        draw is the same whether it waited or not (in float32).
        """
        return self._sample(requests, sampling, PATIENCE)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Longest prompt first in each WINDOW, whatever the batch size; BadInput if a prompt fills the context."""
        return self._sample(requests, sampling, 0.0)

    def _sample(
        self, requests: Sequence[Request], sampling: Sampling, patience: float
    ) -> Iterator[Completion]:
        context = parsed(self._model_files[0]).get("max_position_embeddings", math.inf)
        lengths = fitting(requests, context)
        groups = [(place // WINDOW, one.prompt_ids) for place, one in enumerate(requests)]
        longest: dict[Any, int] = {}
        for group, length in zip(groups, lengths, strict=True):
            longest[group] = max(longest.get(group, 0), length)
        # Requests of one prompt stay together, since they may share prefixes.
        order = sorted(
            range(len(requests)),
            key=lambda at: (groups[at][0], -longest[groups[at]], groups[at][1], -lengths[at]),
        )
        meter = Meter(len(order), "drawing")
        for first in range(0, len(order), AHEAD * self.batch_size):
            places = order[first : first + AHEAD * self.batch_size]
            limits = [int(min(sampling.max_tokens, context - lengths[place])) for place in places]
            yield from self._decode(
                [requests[place] for place in places], limits, sampling, meter, patience
            )

    def _decode(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        sampling: Sampling,
        meter: Meter,
        patience: float,
    ) -> Iterator[Completion]:
        from ipo_lib.engines.decoding import ARCHITECTURES, Decoder, generate

        rows = []
        for request, limit in zip(requests, limits, strict=True):
            left = self._left.pop(request.seed, None)
            rows.append(left or Row(request, limit, sampling, self.chat))
        prefixes = [(*row.request.prompt_ids, *row.taken) for row in rows]

        def draw(live: Sequence[int], logits: Tensor) -> Tensor:
            drawn = draw_freely(live, logits)
            for place, one in enumerate(live):
                if (token := rows[one].due) is not None:
                    drawn[place] = token
            return drawn

        def draw_freely(live: Sequence[int], logits: Tensor) -> Tensor:
            bars = [rows[one].barred for one in live]
            barred = logits.new_tensor(bars, dtype=_float64()).long() if max(bars) >= 0 else None
            if not sampling.temperature:
                if barred is not None:
                    logits[barred >= 0, barred[barred >= 0]] = -math.inf
                return logits.argmax(-1)
            uniforms = logits.new_tensor([rows[one].uniform for one in live], dtype=_float64())
            return nucleus_draw(
                logits, uniforms, sampling.temperature, sampling.top_p, barred=barred
            )

        def take(one: int, token: int) -> bool:
            if ended := rows[one].take(token):
                meter.step()
            return ended

        if self._model.config.model_type in ARCHITECTURES:
            Decoder(self._model, self.batch_size).decode(prefixes, draw, take, patience)
        else:
            for at in range(0, len(rows), self.batch_size):
                generate(
                    self._model,
                    prefixes[at : at + self.batch_size],
                    at,
                    max(limits) + len(rows[0].tag),
                    draw,
                    take,
                )
        for row in rows:
            if row.finish or not patience:
                yield row.completion()
            else:
                self._left[row.request.seed] = row

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """Teacher-forced; the logits of ``SCORED`` positions at a time. Requests of one prompt that come one after the other and
        are short (a guard's possible answers) share one pass over the prompt; all others have a pass each. In 16 bits a batch of
        another shape may have drawn a token that lies outside the nucleus here: a few such tokens count as its last ones."""
        import torch

        self._model.set_attn_implementation(
            "sdpa"
        )  # the decoder's own wants a mask; it sets itself again
        for rows in scoring.together(
            [(one.prompt_ids, one.prefix_ids) for one in requests], self.batch_size
        ):
            with torch.inference_mode():
                every = scoring.states(self._model, rows[0][0], [text for _, text in rows])
                found = [
                    self._chances(text, states, sampling)
                    for (_, text), states in zip(rows, every, strict=True)
                ]
            yield from found

    def _chances(self, text: Ids, states: Tensor, sampling: Sampling) -> list[float]:
        """The probability of each token of a text, from the states that draw them."""
        found, strays = list[float](), dict[int, float]()
        for at in range(0, len(text), SCORED):
            logits = self._model.get_output_embeddings()(states[at : at + SCORED])
            own = logits.new_tensor(text[at : at + SCORED], dtype=_float64()).long()
            chances = nucleus_mass(logits, own, sampling.temperature, sampling.top_p)
            far = (chances == 0).nonzero()[:, 0]
            edge = nucleus_mass(logits[far], own[far], sampling.temperature, sampling.top_p, 1.0)
            strays |= {
                at + place: chance
                for place, chance in zip(far.tolist(), edge.tolist(), strict=True)
            }
            found += chances.tolist()
        return scoring.forgiven(found, {} if self.dtype == "float32" else strays)

    @functools.cached_property
    def _model(self) -> Any:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        device = (
            self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BadInput(f"device {device!r}: this torch sees no GPU; use device 'auto' or 'cpu'")
        memory.make_room(device, sum(file.stat().st_size for file in self._model_files))
        options: dict[str, Any] = {
            "dtype": getattr(torch, self.dtype),
            "use_safetensors": True,
            "local_files_only": True,
        }
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
            logging.ERROR
        )  # wants an optional kernel
        if self.quantize:
            options |= {
                "quantization_config": NF4 | {"bnb_4bit_compute_dtype": self.dtype},
                "device_map": device,
            }
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            self._model_files[0].parent, **options
        )
        if self.quantize:
            model = model.dequantize(options["dtype"])
        if self._adapter_files:
            model = self._with_adapter(model)
        model.generation_config = type(
            model.generation_config
        )()  # a bare one: generate fills gaps from it
        memory.held(self)
        return model.to(device).eval()

    def release(self) -> None:
        """Let the model go; it is loaded again when something is missing."""
        self.__dict__.pop("_model", None)

    def _with_adapter(self, model: Any) -> Any:
        """``model`` as the adapter changes it: merged in float32, with LoRA layers beside 16-bit weights."""
        import torch
        from peft import PeftModel

        quiet()
        lora: Any = PeftModel.from_pretrained(model, str(self._adapter_files[0].parent))
        if self.dtype == "float32":
            return lora.merge_and_unload()
        # Under training's autocast LoRA is multiplied in 16 bits, too: this is the same function.
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return lora.get_base_model()


class Row:
    """One request as it is drawn: its own uniforms, what was taken and why it ended.

    Where thinking has a budget (``Sampling.think_tokens``) and the trace is still open when it is spent,
    the tokens of ``</think>`` are put next: they are taken like drawn ones, but need no uniform.
    """

    def __init__(self, request: Request, limit: int, sampling: Sampling, chat: Chat) -> None:
        self.request, self.limit, self.until, self.chat, self.finish = (
            request,
            limit,
            sampling.until,
            chat,
            "",
        )
        self.uniforms = np.random.Generator(np.random.PCG64(request.seed)).random(limit)
        self.taken = [*request.prefix_ids]  # a closing tag may straddle the cut
        self.budget, self.put = sampling.think_tokens, list[int]()
        self.forced: int | None = None  # where the closing tag was put
        ending = "\n\n" if self.until == "eos" else ""
        self.tag = chat.encode(f"\n{CLOSE}{ending}") if self.budget else ()
        given = chat.decode(request.prefix_ids) if self.budget else ""
        self.closed = CLOSE in given
        self.thinks = chat.opened or OPEN in given
        self._spend()

    @property
    def drawn(self) -> int:
        """How many tokens were sampled: neither given nor put."""
        put = 0 if self.forced is None else len(self.tag) - len(self.put)
        return len(self.taken) - len(self.request.prefix_ids) - put

    @property
    def uniform(self) -> float:
        """The uniform of the next draw; any number where the next token is put."""
        return float(self.uniforms[min(self.drawn, self.limit - 1)])

    @property
    def due(self) -> int | None:
        """The token that is put next; None: the next one is drawn."""
        return self.put[0] if self.put else None

    @property
    def barred(self) -> int:
        """The id that the next draw must not be; -1: none."""
        first = len(self.taken) == len(self.request.prefix_ids)
        return self.request.ban if first and self.request.ban is not None else -1

    def take(self, token: int) -> bool:
        """Add a drawn or put token; whether the row has ended."""
        if self.put:
            self.put.pop(0)
        elif token in self.chat.eos_ids:
            self.finish = "stop"
            return True
        self.taken.append(token)
        closes = (self.until == "think" or self.budget > 0) and self.chat.closes(
            self.taken[-len(CLOSE) :]
        )
        self.closed |= closes
        if self.put:
            return False
        self._spend()
        full = self.drawn == self.limit and not self.put
        self.finish = "think" if closes and self.until == "think" else "length" if full else ""
        return bool(self.finish)

    def completion(self) -> Completion:
        """What was drawn for the request."""
        ids = tuple(self.taken[len(self.request.prefix_ids) :])
        return Completion(self.request.key, ids, self.finish or "stop", self.forced)

    def _spend(self) -> None:
        """Put the closing tag next, where thinking has used up its budget."""
        if (
            not self.budget
            or self.closed
            or self.forced is not None
            or len(self.taken) < self.budget
        ):
            return
        if self.thinks or OPEN in self.chat.decode(self.taken):
            self.forced, self.put = len(self.taken), [*self.tag]


def adapter_hashes(folder: Path | str) -> list[str]:
    """The hashes of a LoRA adapter's settings and weights."""
    return [*map(_sha256, _files(folder, *ADAPTER))]


def _sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _float64() -> Any:
    import torch

    return torch.float64


def _files(folder: Path | str, settings: str, weights: str) -> list[Path]:
    files = [Path(folder) / settings, *sorted(Path(folder).glob(weights))]
    if len(files) < 2 or not files[0].is_file():
        raise BadInput(
            f"{folder}: needs {settings} and {weights}; save pickled weights as safetensors"
        )
    return files


def _sha256(file: Path) -> str:
    if file.suffix == ".json":
        return digest({name: one for name, one in parsed(file).items() if name not in LOCAL}, 64)
    key = (str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns)
    if key not in _HASHES:
        _HASHES[key] = hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
    return _HASHES[key]
