"""The same logits: the proof that an exported model is the one that it came from."""

from pathlib import Path
from typing import Any

import torch
import transformers

from hf_power.compat import logits_first
from hf_power.records.errors import UserError

FAMILIES = {"granite": "Granite", "granitemoe": "GraniteMoe", "llama": "Llama", "mixtral": "Mixtral"}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Largest difference of a logit over the largest logit. The most among dense models and mixtures of 24 to 40 layers with
# random weights was 4.6e-7 in float32, 4.5e-3 in bfloat16, 4.4e-4 in float16: the rounding of each weight, added over
# the layers. In float64 the models round nothing but the norms, which both compute in float32, from equal numbers.
TOLERANCES = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}
PROOF_SHAPE = (2, 64)


def proof_rule(dtype: str, exact: bool, mixture: bool) -> tuple[torch.dtype, float]:
    """The dtype to compute the logits in, and the largest relative difference of them.

    float64 (and float32 for the halves) shows the rounding of the weights alone: computed in float32 itself, models of
    40 layers differed by 2e-6, of which 4e-7 came from their weights. Factors that are powers of two change no bit of
    bfloat16 in a dense model; float16 weights below 6e-5 are subnormal and lose bits, and Mixtral rounds the weights of
    its experts elsewhere than GraniteMoe. Both compute those weights in float32, whatever the dtype.
    """
    if exact and dtype == "bfloat16" and not mixture:
        return torch.bfloat16, 0.0
    if dtype in ("bfloat16", "float16"):
        return torch.float32, TOLERANCES[dtype]
    return torch.float64, TOLERANCES["float32" if mixture else dtype]


def fixed_logits(
    folder: Path, config: Any, dtype: str, arithmetic: torch.dtype, routes: list[torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """Logits of the fixed tokens, and the number of choices of experts that were not those of `routes`."""
    model, loading = getattr(transformers, f"{FAMILIES[config.model_type]}ForCausalLM").from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are listed then, and refused below
        experts_implementation="eager",  # the only one that computes in float64
    )
    for what in ("missing", "unexpected", "mismatched"):
        if wrong := sorted(map(str, loading[f"{what}_keys"])):
            raise UserError(f"{folder} has {what} tensors, {wrong[0]} the first of {len(wrong)}: pass a whole model.")
    model.to(arithmetic)
    rerouted = _take_routes(model, routes)
    sequences, length = PROOF_SHAPE
    shape = (sequences, min(length, config.max_position_embeddings))
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.double(), sum(rerouted)


def _take_routes(model: Any, routes: list[torch.Tensor]) -> list[int]:
    """Record the experts that a mixture chooses, or, if there are records, take them where rounding chose others.

    Two experts whose scores are equal but for rounding are no difference of the weights, but one of 3e-3 of the logits.
    """
    rerouted: list[int] = []
    recorded = list(reversed(routes))

    def hook(_router: Any, _inputs: Any, output: Any) -> Any:
        scores, weights, chosen = ordered = logits_first(output)
        if not recorded:
            routes.append(chosen)
            return output
        wanted = recorded.pop()
        same = (chosen.sort(-1).values == wanted.sort(-1).values).all(-1, keepdim=True)
        rerouted.append(int((~same).sum()))
        of_wanted = scores.float().gather(-1, wanted).softmax(-1).to(weights.dtype)
        taken = scores, torch.where(same, weights, of_wanted), torch.where(same, chosen, wanted)
        return taken if ordered is output else taken[::-1]

    for name, module in model.named_modules():
        if name.endswith((".block_sparse_moe.router", ".mlp.gate")):
            module.register_forward_hook(hook)
    return rerouted
