"""DOOR: token ids in, sampled token ids out. A draw's uniforms depend on its own seed and the step alone, so it does
not change with batch mates, batch size or a resume (in float32; bfloat16 logits drift with the batch's shape)."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ipo_lib.chat import CLOSE, Chat, parsed
from ipo_lib.lora import NF4
from ipo_lib.progress import Meter
from ipo_lib.records import BadInput, Ids, canonical, digest

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 1024  # requests sorted by length at a time; a constant, so that the order of results is no matter of speed
AHEAD = 4  # batches handed to the decoder at a time: places of ended rows are filled from them
EDGE = 0.01  # mass by which a token may lie outside its nucleus and still count as drawn from it
STRAYS = 0.02  # share of a response's tokens, and always one, that 16-bit logits may put farther outside
SCORED = 256  # positions whose logits are held at once
HEAD = 64  # most likely tokens looked at before the whole vocabulary is sorted for top-p
SMALL = 80_000_000  # bytes of weights (20 M parameters) under which dtype "auto" is float32: bfloat16 gains nothing
DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINE = ("torch", "transformers", "peft")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
LOCAL = {"_name_or_path", "base_model_name_or_path", "transformers_version"}  # vary by machine, change no draw
_HASHES: dict[tuple[str, int, int], str] = {}


@dataclass(frozen=True)
class Sampling:
    """How to draw: temperature 0 is greedy; ``until`` "think" stops at the first ``</think>`` sampled, "eos" not."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 256
    until: str = "eos"

    def __post_init__(self) -> None:
        known = 0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.until in ("think", "eos")
        if not known or self.max_tokens < 1:
            raise BadInput(f"{self}: needs temperature >= 0, 0 < top_p <= 1, max_tokens >= 1, until 'think' or 'eos'")


@dataclass(frozen=True)
class Request:
    """One draw to make after ``prompt_ids + prefix_ids``, named by ``key``."""

    key: str
    prompt_ids: Ids
    prefix_ids: Ids
    seed: int
    ban: int | None = None  # the first token drawn is another one: a draw given that it leaves a trace here


@dataclass(frozen=True)
class Completion:
    """The sampled ids of one request, without prefix and EOS; ``finish`` as in ``records.Rollout``."""

    key: str
    token_ids: Ids
    finish: str


class Sampler(Protocol):
    """The door: a model, a server or a script."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the distribution of the answers, as JSON values; loads no model."""

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Every request answered once, batch by batch, in an order that the list of requests alone decides."""

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """For each request, in order, the probability with which ``sample`` would draw each of its own ``prefix_ids``."""


def draw_seed(base: int, *parts: object) -> int:
    """The 63-bit seed of one draw: SHA-256 over the base seed and what names the draw (prompt, cut, draw index...)."""
    return int.from_bytes(hashlib.sha256(canonical([base, *parts]).encode()).digest()[:8], "big") >> 1


def fitting(requests: Sequence[Request], context: float) -> list[int]:
    """The length of every request; BadInput if one leaves no room in ``context`` tokens."""
    lengths = [len(request.prompt_ids) + len(request.prefix_ids) for request in requests]
    for request, length in zip(requests, lengths, strict=True):
        if not 0 < length < context:
            raise BadInput(f"request {request.key}: {length} prompt tokens, context {context}; shorten it")
    return lengths


def nucleus_draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, head: int = HEAD,
                 barred: Tensor | None = None) -> Tensor:  # fmt: skip
    """One id a row by inverse CDF, in order of ids, over its nucleus: the fewest top tokens with mass >= ``top_p``.
    ``logits`` [rows, vocabulary], ``uniforms`` [rows] in [0, 1). ``barred`` [rows]: an id of the nucleus that is not drawn (-1:
    none). Exact: a nucleus wider than ``head`` sorts all."""
    size = logits.shape[-1]
    values, ids = logits.topk(min(head, size))
    values = values.float()
    # One copy of the vocabulary's width, then in place: a step of many rows is bound by memory.
    every = (logits - values[:, :1]).div_(temperature).exp_()
    total = every.sum(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise BadInput("the model's logits are not finite; load it with dtype='float32'")
    if top_p >= 1:
        if barred is not None:
            every[barred >= 0, barred[barred >= 0]] = 0
        return _invert(every.double(), uniforms)
    mass = ((values - values[:, :1]) / temperature).double().exp() / total
    before = mass.cumsum(-1) - mass
    kept = mass * (before < top_p)
    if barred is not None:
        kept *= (free := ids != barred[:, None])
        alone = kept.sum(-1, keepdim=True) == 0  # it was the whole nucleus: then any other token
        kept += alone * free * mass
    mass = kept
    ids, order = ids.sort(-1)
    drawn = ids.gather(-1, _invert(mass.gather(-1, order), uniforms)[:, None])[:, 0]
    if head < size and bool((wide := before[:, -1] < top_p).any()):
        left = barred if barred is None else barred[wide]
        drawn[wide] = nucleus_draw(logits[wide], uniforms[wide], temperature, top_p, size, left)
    return drawn


def nucleus_mass(logits: Tensor, ids: Tensor, temperature: float, top_p: float, edge: float = EDGE) -> Tensor:
    """The probability with which ``nucleus_draw`` draws ``ids`` [rows] from ``logits`` [rows, vocabulary], in float64; 0 outside
    the nucleus. Within ``edge`` of it a token counts as its last one: 16-bit logits drift with the batch's shape."""
    if not temperature:
        return (logits.argmax(-1) == ids).double()
    mass = (logits.double() / temperature).softmax(-1)
    own = mass.gather(-1, ids[:, None])[:, 0]
    before = (mass * (mass > own[:, None])).sum(-1)
    ordered = mass.sort(-1, descending=True).values
    total = (ordered * (ordered.cumsum(-1) - ordered < top_p)).sum(-1)
    inside = own / (total + own * (before >= top_p))
    return inside * (before < top_p + edge)


def forgiven(found: Sequence[float], strays: Mapping[int, float]) -> list[float]:
    """Probabilities of a response's own tokens, those of ``strays`` (by place) put in where they are few enough to be drift."""
    few = len(strays) <= max(1, STRAYS * len(found))
    return [strays.get(at, chance) if few else chance for at, chance in enumerate(found)]


def _invert(mass: Tensor, uniforms: Tensor) -> Tensor:
    cdf = mass.cumsum(-1)
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1).clamp(max=mass.shape[-1] - 1)  # never a place without mass


class TransformersSampler:
    """A model in this process, a LoRA ``adapter`` merged; of generation_config.json only EOS counts. ``quantize`` "nf4":
    the weights are rounded to NF4 as in QLoRA, then held in ``dtype`` again, where they are as fast as any."""

    def __init__(self, folder: Path | str, chat: Chat, *, adapter: Path | str | None = None, device: str = "auto",
                 dtype: str = "auto", quantize: str | None = None, batch_size: int = 64) -> None:  # fmt: skip
        self.chat, self.device, self.quantize, self.batch_size = chat, device, quantize, batch_size
        self._model_files = _files(folder, "config.json", "model*.safetensors")
        self._adapter_files = _files(adapter, *ADAPTER) if adapter else []
        if batch_size < 1 or dtype not in DTYPES:
            raise BadInput(f"batch_size {batch_size!r}, dtype {dtype!r}: give 1 or more, one of {', '.join(DTYPES)}")
        if quantize not in (None, "nf4"):
            raise BadInput(f"quantize {quantize!r} is unknown; use nf4, or nothing")
        small = sum(file.stat().st_size for file in self._model_files) < SMALL
        self.dtype = dtype if dtype != "auto" else "float32" if small else "bfloat16"

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of weights, settings and adapter; dtype, engine versions, chat. Reads files only, loads no torch."""
        hashes = {"model": [*map(_sha256, self._model_files)], "adapter": [*map(_sha256, self._adapter_files)]}
        versions = {name: importlib.metadata.version(name).partition("+")[0] for name in ENGINE}
        rounded = {"quantize": self.quantize, **versions} if self.quantize else versions
        return {"engine": "transformers", **hashes, "dtype": self.dtype, **rounded, "chat": self.chat.fingerprint()}

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Longest prompt first in each WINDOW, whatever the batch size; BadInput if a prompt fills the context."""
        context = parsed(self._model_files[0]).get("max_position_embeddings", math.inf)
        lengths = fitting(requests, context)
        groups = [(place // WINDOW, one.prompt_ids) for place, one in enumerate(requests)]
        longest: dict[Any, int] = {}
        for group, length in zip(groups, lengths, strict=True):
            longest[group] = max(longest.get(group, 0), length)
        # Requests of one prompt stay together, since they may share prefixes.
        order = sorted(range(len(requests)), key=lambda at: (groups[at][0], -longest[groups[at]], groups[at][1], -lengths[at]))
        meter = Meter(len(order), "drawing")
        for first in range(0, len(order), AHEAD * self.batch_size):
            places = order[first : first + AHEAD * self.batch_size]
            limits = [int(min(sampling.max_tokens, context - lengths[place])) for place in places]
            yield from self._decode([requests[place] for place in places], limits, sampling, meter)

    def _decode(self, requests: Sequence[Request], limits: Sequence[int], sampling: Sampling,
                meter: Meter) -> Iterator[Completion]:  # fmt: skip
        from ipo_lib.decoding import ARCHITECTURES, Decoder, generate

        rows = [Row(request, limit, sampling.until, self.chat) for request, limit in zip(requests, limits, strict=True)]
        prefixes = [one.prompt_ids + one.prefix_ids for one in requests]

        def draw(live: Sequence[int], logits: Tensor) -> Tensor:
            bars = [rows[one].barred for one in live]
            barred = logits.new_tensor(bars, dtype=_float64()).long() if max(bars) >= 0 else None
            if not sampling.temperature:
                if barred is not None:
                    logits[barred >= 0, barred[barred >= 0]] = -math.inf
                return logits.argmax(-1)
            uniforms = logits.new_tensor([rows[one].uniform for one in live], dtype=_float64())
            return nucleus_draw(logits, uniforms, sampling.temperature, sampling.top_p, barred=barred)

        def take(one: int, token: int) -> bool:
            if ended := rows[one].take(token):
                meter.step()
            return ended

        if self._model.config.model_type in ARCHITECTURES:
            Decoder(self._model, self.batch_size).decode(prefixes, draw, take)
        else:
            for at in range(0, len(rows), self.batch_size):
                generate(self._model, prefixes[at : at + self.batch_size], at, max(limits), draw, take)
        for row in rows:
            yield Completion(row.request.key, tuple(row.taken[len(row.request.prefix_ids) :]), row.finish)

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """One teacher-forced pass a request; the logits of ``SCORED`` positions at a time. In 16 bits a batch of another shape
        may have drawn a token that lies outside the nucleus here: a few such tokens count as its last ones."""
        import torch

        self._model.set_attn_implementation("sdpa")  # the decoder's own wants a mask; it sets itself again
        for one in requests:
            ids = torch.tensor([one.prompt_ids + one.prefix_ids], device=self._model.device)
            with torch.inference_mode():
                hidden = self._model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[
                    0, len(one.prompt_ids) - 1 : -1
                ]
                found, strays = list[float](), dict[int, float]()
                for at in range(0, len(one.prefix_ids), SCORED):
                    logits = self._model.get_output_embeddings()(hidden[at : at + SCORED])
                    own = ids[0, len(one.prompt_ids) + at :][: len(logits)]
                    chances = nucleus_mass(logits, own, sampling.temperature, sampling.top_p)
                    far = (chances == 0).nonzero()[:, 0]
                    edge = nucleus_mass(logits[far], own[far], sampling.temperature, sampling.top_p, 1.0)
                    strays |= {at + place: chance for place, chance in zip(far.tolist(), edge.tolist(), strict=True)}
                    found += chances.tolist()
            yield forgiven(found, {} if self.dtype == "float32" else strays)

    @functools.cached_property
    def _model(self) -> Any:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BadInput(f"device {device!r}: this torch sees no GPU; use device 'auto' or 'cpu'")
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "use_safetensors": True, "local_files_only": True}
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # wants an optional kernel
        if self.quantize:
            options |= {"quantization_config": NF4 | {"bnb_4bit_compute_dtype": self.dtype}, "device_map": device}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(self._model_files[0].parent, **options)
        if self.quantize:
            model = model.dequantize(options["dtype"])
        if self._adapter_files:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(self._adapter_files[0].parent)).merge_and_unload()
        model.generation_config = type(model.generation_config)()  # a bare one: generate fills gaps from it
        return model.to(device).eval()


class Row:
    """One request as it is drawn: its own uniforms, what was taken and why it ended."""

    def __init__(self, request: Request, limit: int, until: str, chat: Chat) -> None:
        self.request, self.limit, self.until, self.chat, self.finish = request, limit, until, chat, ""
        self.uniforms = np.random.Generator(np.random.PCG64(request.seed)).random(limit)
        self.taken = [*request.prefix_ids]  # a closing tag may straddle the cut

    @property
    def uniform(self) -> float:
        """The uniform of the next draw."""
        return float(self.uniforms[len(self.taken) - len(self.request.prefix_ids)])

    @property
    def barred(self) -> int:
        """The id that the next draw must not be; -1: none."""
        first = len(self.taken) == len(self.request.prefix_ids)
        return self.request.ban if first and self.request.ban is not None else -1

    def take(self, token: int) -> bool:
        """Add a drawn token; whether the row has ended."""
        if token in self.chat.eos_ids:
            self.finish = "stop"
            return True
        self.taken.append(token)
        closed = self.until == "think" and self.chat.closes(self.taken[-len(CLOSE) :])
        full = len(self.taken) - len(self.request.prefix_ids) == self.limit
        self.finish = "think" if closed else "length" if full else ""
        return bool(self.finish)


def adapter_hashes(folder: Path | str) -> list[str]:
    """The hashes of a LoRA adapter's settings and weights."""
    return [*map(_sha256, _files(folder, *ADAPTER))]


def _float64() -> Any:
    import torch

    return torch.float64


def _files(folder: Path | str, settings: str, weights: str) -> list[Path]:
    files = [Path(folder) / settings, *sorted(Path(folder).glob(weights))]
    if len(files) < 2 or not files[0].is_file():
        raise BadInput(f"{folder}: needs {settings} and {weights}; save pickled weights as safetensors")
    return files


def _sha256(file: Path) -> str:
    if file.suffix == ".json":
        return digest({name: one for name, one in parsed(file).items() if name not in LOCAL}, 64)
    key = (str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns)
    if key not in _HASHES:
        _HASHES[key] = hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
    return _HASHES[key]
