"""The first weights under muP, mup_init_, for both forms; and what the plain form has to know of a forward pass."""

import contextlib
import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_power.compat import DTYPE, PreTrainedConfig
from hf_power.models import kind_of
from hf_power.mup.roles import VERSION, PlainRecord, is_tied, other_width, plain_factors, roles_of
from hf_power.mup.rules import MLP_OUTPUTS, RECORD, multiplier_factors, mup_record
from hf_power.mup.scale import head_size, refuse_sizes_per_layer
from hf_power.records.errors import UserError, refused_by

_STD_NAMES = ("initializer_range", "init_std", "initializer_std")


class _StopForward(Exception):  # noqa: N818 - no error: it ends a forward pass of which the rest is not needed.
    pass


def new_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model for causal language modeling as transformers initializes it; dtype None takes the config's."""
    kwargs = {} if dtype is None else {DTYPE: dtype}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)
    return model


def mup_init_(
    model: PreTrainedModel, *, base_width: int | None = None, base_config: PreTrainedConfig | None = None
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

    Returns:
        The model.

    Raises:
        UserError: no base, or one beside `mup_config`; a tensor for which there is no rule; a tied head without a
            final gain; head sizes that grow. Nothing has been changed then.
    """
    if not hasattr(model, "config"):
        raise UserError(
            f"mup_init_ takes a model of transformers for causal language modeling, got {type(model).__name__}: build it with "
            "AutoModelForCausalLM.from_config."
        )
    given = base_width is not None or base_config is not None
    if mup_record(model) is not None:
        if given:
            raise UserError(
                "this model's config has been through mup_config, which has set the base: leave it out here."
            )
        _init_multiplier_form_(model)
    else:
        if given or not hasattr(model.config, RECORD):
            record = _new_record(model, base_width, base_config)
            setattr(model.config, RECORD, record)
        _init_plain_form_(model)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
        with torch.no_grad():
            embedding.weight[embedding.padding_idx].zero_()
    return model


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


def initializer_range(config: PreTrainedConfig) -> float:
    """The standard deviation of the first weights at base width, under the names that configs have for it."""
    return next((float(getattr(config, name)) for name in _STD_NAMES if getattr(config, name, None) is not None), 0.02)


def set_initializer_range(config: PreTrainedConfig, value: float) -> None:
    """Set it, under the name that the config has for it."""
    setattr(config, next((name for name in _STD_NAMES if hasattr(config, name)), _STD_NAMES[0]), value)


def _new_record(model: PreTrainedModel, base_width: int | None, base_config: PreTrainedConfig | None) -> PlainRecord:
    """Check that there is a rule for all of a model, and find out what the rules depend on; nothing is changed."""
    if (base_width is None) == (base_config is None):
        raise UserError(
            f"mup_init_ needs the base of {type(model).__name__}: give one of base_width, e.g. 256, and base_config."
        )
    if base_width is not None and base_width < 1:
        raise UserError(f"base_width must be a positive number of features, got {base_width}.")
    refuse_sizes_per_layer(model.config)
    sizes = None if base_config is None else base_sizes(model.config, base_config)
    roles_of(model, other_width(model, base_width, sizes))
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear head, so that muP cannot be applied to its logits.")
    probe = _Probe(model)
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


class _Probe:
    """What a forward pass of two tokens shows; weights, gradients and random numbers are left as they are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokens = torch.tensor([[1, 0]], device=model.device)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without dropout, gradients, or a trace in the random numbers."""
        was_training = self.model.training
        self.model.train(False)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), refused_by("the model's forward pass"):
                yield
        finally:
            self.model.train(was_training)

    def final_gain(self) -> str | None:
        """The name of the module with a gain whose output is the head's input; None where there is none."""
        outputs: dict[str, torch.Tensor] = {}
        inputs: list[torch.Tensor] = []
        handles = []
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 1:
                handles.append(module.register_forward_hook(_keep_output(outputs, name)))
        head = self.model.get_output_embeddings()
        handles.append(head.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
        try:
            with self._quiet():
                self.model(input_ids=self.tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not inputs:
            return None
        seen = inputs[-1]
        same = {name: output for name, output in outputs.items() if output.shape == seen.shape}
        alike = [name for name, output in same.items() if torch.equal(output, seen)]
        if alike:
            return alike[-1]
        for name, output in same.items():
            if torch.nn.functional.cosine_similarity(output.flatten(), seen.flatten(), dim=0) > 0.999:
                ratio = float(seen.norm() / output.norm())
                raise UserError(
                    f"{type(self.model).__name__} multiplies what {name} puts out by {ratio:.3g} before its head, a scaling of "
                    "its own, for which the plain form of muP has no rule."
                )
        return None

    def gain(self, name: str) -> tuple[int, float]:
        """The offset, 1 where the gain of this module is 1 + weight and 0 where it is the weight, and the gain itself.

        A gain that differs between features has been trained, and begins at 1 again.
        """
        module = self.model.get_submodule(name)
        weight = cast("torch.Tensor", module.weight)
        probe = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)[None, None]
        zeros = {key: torch.zeros_like(value) for key, value in module.named_parameters()}
        with self._quiet():
            offset = int(bool(functional_call(module, zeros, (probe,)).ne(0).any()))
        return offset, weight[0].item() + offset if bool((weight == weight[0]).all()) else 1.0

    def scales_embeddings(self) -> bool:
        """Whether what enters the first block is the embedding times sqrt(hidden_size)."""
        weight = cast("torch.Tensor", self.model.get_input_embeddings().weight)
        name = next(n for n, p in self.model.named_parameters(remove_duplicate=False) if p is weight)
        rows = weight.detach()[self.tokens]
        once, twice = (self._first_input({name: weight.detach() * k}) for k in (1, 2))
        # Positions drop out of the difference, and so does all where a norm follows the embedding.
        change = (twice - once).flatten().float()
        if change.shape != rows.flatten().shape:
            raise UserError(
                f"what enters the first block of {type(self.model).__name__} is no sum with the embedding of each token, so "
                "that muP cannot tell how the model scales it."
            )
        factor = float(change @ rows.flatten().float() / rows.float().square().sum().clamp(min=1e-30))
        return math.isclose(factor, math.sqrt(self.model.config.hidden_size), rel_tol=0.02)

    def _first_input(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """What enters the first block, with other weights in the place of some."""
        seen: list[torch.Tensor] = []

        def stop(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            seen.append(cast("torch.Tensor", args[0] if args else kwargs["hidden_states"]))
            raise _StopForward

        handle = _first_block(self.model).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with self._quiet(), contextlib.suppress(_StopForward):
                functional_call(self.model, weights, (), {"input_ids": self.tokens, "use_cache": False})
        finally:
            handle.remove()
        return seen[-1]


def _keep_output(outputs: dict[str, torch.Tensor], name: str) -> object:
    def hook(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs[name] = output

    return hook


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's blocks: the one with most parameters among the outermost lists.

    Raises:
        UserError: a model without such a list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of blocks, so that muP cannot tell what enters them.")
    return max(lists, key=lambda each: sum(p.numel() for p in each.parameters()))


def _first_block(model: PreTrainedModel) -> nn.Module:
    return blocks_of(model)[0]
