"""The first weights under muP, mup_init_, for both forms."""

import math
import warnings
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_power.compat import DTYPE, PreTrainedConfig
from hf_power.models import kind_of
from hf_power.mup.probe import Probe
from hf_power.mup.roles import VERSION, PlainRecord, is_tied, other_width, plain_factors, roles_of
from hf_power.mup.rules import MLP_OUTPUTS, RECORD, multiplier_factors, mup_record, unwrapped
from hf_power.mup.scale import KV_HEADS, check_base_width, head_size, refuse_sizes_per_layer
from hf_power.records.errors import UserError

DROWNED = 5.0  # From so many times the embedding on, what a block adds is said to drown it.
_STD_NAMES = ("initializer_range", "init_std", "initializer_std")


def new_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model for causal language modeling as transformers initializes it; dtype None takes the config's."""
    kwargs = {} if dtype is None else {DTYPE: dtype}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)
    return model


def mup_init_(
    model: PreTrainedModel,
    *,
    base_width: int | None = None,
    base_config: PreTrainedConfig | None = None,
    embedding_multiplier: float | None = None,
) -> PreTrainedModel:
    """Initialize the weights in place under muP, from torch's global random numbers.

    With s = initializer_range, r = fan_in / base fan_in of the tensor and m = hidden_size / base_width: embeddings
    N(0, s**2); hidden matrices and experts N(0, s**2 / r); router N(0, (s / r)**2).

    **Multiplier form**, of a config from `mup_config`: lm_head N(0, s**2); norms 1; biases 0. Preset "ibm": router as
    a hidden matrix, and output projections additionally / sqrt(2 * layers).

    **Plain form**, of any other causal LM, with a base: the model stays what it is, and the multipliers are folded into
    its weights (see `mup_param_groups`): lm_head N(0, (s / m)**2), or if it is tied, a final gain of 1 / m. Other gains,
    biases and such vectors stay as they are. How the model was made is written into its config, as ``hf_power_mup``,
    and travels with it.

    Args:
        model: made by ``AutoModelForCausalLM.from_config``.
        base_width: the hidden_size at which muP changes nothing; all that grows with it is taken to grow in proportion.
        base_config: instead of base_width, the config of the model at its base, where not all sizes grow in proportion:
            an attention width or MLP width that stays, for example. Where the KV heads stay and those of the queries
            grow, no rule is exact: changes of attention grow as about m**0.3 in the coordinate check.
        embedding_multiplier: of the plain form, m_emb of Shen et al.'s Table 1, > 0, at every width: embeddings are
            N(0, (m_emb * s)**2) with the rate m_emb * eta, as if the model multiplied them in its forward pass. None for 1,
            with which nothing is changed at base_width; the paper has 12.

    Returns:
        The model.

    Raises:
        UserError: no base, or one beside `mup_config`; a tensor for which there is no rule; a tied head without a
            final gain; head sizes that grow; a multiplier that is not positive; weights on the meta device. Nothing has been
            changed then.

    Warns:
        UserWarning: what `drowned_embedding` and `kept_kv_heads` say.
    """
    wrapped, model = model, _with_values(model)
    given = base_width is not None or base_config is not None or embedding_multiplier is not None
    if mup_record(model) is not None:
        if given:
            raise UserError(
                "the config has been through mup_config, which has set base and multipliers: leave them out."
            )
        _init_multiplier_form_(model)
    else:
        if given or not hasattr(model.config, RECORD):
            setattr(model.config, RECORD, _new_record(model, base_width, base_config, embedding_multiplier))
        _init_plain_form_(model)
        for told in filter(None, (drowned_embedding(model), kept_kv_heads(model))):
            warnings.warn(told, stacklevel=2)
    _zero_padding_(model.get_input_embeddings())
    return wrapped


@torch.no_grad()
def _zero_padding_(embedding: nn.Module) -> None:
    if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
        embedding.weight[embedding.padding_idx].zero_()


@torch.no_grad()
def _init_multiplier_form_(model: PreTrainedModel) -> None:
    ibm, config = model.config.mup["preset"] == "ibm", model.config
    found = multiplier_factors(model)
    for name, tensor in model.named_parameters():
        if name not in found:
            continue
        if found[name].std is None:
            nn.init.constant_(tensor, 0.0 if name.endswith("bias") else 1.0)
            continue
        std = config.initializer_range / found[name].std
        if ibm and kind_of(name, wrapped=True) in ("attention output", *MLP_OUTPUTS):
            std /= math.sqrt(2 * config.num_hidden_layers)
        nn.init.normal_(tensor, mean=0.0, std=std)


@torch.no_grad()
def _init_plain_form_(model: PreTrainedModel) -> None:
    found, record = plain_factors(model), cast("PlainRecord", getattr(model.config, RECORD))
    scale = initializer_range(model.config)
    for name, tensor in model.named_parameters():
        if name not in found:
            continue
        std, multiplier = found[name].std, found[name].multiplier
        if std is not None:
            nn.init.normal_(tensor, mean=0.0, std=scale / std)
        elif multiplier != 1.0:  # The final gain, or its bias.
            value = multiplier * record["gain"] - record["gain_offset"]
            nn.init.constant_(tensor, 0.0 if name.endswith("bias") else value)


def _with_values(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself without wrappers; a UserError where it is none of transformers or has no values yet."""
    model = unwrapped(model)
    if not hasattr(model, "config"):
        raise UserError(
            f"mup_init_ takes a model of transformers for causal language modeling, got {type(model).__name__}: build it with "
            "AutoModelForCausalLM.from_config."
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise UserError(
            f"weights of {type(model).__name__} are on the meta device, where they have no values: build it outside of "
            'torch.device("meta") and of init_empty_weights.'
        )
    return model


def initializer_range(config: PreTrainedConfig) -> float:
    """The standard deviation of the first weights at base width, under the names that configs have for it."""
    return next((float(getattr(config, name)) for name in _STD_NAMES if getattr(config, name, None) is not None), 0.02)


def set_initializer_range(config: PreTrainedConfig, value: float) -> None:
    """Set it, under the name that the config has for it."""
    setattr(config, next((name for name in _STD_NAMES if hasattr(config, name)), _STD_NAMES[0]), value)


def drowned_embedding(model: PreTrainedModel) -> str | None:
    """One sentence about a model of the plain form whose blocks normalize what they add, and drown the embedding by it.

    Such a block adds as much at the first step as its norm's gain says, however small its matrices are, and what tells
    the tokens apart is heard after the embedding has grown to that size. So the best rate of the embedding is far above that
    of the matrices, the loss over the one learning rate has a valley for each, and which of the two is the deeper depends on
    the width (benchmarks/results/post_norm.md). None where all is well, as where the model scales its embeddings.
    """
    record = cast("PlainRecord", getattr(model.config, RECORD))
    times = 1 / initializer_range(model.config)
    sizes = [] if record["scaled_embeddings"] else [Probe(model).first_block(factor) for factor in (times, 2 * times)]
    if None in sizes or not sizes:
        return None
    (entering, added), (_, doubled) = cast("list[tuple[float, float]]", sizes)
    if not (0 < DROWNED * entering < added and doubled < 1.5 * added):
        return None
    return (
        f"{type(model).__name__} normalizes what its blocks add, and what its first block adds is {added / entering:.2g} times "
        "the embedding, whose best learning rate is then far above that of the matrices and does not carry over with theirs to "
        f"another width: give an embedding_multiplier of 1 / initializer_range, {times:.4g}, with which its deviation is 1."
    )


def kept_kv_heads(model: PreTrainedModel) -> str | None:
    """One sentence about a model of the plain form whose heads of keys and values stay while those of the queries grow.

    Each value then gathers the gradients of more query heads the wider the model is. With the rule of hidden matrices what
    attention adds changes as about m**0.2 to m**0.3. The rule of arXiv:2605.15290, whose rate of keys and values rises with the
    queries per head, makes that more in the coordinate check, not less; and Falcon has all three in one tensor, with one rate.
    """
    sizes = cast("PlainRecord", getattr(model.config, RECORD)).get("base_sizes", {})
    own = [name for name in KV_HEADS if isinstance(getattr(model.config, name, None), int)]
    is_kept = "num_attention_heads" in sizes and bool(own) and not any(name in sizes for name in own)
    has_one = bool(
        getattr(model.config, "multi_query", False) and not getattr(model.config, "new_decoder_architecture", False)
    )
    if not (is_kept or has_one):
        return None
    return (
        f"{type(model).__name__} keeps its number of heads of keys and values while that of the queries grows, for which muP has no "
        "exact rule: what attention adds changes as about m**0.3 with m = hidden_size / base width, so look for the best rate again "
        "near the target's width, or let both grow."
    )


def _new_record(
    model: PreTrainedModel,
    base_width: int | None,
    base_config: PreTrainedConfig | None,
    embedding_multiplier: float | None,
) -> PlainRecord:
    """Check that there is a rule for all of a model, and find out what the rules depend on; nothing is changed."""
    if (base_width is None) == (base_config is None):
        raise UserError(
            f"mup_init_ needs the base of {type(model).__name__}: give one of base_width, e.g. 256, and base_config."
        )
    if base_width is not None:
        check_base_width(base_width)
    multiplier = 1.0 if embedding_multiplier is None else float(embedding_multiplier)
    if not 0 < multiplier < math.inf:
        raise UserError(
            f"embedding_multiplier must be a positive number, got {embedding_multiplier}: leave it out for 1."
        )
    refuse_sizes_per_layer(model.config)
    sizes = None if base_config is None else base_sizes(model.config, base_config)
    roles_of(model, other_width(model, base_width, sizes))
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear head, so that muP cannot be applied to its logits.")
    probe = Probe(model)
    final_gain = probe.final_gain()
    if is_tied(model) and final_gain is None:
        raise UserError(
            f"{type(model).__name__} is tied and has no final gain, into which muP's 1 / m of the logits could be folded: "
            "set tie_word_embeddings to False."
        )
    before = cast("PlainRecord | None", getattr(model.config, RECORD, None))
    offset, gain = probe.gain(final_gain) if final_gain else (0, 1.0)
    # The weights of a model that is under muP already have its 1 / m in them.
    gain = gain if before is None else before["gain"]
    base: dict[str, object] = {"base_width": base_width} if sizes is None else {"base_sizes": sizes}
    return cast(
        "PlainRecord",
        {
            "version": VERSION,
            **base,
            "final_gain": final_gain,
            "gain_offset": offset,
            "gain": gain,
            "scaled_embeddings": probe.scales_embeddings(),
            "embedding_multiplier": multiplier,
        },
    )


def base_sizes(config: PreTrainedConfig, base: PreTrainedConfig) -> dict[str, object]:
    """The values of the base that differ from the model's own, which have to be sizes."""
    if type(base) is not type(config):
        raise UserError(
            f"base_config must be a {type(config).__name__}, as the model's own is, got {type(base).__name__}."
        )
    own, others = config.to_dict(), base.to_dict()
    skipped = (RECORD, "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
    differing = {name: value for name, value in others.items() if own.get(name) != value and name not in skipped}
    for name, value in differing.items():
        if isinstance(value, bool | str) or name in ("num_hidden_layers", "vocab_size"):
            raise UserError(
                f"base_config has {name} {value!r} where the model has {own.get(name)!r}: make it another width of the same "
                "model, and change nothing else."
            )
    for name in ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if differing.get(name) is not None:
            raise UserError(
                f"base_config has {name} {differing[name]} where the model has {own.get(name)}: the plain form keeps the head "
                "size, so change the number of heads."
            )
    if head_size(config) != head_size(base):
        raise UserError(
            f"base_config has heads of {head_size(base):g} features where the model has {head_size(config):g}: the plain form keeps "
            "the head size, so change the number of heads."
        )
    return differing
