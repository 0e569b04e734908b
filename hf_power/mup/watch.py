"""What a coordinate check looks at in a model: the outputs of its parts, under names that all families share."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_power.compat import logits_first
from hf_power.mup.optimizer import factors_of
from hf_power.mup.probe import blocks_of
from hf_power.mup.roles import final_gain_of, is_tied
from hf_power.mup.rules import mup_record

# What the table calls the parts of a block that families name in different ways; others keep their own name.
_LABELS = {
    **dict.fromkeys(("self_attn", "attn", "attention", "self_attention"), "attention"),
    **dict.fromkeys(("mlp", "feed_forward"), "mlp"),
    **dict.fromkeys(("block_sparse_moe", "moe"), "moe"),
}
_ROUTERS = ("router", "gate")
# In the check of the plain form heads and routers begin at this part of their init. What the initial readout makes of its
# changed input falls as width**-0.5, and without the multipliers that keep this input steady it is most of the change: correct
# routers measure -0.5, with this -0.1, while a head whose rate is divided by m twice goes from -0.3 to -1. A tied head is
# the embedding and keeps its init, so that the logits of its update alone are measured.
READOUT = 1 / 8


@torch.no_grad()
def quieten_readouts_(model: PreTrainedModel) -> None:
    """Multiply routers and a head of its own by READOUT."""
    for name, own in factors_of(model).items():
        if own.role in ("head", "router"):
            model.get_parameter(name).mul_(READOUT)


def watched(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What enters the first block, and what the parts of all and the final norm put out, in the latest pass."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(label: str, scale: float = 1.0) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            # Attention and the router return tuples that begin with their output.
            first = logits_first(output)[0] if isinstance(output, tuple) else output
            outputs[label] = first.detach().float() / scale

        return hook

    def entering(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        outputs["embedding"] = (args[0] if args else kwargs["hidden_states"]).detach().float()

    blocks = blocks_of(model)
    blocks[0].register_forward_pre_hook(entering, with_kwargs=True)
    for i, block in enumerate(blocks):
        for name, part in block.named_children():
            if any(tensor.ndim > 1 for tensor in part.parameters()):
                part.register_forward_hook(keep(f"layer {i} {_LABELS.get(name, name)}"))
            for inner, module in part.named_modules():
                if inner.rsplit(".", 1)[-1] in _ROUTERS:
                    module.register_forward_hook(keep(f"layer {i} router"))
    final, scale = final_gain_of(model)
    if final is not None:
        model.get_submodule(final).register_forward_hook(keep("final norm", scale))
    if is_tied(model) and mup_record(model) is None:
        weight = cast("torch.Tensor", model.get_input_embeddings().weight)
        first = weight.detach().clone()

        def of_update(_head: nn.Module, args: tuple[torch.Tensor], _output: torch.Tensor) -> None:
            outputs["tied logits"] = nn.functional.linear(args[0], weight - first).detach().float()

        model.get_output_embeddings().register_forward_hook(of_update)
    return outputs
