"""Parameters and training FLOPs of a model, counted without giving it any memory."""

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING


def flops_per_token(config: Any, block_size: int) -> float:
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

    Returns:
        FLOPs per token.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * block_size
    return float(6 * (_active_matrices(config) + attention))


def usual_utilisation(config: Any) -> float:
    """Share of the peak to plan with: 0.4, and 0.25 for a mixture of experts.

    One H200 reached 0.48 for a dense model of 1.2B parameters and 0.27 for a mixture of 1.3B
    (benchmarks/results/accelerator_NVIDIA-H200.md, compiled, bf16); several devices also communicate, which was not measured.

    Args:
        config: of the model; None if only its size is known.
    """
    return 0.25 if getattr(config, "num_local_experts", None) else 0.4


def count_parameters(config: Any) -> dict[str, int]:
    """Parameters of a model that is never given any memory.

    Returns:
        "parameters"; "parameters_without_embeddings", as transformers' num_parameters counts them; and
        "active_parameters", those without the experts that a token does not pass.
    """
    model = _without_memory(config)
    total = model.num_parameters()
    idle = sum(p.numel() * (1 - _share(config, p)) for p in model.parameters())
    return {
        "parameters": total,
        "parameters_without_embeddings": model.num_parameters(exclude_embeddings=True),
        "active_parameters": round(total - idle),
    }


def _active_matrices(config: Any) -> int:
    """Entries of the matrices that a token is multiplied with, the head once, the embedding not."""
    matrices = [(name, p) for name, p in _without_memory(config).named_parameters() if p.ndim > 1]
    inner: float = sum(p.numel() * _share(config, p) for name, p in matrices if not name.endswith(_EMBEDDINGS))
    head: int = config.vocab_size * config.hidden_size
    return round(inner) + head


_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def _share(config: Any, parameter: torch.Tensor) -> float:
    """The part of a tensor that a token passes; experts are the tensors of three dimensions."""
    return float(config.num_experts_per_tok / config.num_local_experts) if parameter.ndim == 3 else 1.0


def _without_memory(config: Any) -> Any:
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)  # from_config would partition it under ZeRO 3
