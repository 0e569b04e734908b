"""muP's multipliers folded into weights, tensor by tensor, and back.

With e embedding_multiplier, a attention_multiplier, r residual_multiplier and s logits_scaling, the plain model whose
tensors are those of the muP model times these factors computes the same logits:

=============================================  ==================================
tensor                                         factor
=============================================  ==================================
embedding                                      e
q_proj, weight and bias                        a * sqrt(head_dim)
o_proj, down_proj, experts' w2 (and biases)    r
final norm                                     1 / s, or 1 / (e * s) if tied
=============================================  ==================================

Plain attention divides its scores by sqrt(head_dim) where Granite multiplies them by a; rotary embeddings are linear, so
a factor of q_proj is one of the scores. A tied head is e times too large; the final norm takes that back.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from safetensors.torch import save_file

from hf_power.compat import PreTrainedConfig
from hf_power.models import MULTIPLIERS, Family, kind_of, num_experts
from hf_power.records.files import write_json

# transformers' names, which `from_pretrained` looks for.
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# huggingface_hub's own limit, which `save_pretrained` keeps.
MAX_SHARD_BYTES = 5_000_000_000


def fold_factors(multipliers: dict[str, float], head_dim: int, tied: bool) -> dict[str, float]:
    """Kind of tensor, see `hf_power.models.kind_of`: its factor on the way to the plain model, 1 for the others."""
    e, a, r, s = (multipliers[key] for key in MULTIPLIERS)
    query = a * math.sqrt(head_dim)
    power = 2.0 ** round(math.log2(query))
    # The preset "power_of_two" makes a the quotient of a power of two and a square root, which is rounded, so that the
    # product may miss that power by a last digit.
    if math.isclose(query, power, rel_tol=1e-14):
        query = power
    outputs = dict.fromkeys(("attention output", "MLP output", "experts' output"), r)
    return {"embedding": e, "query": query, **outputs, "final norm": 1 / (e * s) if tied else 1 / s}


def plain_names(mup_name: str, experts: int) -> list[str]:
    """The plain model's tensors that a tensor of the muP model holds, as they lie in it."""
    if match := re.fullmatch(r"(.*\.block_sparse_moe\.)(router\.layer|input_linear|output_linear)\.weight", mup_name):
        if match[2] == "router.layer":
            return [f"{match[1]}gate.weight"]
        matrices = ("w1", "w3") if match[2] == "input_linear" else ("w2",)
        return [f"{match[1]}experts.{i}.{w}.weight" for i in range(experts) for w in matrices]
    return [mup_name]


def mup_name(plain_name: str) -> str:
    """The muP model's tensor that holds a tensor of the plain model."""
    name = re.sub(r"\.block_sparse_moe\.gate\.", ".block_sparse_moe.router.layer.", plain_name)
    name = re.sub(r"\.experts\.\d+\.w[13]\.", ".input_linear.", name)
    return re.sub(r"\.experts\.\d+\.w2\.", ".output_linear.", name)


@dataclass(frozen=True)
class Conversion:
    """How the weights of a model (each tensor's file) become those of its twin; a tensor without a factor stays."""

    files: dict[str, Path]
    config: PreTrainedConfig
    to: Family
    factors: dict[str, float]
    dtype: torch.dtype

    def scaled(self, plain_name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor times its factor, which its name in the plain model tells."""
        factor = self.factors.get(kind_of(plain_name) or "", 1.0)
        # In float64, so that the result is rounded once.
        return (tensor.double() * factor).to(self.dtype) if factor != 1.0 else tensor.to(self.dtype).contiguous()


def write_weights(conversion: Conversion, folder: Path) -> None:
    """Convert tensor by tensor into the shards of the source, cut where they are larger than MAX_SHARD_BYTES.

    It holds one shard at a time, and the parts of one stacked tensor of experts.
    """
    shards = _Shards(folder)
    for origin, name, tensor in _converted(conversion):
        shards.add(origin, name, tensor)
    shards.finish()


def _converted(conversion: Conversion) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Every tensor of the result, with the source's file to whose shard it belongs."""
    experts = num_experts(conversion.config)
    files, reader = conversion.files, Reader(conversion.files)
    if not conversion.to.has_multipliers:
        for name, path in files.items():
            tensor, parts = reader.get(name), plain_names(name, experts)
            # Stacked experts are (experts, rows, columns), and w1 lies above w3 in the rows of each.
            pieces = tensor.flatten(0, 1).chunk(len(parts)) if tensor.ndim == 3 else [tensor]
            for part, piece in zip(parts, pieces, strict=True):
                yield path, part, conversion.scaled(part, piece)
        return
    # Experts that are stacked into one tensor may lie in several shards; their stack goes into the first of them.
    first_files: dict[str, Path] = {}
    for name, path in files.items():
        first_files.setdefault(mup_name(name), path)
    for name, path in first_files.items():
        pieces = [conversion.scaled(part, reader.get(part)) for part in plain_names(name, experts)]
        stacked = name.endswith(("input_linear.weight", "output_linear.weight"))
        yield path, name, torch.cat(pieces).view(experts, -1, pieces[0].shape[-1]) if stacked else pieces[0]


class _Opened(Protocol):
    """What is used of safetensors' `safe_open`, whose methods have no types."""

    def get_tensor(self, name: str) -> torch.Tensor: ...
    def get_slice(self, name: str) -> "_Slice": ...


class _Slice(Protocol):
    def get_dtype(self) -> str: ...


class Reader:
    """Tensors by name, with one file open at a time."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        self.path: Path | None = None
        self.file: _Opened

    def get(self, name: str) -> torch.Tensor:
        """A tensor."""
        return self._opened(name).get_tensor(name)

    def dtype(self, name: str) -> str:
        """The type of a tensor as safetensors writes it, e.g. "F32"."""
        return self._opened(name).get_slice(name).get_dtype()

    def _opened(self, name: str) -> _Opened:
        if self.files[name] != self.path:
            self.path = self.files[name]
            self.file = safetensors.safe_open(self.path, "pt")
        return self.file


class _Shards:
    """Collects tensors and writes them as the shards of a model, with an index if there are several.

    `huggingface_hub.save_torch_state_dict` would need the whole model in memory, because it plans all shards before it
    writes the first one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, torch.Tensor] = {}
        self.origin: Path | None = None
        self.bytes = self.total_bytes = self.total_parameters = 0
        self.written: list[list[str]] = []

    def add(self, origin: Path, name: str, tensor: torch.Tensor) -> None:
        if origin != self.origin or self.bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self.flush()
        self.origin = origin
        self.tensors[name] = tensor
        self.bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.total_parameters += tensor.numel()

    def flush(self) -> None:
        if self.tensors:
            # How many shards there will be is not known yet, and their names hold that number.
            save_file(self.tensors, self.folder / str(len(self.written)), metadata={"format": "pt"})
            self.written.append(list(self.tensors))
            self.tensors, self.bytes = {}, 0

    def finish(self) -> None:
        """Write the last shard, then give all their names, which hold their number."""
        self.flush()
        count = len(self.written)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [WEIGHTS]
        for i, name in enumerate(names):
            (self.folder / str(i)).rename(self.folder / name)
        if count > 1:
            places = {tensor: names[i] for i, tensors in enumerate(self.written) for tensor in tensors}
            totals = {"total_parameters": self.total_parameters, "total_size": self.total_bytes}
            write_json(self.folder / INDEX, {"metadata": totals, "weight_map": dict(sorted(places.items()))})
