"""What hf_power knows of model families: classes, twins and tensors of four; parameters, FLOPs and losses of any."""

import re
from dataclasses import dataclass
from typing import cast

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from hf_power.compat import PreTrainedConfig
from hf_power.records.errors import UserError, refused_by


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
_EXPERT = re.compile(r"(^|\.)experts\.(\d+\.|\w+_bias$)")  # The biases of fused experts have two dimensions.
_ENDS = {kind: re.compile(rf"(^|\.)({name})$") for kind, name in _KINDS.items()}
ROUTER_MODULES = (".block_sparse_moe.router", ".mlp.gate")

ANY = "any"  # The model_type of settings whose model_config says it all.
# What the families call the number of experts, and of those that a token passes.
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token", "top_k_experts")
# Families that are known, by tests, to compute on a block of whole sequences what causal SDPA, a linear head and plain RMS
# norms compute, so that their passes may be made faster; all others take the stock path.
STOCK_BLOCKS = (
    *FAMILIES,
    *("qwen2", "qwen3", "olmo2", "smollm3", "phi3", "mistral", "glm4", "ernie4_5", "arcee", "gpt_neox"),
    *("qwen3_moe", "olmoe", "deepseek_v3"),
)
# Families whose routers choose by the largest of a softmax, as `hf_power.pretrain.record.ExpertLoad` measures it.
SOFTMAX_ROUTERS = ("granitemoe", "mixtral", "qwen3_moe")


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
    """Experts of each layer that has some; 0 for a dense model."""
    return _first_of(config, NUM_EXPERTS)


def experts_per_token(config: PreTrainedConfig) -> int:
    """Experts that a token passes in such a layer, shared ones not counted."""
    return _first_of(config, EXPERTS_PER_TOKEN)


def _first_of(config: PreTrainedConfig, names: tuple[str, ...]) -> int:
    """The first of some attributes that a config, or one that it holds, has."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    value = next((found for part in parts for name in names if (found := getattr(part, name, None))), 0)
    return int(max(value)) if isinstance(value, list | tuple) else int(value)


def attends_to_all(config: PreTrainedConfig) -> bool:
    """Whether every layer attends to all earlier tokens of a block, and not to those of a window alone."""
    if kinds := getattr(config, "layer_types", None):
        return set(kinds) == {"full_attention"}
    return getattr(config, "use_sliding_window", True) is False or not getattr(config, "sliding_window", None)


def is_stock_block(config: PreTrainedConfig) -> bool:
    """Whether a block is one causal sequence for the model, see STOCK_BLOCKS."""
    return config.model_type in STOCK_BLOCKS and attends_to_all(config)


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
    experts, shared experts, router, and the head (vocab_size * hidden_size, tied or not). Embeddings are look-ups; norms,
    softmax and recomputation (gradient checkpointing) are left out. Where queries and values have different sizes (MLA)
    head_dim is their mean, and in a layer with a window of w < block_size tokens w - w**2 / (2 * block_size) takes the
    place of block_size / 2.

    Args:
        config: of any causal LM of transformers with attention layers.
        block_size: tokens per sequence, >= 1.
    """
    attention = config.num_attention_heads * _attention_head_dim(config) * 2 * _earlier_positions(config, block_size)
    return float(6 * (_active_matrices(config) + attention))


def _attention_head_dim(config: PreTrainedConfig) -> float:
    """Mean size of a head's queries and of its values, which differ in multi-head latent attention."""
    if getattr(config, "qk_nope_head_dim", None) is None:
        return head_dim(config)
    return float(config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) / 2


def _earlier_positions(config: PreTrainedConfig, block_size: int) -> float:
    """Positions that a token attends to, as a mean over a block, summed over the layers; none where no block is."""
    if not block_size:
        return 0.0
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    sizes = {"sliding_attention": window, "chunked_attention": chunk and chunk / 2}
    if attends_to_all(config):
        kinds = ["full_attention"] * config.num_hidden_layers
    else:
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    total = 0.0
    for kind in kinds:
        w = min(sizes.get(kind) or block_size, block_size)
        total += w - w**2 / (2 * block_size)
    return total


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
    idle = sum(p.numel() * (1 - _share(config, name, p)) for name, p in model.named_parameters())
    return {
        "parameters": total,
        "parameters_without_embeddings": model.num_parameters(exclude_embeddings=True),
        "active_parameters": round(total - idle),
    }


def _active_matrices(config: PreTrainedConfig) -> int:
    """Entries of the matrices that a token is multiplied with, the head once, embeddings not."""
    model = without_memory(config)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear head, so that its FLOPs cannot be counted.")
    apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {id(head.weight)}
    inner = [(n, p) for n, p in model.named_parameters() if p.ndim > 1 and "bias" not in n and id(p) not in apart]
    return round(sum(p.numel() * _share(config, n, p) for n, p in inner)) + head.weight.numel()


def _share(config: PreTrainedConfig, name: str, parameter: torch.Tensor) -> float:
    """The part of a tensor that a token passes; experts are tensors of three dimensions, or modules with numbers."""
    count = num_experts(config)
    of_all = parameter.ndim == 3 and parameter.shape[0] == count
    if not count or not (of_all or _EXPERT.search(name)):
        return 1.0
    return experts_per_token(config) / count


def without_memory(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device.

    Raises:
        UserError: a config of no causal LM, or a shape that the model's own code refuses.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{config.model_type} is no causal language model of transformers: pass the config of one.")
    # AutoModelForCausalLM.from_config would partition the model under ZeRO 3.
    model_class = cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    with refused_by("the model's config"), torch.device("meta"):
        model = model_class(config)
    model.tie_weights()  # transformers 5.0 does not on the meta device; this can go when the floor is 5.1.
    return model
