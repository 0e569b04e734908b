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
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from hf_power.records.files import write_json

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
PLAIN_FAMILIES = ("llama", "mixtral")

# Kind of a tensor by its name in the plain model; what matches none of these is an error, never a guess.
_LAYER = r"model\.layers\.\d+\."
_KINDS = (
    ("embedding", re.compile(r"model\.embed_tokens\.weight")),
    ("query", re.compile(_LAYER + r"self_attn\.q_proj\.(weight|bias)")),
    ("output", re.compile(_LAYER + r"(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)")),
    ("output", re.compile(_LAYER + r"block_sparse_moe\.experts\.\d+\.w2\.weight")),
    ("norm", re.compile(r"model\.norm\.weight")),
    ("unchanged", re.compile(_LAYER + r"(self_attn\.[kv]_proj|mlp\.(gate|up)_proj)\.(weight|bias)")),
    ("unchanged", re.compile(_LAYER + r"block_sparse_moe\.(gate|experts\.\d+\.w[13])\.weight")),
    ("unchanged", re.compile(_LAYER + r"(input|post_attention)_layernorm\.weight|lm_head\.weight")),
)


def fold_factors(multipliers: dict[str, float], head_dim: int, tied: bool) -> dict[str, float]:
    """Kind of tensor: its factor on the way to the plain model."""
    e, a, r, s = (multipliers[key] for key in MULTIPLIERS)
    query = a * math.sqrt(head_dim)
    power = 2.0 ** round(math.log2(query))
    if math.isclose(query, power, rel_tol=1e-14):  # a is itself the rounded quotient of a power and a square root
        query = power
    return {"embedding": e, "query": query, "output": r, "norm": 1 / (e * s) if tied else 1 / s}


def kind_of(plain_name: str) -> str | None:
    """The kind of a tensor of the plain model, which has its factor; None for one that has no rule."""
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(plain_name)), None)


def plain_names(mup_name: str, num_experts: int) -> list[str]:
    """The plain model's tensors that a tensor of the muP model holds, as they lie in it."""
    if match := re.fullmatch(r"(.*\.block_sparse_moe\.)(router\.layer|input_linear|output_linear)\.weight", mup_name):
        if match[2] == "router.layer":
            return [f"{match[1]}gate.weight"]
        matrices = ("w1", "w3") if match[2] == "input_linear" else ("w2",)
        return [f"{match[1]}experts.{i}.{w}.weight" for i in range(num_experts) for w in matrices]
    return [mup_name]


def mup_name(plain_name: str) -> str:
    """The muP model's tensor that holds a tensor of the plain model."""
    name = re.sub(r"\.block_sparse_moe\.gate\.", ".block_sparse_moe.router.layer.", plain_name)
    name = re.sub(r"\.experts\.\d+\.w[13]\.", ".input_linear.", name)
    return re.sub(r"\.experts\.\d+\.w2\.", ".output_linear.", name)


def write_weights(
    files: dict[str, Path], folder: Path, config: Any, to: str, factors: dict[str, float], dtype: torch.dtype
) -> None:
    """Convert tensor by tensor into the shards of the source, cut where they are larger than MAX_SHARD_BYTES.

    It holds one shard at a time, and the parts of one stacked tensor of experts.
    """
    shards = _Shards(folder)
    for origin, name, tensor in _converted(files, config, to, factors, dtype):
        shards.add(origin, name, tensor)
    shards.finish()


def _converted(
    files: dict[str, Path], config: Any, to: str, factors: dict[str, float], dtype: torch.dtype
) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Every tensor of the result, with the source's file to whose shard it belongs."""
    experts = getattr(config, "num_local_experts", 0)
    reader = Reader(files)

    def scaled(plain_name: str, tensor: torch.Tensor) -> torch.Tensor:
        factor = factors.get(kind_of(plain_name) or "", 1.0)
        return (tensor.double() * factor).to(dtype) if factor != 1.0 else tensor.to(dtype).contiguous()

    if to in PLAIN_FAMILIES:
        for name, path in files.items():
            tensor, parts = reader.get(name), plain_names(name, experts)
            pieces = tensor.flatten(0, 1).chunk(len(parts)) if tensor.ndim == 3 else [tensor]
            for part, piece in zip(parts, pieces, strict=True):
                yield path, part, scaled(part, piece)
        return
    first_files: dict[str, Path] = {}
    for name, path in files.items():
        first_files.setdefault(mup_name(name), path)
    for name, path in first_files.items():
        pieces = [scaled(part, reader.get(part)) for part in plain_names(name, experts)]
        stacked = name.endswith(("input_linear.weight", "output_linear.weight"))
        yield path, name, torch.cat(pieces).view(experts, -1, pieces[0].shape[-1]) if stacked else pieces[0]


class Reader:
    """Tensors by name, with one file open at a time."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        self.path: Path | None = None
        self.file: Any = None

    def get(self, name: str) -> torch.Tensor:
        """A tensor."""
        tensor: torch.Tensor = self._opened(name).get_tensor(name)
        return tensor

    def dtype(self, name: str) -> str:
        """The type of a tensor as safetensors writes it, e.g. "F32"."""
        return str(self._opened(name).get_slice(name).get_dtype())

    def _opened(self, name: str) -> Any:
        if self.files[name] != self.path:
            self.path = self.files[name]
            self.file = safetensors.safe_open(self.path, "pt")
        return self.file


class _Shards:
    """Collects tensors and writes them as the shards of a model, with an index if there are several."""

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
