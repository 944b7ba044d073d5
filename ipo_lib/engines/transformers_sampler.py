"""A sampler whose model runs in this process.

1. Requests are sorted, so that those of one prompt, and those of like length, stay together.
2. They are handed to the decoder (``decoding``) a few batches at a time; it shares their prefixes.
3. Each draw (``draws``) uses random numbers of its own, and ends by itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipo_lib.chat import Chat, read_json
from ipo_lib.engines import memory, scoring
from ipo_lib.engines.draws import DrawBatch, OngoingDraw
from ipo_lib.engines.loading import load_adapter, load_causal_lm
from ipo_lib.engines.lora import NF4, silence_libraries
from ipo_lib.engines.nucleus import nucleus_mass
from ipo_lib.engines.progress import Meter
from ipo_lib.records import BadInput, Ids, digest
from ipo_lib.sampling import Completion, Request, Sampling, request_lengths

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 1024  # requests sorted at a time; constant: the order of results is no matter of speed
PATIENCE = 0.25  # share of a batch's places; fewer stragglers are left for the next call
AHEAD = 4  # batches handed to the decoder at a time: places of ended draws are filled from them
SCORED = 256  # positions whose logits are in memory at once
SMALL = 80_000_000  # bytes of weights (20 M parameters) below which bfloat16 and LANES gain nothing
LANES = 2  # of a large model on CPUs; constant, since the width of a step decides 16-bit draws
IN_LANES = 128  # prefixes from which lanes gain speed
DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINE = ("torch", "transformers", "peft")  # libraries whose versions name a draw
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Settings that differ between machines and change no draw.
LOCAL = {"_name_or_path", "base_model_name_or_path", "transformers_version"}


class TransformersSampler:
    """A model in this process; of generation_config.json only EOS counts.

    A LoRA adapter stays apart from 16-bit weights, as in training: merging rounds most of a small
    update away. In float32 it is merged, which changes nothing but the speed.

    Args:
        folder: of the model.
        chat: of the same folder.
        adapter: folder of a LoRA adapter.
        device: "cpu", "cuda", "cuda:1", ... or "auto".
        dtype: of the weights, one of DTYPES. "auto" is float32 for a small model, else bfloat16.
        quantize: "nf4" rounds the weights to NF4 as in QLoRA. They are then held in ``dtype``
            again, where they are as fast as any.
        batch_size: draws that are decoded together, on a GPU if memory suffices.
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
        self._waiting: dict[int, OngoingDraw] = {}  # stragglers by their seed
        self._model_files = _files(folder, "config.json", "model*.safetensors")
        self._adapter_files = _files(adapter, *ADAPTER) if adapter else []
        if batch_size < 1 or dtype not in DTYPES:
            raise BadInput(
                f"batch_size {batch_size!r}, dtype {dtype!r}: "
                f"give 1 or more, one of {', '.join(DTYPES)}"
            )
        if quantize not in (None, "nf4"):
            raise BadInput(f"quantize {quantize!r} is unknown; use nf4, or nothing")
        self.dtype = dtype
        if dtype == "auto":
            self.dtype = "float32" if self._model_bytes() < SMALL else "bfloat16"

    def _model_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._model_files)

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of weights, settings and adapter, dtype, library versions and chat.

        Reads files only and loads no torch.
        """
        facts: dict[str, Any] = {
            "engine": "transformers",
            "model": [*map(_hash_file, self._model_files)],
            "adapter": [*map(_hash_file, self._adapter_files)],
            "dtype": self.dtype,
            "chat": self.chat.fingerprint(),
        }
        for name in ENGINE:
            facts[name] = importlib.metadata.version(name).partition("+")[0]
        if self.quantize:
            facts["quantize"] = self.quantize
        if self._adapter_files and self.dtype != "float32":
            facts["lora"] = "unmerged"
        return facts

    @property
    def pauses(self) -> bool:
        """Whether ``sample_some`` leaves stragglers for the next call.

        On a GPU, where few rows take as long as many.
        """
        return self.device.startswith("cuda") or (self.device == "auto" and _sees_a_gpu())

    def sample_some(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Answer most of the requests; the last few wait for a call that asks for them again.

        There they go on from the token at which they were left, with their own random numbers, so
        that a draw is the same whether it waited or not (in float32).
        """
        return self._sample(requests, sampling, PATIENCE)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Answer all requests, longest prompt first in each WINDOW.

        BadInput: a prompt fills the context.
        """
        return self._sample(requests, sampling, patience=0.0)

    def _sample(
        self, requests: Sequence[Request], sampling: Sampling, patience: float
    ) -> Iterator[Completion]:
        context = read_json(self._model_files[0]).get("max_position_embeddings", math.inf)
        lengths = request_lengths(requests, context)
        order = _decoding_order(requests, lengths)
        meter = Meter(len(order), "drawing")
        size = AHEAD * self.batch_size
        for first in range(0, len(order), size):
            draws = []
            for place in order[first : first + size]:
                request = requests[place]
                limit = int(min(sampling.max_tokens, context - lengths[place]))
                straggler = self._waiting.pop(request.seed, None)
                draws.append(straggler or OngoingDraw(request, limit, sampling, self.chat))
            self._decode(DrawBatch(draws, sampling, meter), patience)
            for draw in draws:
                if draw.finish or not patience:
                    yield draw.completion()
                else:
                    self._waiting[draw.request.seed] = draw

    def _decode(self, batch: DrawBatch, patience: float) -> None:
        """Go on with draws until they end, or few are left where there is patience to wait."""
        from ipo_lib.engines.decoding import ARCHITECTURES, Decoder, decode_by_generate
        from ipo_lib.engines.lanes import decode_in_lanes

        prefixes = [(*draw.request.prompt_ids, *draw.taken) for draw in batch.draws]
        if self._model.config.model_type in ARCHITECTURES:
            large = self._model_bytes() >= SMALL and len(prefixes) >= IN_LANES
            if self._model.device.type == "cpu" and large:
                functions = batch.choose, batch.take
                decode_in_lanes(self._model, self.batch_size, LANES, prefixes, *functions)
                return
            on_gpu = self._model.device.type == "cuda"
            decoder = self._on_gpu if on_gpu else Decoder(self._model, self.batch_size)
            decoder.decode(prefixes, batch.choose, batch.take, patience)
            return
        longest_tag = max(len(draw.closing_tag) for draw in batch.draws)
        steps = max(draw.limit for draw in batch.draws) + longest_tag
        for first in range(0, len(prefixes), self.batch_size):
            rows = prefixes[first : first + self.batch_size]
            decode_by_generate(self._model, rows, first, steps, batch.choose, batch.take)

    def score(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[float]]:
        """For each request, the probability that ``sample`` draws each of its ``prefix_ids``.

        Short texts after one prompt (a guard's possible answers) that come one after the other
        share a pass over the prompt; all others have a pass each. In 16 bits a batch of another
        shape may have drawn a token outside the nucleus: a few such tokens count as its last ones.
        """
        import torch

        # The attention of the decoder needs a mask; the decoder sets it again.
        self._model.set_attn_implementation("sdpa")
        items = [(request.prompt_ids, request.prefix_ids) for request in requests]
        for group in scoring.group_by_prompt(items, self.batch_size):
            prompt = group[0][0]
            texts = [text for _, text in group]
            with torch.inference_mode():
                states = scoring.hidden_states(self._model, prompt, texts)
                scores = []
                for text, text_states in zip(texts, states, strict=True):
                    scores.append(self._probabilities(text, text_states, sampling))
            yield from scores

    def states(self, requests: Sequence[Request]) -> Iterator[Any]:
        """For each request, the last hidden state that draws each of its ``prefix_ids``.

        Returns:
            Numpy arrays in float32, [tokens, width].
        """
        import torch

        self._model.set_attn_implementation("sdpa")
        for request in requests:
            with torch.inference_mode():
                (states,) = scoring.hidden_states(
                    self._model, request.prompt_ids, [request.prefix_ids]
                )
            yield states.float().cpu().numpy()

    def _probabilities(self, text: Ids, states: Tensor, sampling: Sampling) -> list[float]:
        """The probability of each token of a text, from the hidden states that draw them."""
        import torch

        probabilities: list[float] = []
        strays: dict[int, float] = {}
        for first in range(0, len(text), SCORED):
            logits = self._model.get_output_embeddings()(states[first : first + SCORED])
            ids = torch.tensor(text[first : first + SCORED], device=logits.device)
            mass = nucleus_mass(logits, ids, sampling.temperature, sampling.top_p)
            outside = (mass == 0).nonzero()[:, 0]
            as_last = nucleus_mass(
                logits[outside], ids[outside], sampling.temperature, sampling.top_p, edge=1.0
            )
            for place, probability in zip(outside.tolist(), as_last.tolist(), strict=True):
                strays[first + place] = probability
            probabilities += mass.tolist()
        if self.dtype == "float32":
            return probabilities
        return scoring.allow_strays(probabilities, strays)

    def release(self) -> None:
        """Let the model go; it is loaded again when it is needed."""
        self.__dict__.pop("_model", None)
        self.__dict__.pop("_on_gpu", None)

    @functools.cached_property
    def _on_gpu(self) -> Any:
        """The decoder of a GPU, which keeps its graphs from call to call."""
        from ipo_lib.engines.captured import CapturedDecoder

        return CapturedDecoder(self._model, self.batch_size)

    @functools.cached_property
    def _model(self) -> Any:
        import torch
        import transformers

        # 1. The device, with room on it.
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BadInput(f"device {device!r}: this torch sees no GPU; use device 'auto' or 'cpu'")
        memory.make_room(device, self._model_bytes())

        # 2. The weights, rounded where that is asked for.
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        missing_kernel = logging.getLogger("bitsandbytes.backends.cpu.ops")
        missing_kernel.setLevel(logging.ERROR)  # it is optional
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.quantize:
            options["quantization_config"] = NF4 | {"bnb_4bit_compute_dtype": self.dtype}
            options["device_map"] = device
        model = load_causal_lm(self._model_files[0].parent, **options)
        if self.quantize:
            model = model.dequantize(options["dtype"])

        # 3. The adapter, and no settings of generation: ``generate`` would fill gaps from them.
        if self._adapter_files:
            model = self._with_adapter(model)
        model.generation_config = type(model.generation_config)()
        memory.register(self)
        return model.to(device).eval()

    def _with_adapter(self, model: Any) -> Any:
        """The model with its adapter: merged in float32, beside the weights in 16 bits."""
        import torch

        silence_libraries()
        lora = load_adapter(model, self._adapter_files[0].parent)
        if self.dtype == "float32":
            return lora.merge_and_unload()
        # Under training's autocast LoRA is multiplied in 16 bits, too: this is the same function.
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return lora.get_base_model()


def adapter_hashes(folder: Path | str) -> list[str]:
    """The hashes of a LoRA adapter's settings and weights."""
    return [*map(_hash_file, _files(folder, *ADAPTER))]


def _decoding_order(requests: Sequence[Request], lengths: Sequence[int]) -> list[int]:
    """The places of requests in the order in which they are decoded.

    In each WINDOW, requests of one prompt stay together, since they may share prefixes. The prompt
    with the longest request comes first, and in it the longest request.
    """
    groups = [(place // WINDOW, request.prompt_ids) for place, request in enumerate(requests)]
    longest: dict[tuple[int, Ids], int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(longest.get(group, 0), length)

    def rank(place: int) -> tuple[int, int, Ids, int]:
        window, prompt_ids = groups[place]
        return window, -longest[groups[place]], prompt_ids, -lengths[place]

    return sorted(range(len(requests)), key=rank)


def _sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _files(folder: Path | str, settings: str, weights: str) -> list[Path]:
    """The files of a model or adapter: its settings, then its weights."""
    files = [Path(folder) / settings, *sorted(Path(folder).glob(weights))]
    if len(files) < 2 or not files[0].is_file():
        raise BadInput(
            f"{folder}: needs {settings} and {weights}; save pickled weights as safetensors"
        )
    return files


def _hash_file(file: Path) -> str:
    """SHA-256 of a file; of settings without those that differ between machines."""
    if file.suffix == ".json":
        settings = read_json(file)
        for name in LOCAL:
            settings.pop(name, None)
        return digest(settings, 64)
    stat = file.stat()
    return _hash_content(file.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hash_content(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; computed once for each size and time of change."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
