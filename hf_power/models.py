"""What hf_power knows of its four model families: classes, twins, tensors, parameters, FLOPs and losses of a block."""

import re
from dataclasses import dataclass
from typing import cast

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from hf_power.compat import PreTrainedConfig
from hf_power.records.errors import refused_by


@dataclass(frozen=True)
class Family:
    """A model type of transformers, of which muP or the export knows every tensor.

    Attributes:
        prefix: how the names of its classes begin.
        twin: model type with the same forward pass, but with muP's multipliers or without them.
        has_multipliers: whether the forward pass multiplies by muP's numbers, as those of Granite do.
    """

    model_type: str
    prefix: str
    twin: str
    has_multipliers: bool
    has_experts: bool

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """Its config class; transformers imports the module when it is asked for."""
        found: type[PreTrainedConfig] = getattr(transformers, f"{self.prefix}Config")
        return found

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Its class for causal language modeling."""
        found: type[PreTrainedModel] = getattr(transformers, f"{self.prefix}ForCausalLM")
        return found


FAMILIES = {
    family.model_type: family
    for family in (
        Family("granite", "Granite", twin="llama", has_multipliers=True, has_experts=False),
        Family("granitemoe", "GraniteMoe", twin="mixtral", has_multipliers=True, has_experts=True),
        Family("llama", "Llama", twin="granite", has_multipliers=False, has_experts=False),
        Family("mixtral", "Mixtral", twin="granitemoe", has_multipliers=False, has_experts=True),
    )
}
PLAIN_FAMILIES = tuple(name for name, family in FAMILIES.items() if not family.has_multipliers)
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")

# Kind of a tensor: how its name goes on below "model." or "model.layers.N.". A family has the names in memory that
# transformers gives them, and others in its files; what matches none of these has no rule anywhere, never a guess.
_MOE = r"block_sparse_moe\."
_KINDS = {
    "embedding": r"embed_tokens\.weight",
    "head": r"lm_head\.weight",
    "query": r"self_attn\.q_proj\.(weight|bias)",
    "key or value": r"self_attn\.[kv]_proj\.(weight|bias)",
    "attention output": r"self_attn\.o_proj\.(weight|bias)",
    "MLP input": r"mlp\.(gate|up)_proj\.(weight|bias)",
    "MLP output": r"mlp\.down_proj\.(weight|bias)",
    "router": rf"({_MOE}(gate|router|router\.layer)|mlp\.gate)\.weight",
    "experts' input": rf"{_MOE}(experts\.\d+\.w[13]|input_linear)\.weight|({_MOE}|mlp\.)experts\.gate_up_proj",
    "experts' output": rf"{_MOE}(experts\.\d+\.w2|output_linear)\.weight|({_MOE}|mlp\.)experts\.down_proj",
    "norm": r"(input|post_attention)_layernorm\.weight",
    "final norm": r"norm\.weight",
}
_WHOLE = {kind: re.compile(rf"(model\.(layers\.\d+\.)?)?({name})") for kind, name in _KINDS.items()}
_ENDS = {kind: re.compile(rf"(^|\.)({name})$") for kind, name in _KINDS.items()}
ROUTER_MODULES = (".block_sparse_moe.router", ".mlp.gate")


def kind_of(name: str, *, wrapped: bool = False) -> str | None:
    """The kind of a tensor of the four families, e.g. "query", in memory or in a file; None for one of no kind.

    `wrapped` says whether an engine may have put a prefix or a part of its own before the end of the name.
    """
    if wrapped:
        return next((kind for kind, pattern in _ENDS.items() if pattern.search(name)), None)
    return next((kind for kind, pattern in _WHOLE.items() if pattern.fullmatch(name)), None)


def head_dim(config: PreTrainedConfig) -> int:
    """Size of an attention head: the config's own, or else its share of hidden_size."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def num_experts(config: PreTrainedConfig) -> int:
    """Experts of each layer; 0 for a dense model."""
    return int(getattr(config, "num_local_experts", None) or 0)


def block_losses(model: torch.nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each block in nats per token, shape (blocks): of the text alone.

    A mixture of experts' own loss has its balancing loss added.
    """
    logits = model(input_ids=blocks).logits[:, :-1].float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, blocks[:, 1:].flatten(), reduction="none")
    return losses.view(len(blocks), -1).mean(dim=1)


def flops_per_token(config: PreTrainedConfig, block_size: int) -> float:
    """Training FLOPs per token of a model, forward and backward, of its matrix products alone.

    A product with a matrix of P entries costs 2 P forward and 4 P backward (the gradients of its input and of its
    weights). Attention's two products, scores and values, cost 2 * heads * head_dim for each earlier position, of which
    a causal token has block_size / 2 on average, so 2 * heads * head_dim * block_size forward, and twice that backward::

        6 * P + 6 * layers * heads * head_dim * block_size

    P is the number of entries of the matrices that a token passes: attention, MLP or its experts_per_token of the
    experts, router, and the head (vocab_size * hidden_size, tied or not). The embedding is a look-up; norms, softmax and
    recomputation (gradient checkpointing) are left out.

    Args:
        config: of a Llama, Mixtral, Granite or GraniteMoe model.
        block_size: tokens per sequence, >= 1.
    """
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim(config) * block_size
    return float(6 * (_active_matrices(config) + attention))


def usual_utilisation(config: PreTrainedConfig | None) -> float:
    """Share of the peak to plan with: 0.4, and 0.25 for a mixture of experts; without a config it is taken for dense.

    One H200 reached 0.48 for a dense model of 1.2B parameters and 0.27 for a mixture of 1.3B
    (benchmarks/results/accelerator_NVIDIA-H200.md, compiled, bf16); several devices also communicate, which was not measured.
    """
    return 0.25 if config is not None and num_experts(config) else 0.4


def count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters of a model that is never given any memory.

    Returns:
        "parameters"; "parameters_without_embeddings", as transformers' num_parameters counts them; and
        "active_parameters", those without the experts that a token does not pass.
    """
    model = without_memory(config)
    total = model.num_parameters()
    idle = sum(p.numel() * (1 - _share(config, p)) for p in model.parameters())
    return {
        "parameters": total,
        "parameters_without_embeddings": model.num_parameters(exclude_embeddings=True),
        "active_parameters": round(total - idle),
    }


def _active_matrices(config: PreTrainedConfig) -> int:
    """Entries of the matrices that a token is multiplied with, the head once, the embedding not."""
    matrices = [(name, p) for name, p in without_memory(config).named_parameters() if p.ndim > 1]
    inner = [(name, p) for name, p in matrices if kind_of(name, wrapped=True) not in ("embedding", "head")]
    head: int = config.vocab_size * config.hidden_size
    return round(sum(p.numel() * _share(config, p) for _, p in inner)) + head


def _share(config: PreTrainedConfig, parameter: torch.Tensor) -> float:
    """The part of a tensor that a token passes; experts are the tensors of three dimensions."""
    return float(config.num_experts_per_tok / config.num_local_experts) if parameter.ndim == 3 else 1.0


def without_memory(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device; a UserError for a shape that the model's own code refuses."""
    # AutoModelForCausalLM.from_config would partition the model under ZeRO 3.
    model_class = cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    with refused_by("the model's config"), torch.device("meta"):
        return model_class(config)
