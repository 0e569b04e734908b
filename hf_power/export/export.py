"""The verb `export`: Granite and GraniteMoe as plain Llama and Mixtral, and back, with the proof that the logits stay."""

import contextlib
import math
import os
import platform
import shutil
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import safetensors
import torch
import transformers

from hf_power.checkpoints.older import add_older_names
from hf_power.compat import PreTrainedConfig, logits_first
from hf_power.export.fold import Conversion, fold_factors, write_weights
from hf_power.export.source import Source, find_source, read_donor, stored_dtype, tensor_files
from hf_power.models import FAMILIES, MULTIPLIERS, ROUTER_MODULES, head_dim
from hf_power.records.errors import UserError
from hf_power.records.files import read_object, temporary_name
from hf_power.records.results import Export, Proof
from hf_power.records.results import Source as SourceRecord
from hf_power.records.run import RUN_FILE, Run
from hf_power.records.schema import decode
from hf_power.version import __version__

HALVES = ("bfloat16", "float16")
# What goes along from the source beside config and weights: everything that loading, a card or a resumed record needs, and
# nothing of the training's state.
_COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", RUN_FILE, "recipe.json"),
)


def export_model(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    to: str,
    *,
    dtype: str | None = None,
    like: str | os.PathLike[str] | None = None,
) -> Export:
    """Write a Granite or GraniteMoe model as a plain Llama or Mixtral with the same logits, or the way back.

    The tensors pass one after the other, multiplied in float64 and rounded once. The result is then proved: both models
    are loaded, one after the other, and compute the logits of 2 x 64 seeded token ids; beyond the tolerance of the dtype
    nothing is left behind. The proof holds one whole model in memory, at 8 bytes per parameter for float32 and float64
    weights, 4 for bfloat16 and float16 (2 where bits are compared).

    Args:
        source: run folder, checkpoint-N folder, or id of a model on the Hub.
        output_dir: new or empty folder.
        to: "llama" (from Granite) or "mixtral" (from GraniteMoe); "granite" or "granitemoe" on the way back.
        dtype: of the exported weights, one of float64, float32, bfloat16, float16; by default the source's.
        like: on the way back, folder or config.json of the muP model whose multipliers to take; by default those in the
            source's export.json.

    Returns:
        The content of export.json, which lies in the output folder. proof.max_relative_difference is
        max |x - y| / max |x| over the logits x of the source, rounded to dtype, and y of the export, computed in
        proof.computed_in. For a mixture, proof.rerouted counts the tokens and layers in which rounding alone made the
        export choose other experts; there it is compared with the source's choice.

    Raises:
        UserError: bad input, before any work, or an export outside the tolerance.
    """
    output = Path(output_dir)
    _check_arguments(output, to, dtype, like)
    model = find_source(source, FAMILIES[to])
    # On the way to a plain model the multipliers are the source's own; on the way back they have to be found.
    donor = read_donor(model, like) if model.to.has_multipliers else model.config
    files = tensor_files(model)
    dtype = stored_dtype(files, model.folder, dtype)
    target = _target_config(model, donor, dtype)
    multipliers = {key: float(getattr(donor, key)) for key in MULTIPLIERS}
    factors = fold_factors(multipliers, head_dim(model.config), model.config.tie_word_embeddings)
    # A mantissa of one half means a power of two, which changes the exponent of a number and rounds nothing.
    exact = all(math.frexp(factor)[0] == 0.5 for factor in factors.values())
    if not exact and dtype in HALVES:
        _warn_of_rounding(dtype)
    if model.to.has_multipliers:
        # The factors are those on the way to the plain model.
        factors = {kind: 1 / factor for kind, factor in factors.items()}
    conversion = Conversion(files, model.config, model.to, factors, DTYPES[dtype])
    content = replace(_record(model, dtype), multipliers=multipliers, power_of_two=exact)
    with _made_whole(output) as folder:
        proof = _write_and_prove(model, conversion, target, exact, folder)
        content = replace(content, proof=proof)
        _judge(content, proof)
        _copy_beside(model.folder, folder)
        content.save(folder)
    return content


def export_text(content: Export) -> str:
    """The content of export.json in a few lines for a person."""
    proof, source = content.proof or Proof(), content.source
    tokens = source.get("tokens_seen")
    seen = "" if tokens is None else f", {tokens:,} tokens seen"
    numbers = ", ".join(f"{key} {value:g}" for key, value in content.multipliers.items())
    lines = [
        f"{content.from_} -> {content.to} in {content.dtype}, from {source.get('name')}{seen}",
        f"  multipliers  {numbers}",
        f"  proof        logits of {proof.tokens} tokens differ by at most {proof.max_relative_difference:.2g} of the "
        f"largest (tolerance {proof.tolerance:g}, computed in {proof.computed_in})",
    ]
    if proof.rerouted:
        lines.append(f"  experts      rounding changed the choice of experts for {proof.rerouted} tokens in a layer")
    if not content.power_of_two and content.dtype in HALVES:
        lines.append(f"  WARNING      factors that are no powers of two: {content.dtype} weights were rounded anew")
    return "\n".join(lines)


def _check_arguments(output: Path, to: str, dtype: str | None, like: str | os.PathLike[str] | None) -> None:
    if to not in FAMILIES:
        raise UserError(f"to must be one of {', '.join(FAMILIES)}, got {to!r}: pass the family to export to.")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}: pass one, or none for the source's.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"the output folder {output} exists and is not empty: pass a new one.")
    if like is not None and not FAMILIES[to].has_multipliers:
        raise UserError(
            f"like={str(like)!r} gives multipliers for granite and granitemoe, and {to} has none: leave it out."
        )


def _warn_of_rounding(dtype: str) -> None:
    warnings.warn(
        f"the multipliers' factors are not all powers of two, so that {dtype} weights are rounded anew: the exported model "
        'is near the source, not equal to it; preset "power_of_two" of mup_config would be exact.',
        stacklevel=3,
    )


@contextlib.contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes the output when the block ends, and goes when it fails."""
    temporary = temporary_name(output)
    try:
        yield temporary
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_beside(source: Path, folder: Path) -> None:
    for file in _COPIED:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    add_older_names(folder)


def _target_config(source: Source, donor: PreTrainedConfig, dtype: str) -> PreTrainedConfig:
    """The config with what the other family knows of it, and with the multipliers only if that is a muP family."""
    config, config_class = source.config, source.to.config_class
    # The other family's own fields are asked for, so that a field that only the source has does not get into its config.
    known = config_class().to_dict().keys() - {"model_type", "transformers_version", *MULTIPLIERS}
    fields = {key: value for key, value in config.to_dict().items() if key in known}
    if not source.to.has_multipliers:
        fields["head_dim"] = head_dim(config)
    else:
        fields |= {key: getattr(donor, key) for key in MULTIPLIERS}
        if head_dim(config) * config.num_attention_heads != config.hidden_size:
            fields["head_dim"] = head_dim(config)  # Granite's code reads it, although its config class has no field.
        if getattr(donor, "mup", None) is not None:
            fields["mup"] = donor.mup
    return config_class(**fields | {"architectures": [f"{source.to.prefix}ForCausalLM"], "dtype": dtype})


def _record(source: Source, dtype: str) -> Export:
    """The record of an export, without its numbers and its proof."""
    about: SourceRecord = {"name": source.name}
    lineage = None
    path, remedy = source.folder / RUN_FILE, "pass a run folder"
    # The schema is not asked for, because a model from elsewhere may lie beside somebody else's run.json.
    if path.exists():
        content = read_object(path, schema=None, remedy=remedy)
        run = decode(Run, content, path, remedy)
        lineage = run.lineage
        if content.get("tokens_seen") is not None:
            about["tokens_seen"] = run.tokens_of_weights
    modules = {"torch": torch, "transformers": transformers, "safetensors": safetensors}
    versions = {name: str(module.__version__) for name, module in modules.items()}
    return Export(
        from_=source.family.model_type,
        to=source.to.model_type,
        dtype=dtype,
        head_dim=head_dim(source.config),
        tied=bool(source.config.tie_word_embeddings),
        source_config={key: value for key, value in source.raw.items() if key != "_name_or_path"},
        source=about,
        lineage=lineage or uuid.uuid4().hex,
        versions={"hf_power": __version__, "python": platform.python_version()} | versions,
    )


def _write_and_prove(
    source: Source, conversion: Conversion, target: PreTrainedConfig, exact: bool, into: Path
) -> Proof:
    """Write config and weights, and compare the logits of the fixed tokens; no two models are in memory at once."""
    # The source is computed first and its logits are kept, because loading it beside the export would take twice the memory.
    rule = proof_rule(conversion.dtype, exact, source.family.has_experts)
    routes: list[torch.Tensor] = []
    expected, _ = fixed_logits(source.folder, source.config, rule, routes)
    into.mkdir(parents=True)
    target.save_pretrained(into)
    write_weights(conversion, into)
    found, rerouted = fixed_logits(into, target, rule, routes)
    return Proof(
        tokens=expected.shape[0] * expected.shape[1],
        max_relative_difference=float((expected - found).abs().max() / expected.abs().max()),
        tolerance=rule.tolerance,
        computed_in=str(rule.arithmetic).removeprefix("torch."),
        rerouted=rerouted if routes else None,
    )


def _judge(content: Export, proof: Proof) -> None:
    """Raise a UserError for an export that is not near enough to its source."""
    difference, tolerance = proof.max_relative_difference, proof.tolerance
    # Written so that NaN, which is neither larger nor smaller than anything, is no proof either.
    if difference is None or tolerance is None or not difference <= tolerance:
        raise UserError(
            f"the export of {content.source['name']} differs by {difference:.3g} of the largest logit, beyond the "
            f"tolerance of {tolerance:g} in {content.dtype}, and was not kept: export to float32 or float64, or look "
            "for damage in the source."
        )


DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Largest difference of a logit over the largest logit. The most among dense models and mixtures of 24 to 40 layers with
# random weights was 4.6e-7 in float32, 4.5e-3 in bfloat16, 4.4e-4 in float16: the rounding of each weight, added over
# the layers. In float64 the models round nothing but the norms, which both compute in float32, from equal numbers.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Sequences, and tokens in each: enough for every head and expert to take part, and few enough for a CPU.
PROOF_SHAPE = (2, 64)


class ProofRule(NamedTuple):
    """How two models are compared: the dtype of their weights, that of the arithmetic, the largest relative difference."""

    weights: torch.dtype
    arithmetic: torch.dtype
    tolerance: float


def proof_rule(weights: torch.dtype, exact: bool, mixture: bool) -> ProofRule:
    """The dtype to compute the logits in, and the largest relative difference of them.

    float64 (and float32 for the halves) shows the rounding of the weights alone: computed in float32 itself, models of
    40 layers differed by 2e-6, of which 4e-7 came from their weights. Factors that are powers of two change no bit of
    bfloat16 in a dense model; float16 weights below 6e-5 are subnormal and lose bits, and Mixtral rounds the weights of
    its experts elsewhere than GraniteMoe. Both compute those weights in float32, whatever the dtype.
    """
    if exact and weights == torch.bfloat16 and not mixture:
        return ProofRule(weights, torch.bfloat16, 0.0)
    if weights in (torch.bfloat16, torch.float16):
        return ProofRule(weights, torch.float32, TOLERANCES[weights])
    return ProofRule(weights, torch.float64, TOLERANCES[torch.float32 if mixture else weights])


def fixed_logits(
    folder: Path, config: PreTrainedConfig, rule: ProofRule, routes: list[torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """Logits of the fixed tokens, and the number of choices of experts that were not those of `routes`."""
    loaded = FAMILIES[config.model_type].model_class.from_pretrained(
        folder,
        dtype=rule.weights,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # So that they are listed, and refused below with the others.
        experts_implementation="eager",  # No other implementation computes in float64.
    )
    # transformers' types know the model alone, and not what comes with it under output_loading_info.
    model, loading = cast("tuple[torch.nn.Module, dict[str, list[object]]]", loaded)
    for what in ("missing", "unexpected", "mismatched"):
        if wrong := sorted(map(str, loading[f"{what}_keys"])):
            raise UserError(f"{folder} has {what} tensors, {wrong[0]} the first of {len(wrong)}: pass a whole model.")
    model.to(rule.arithmetic)
    rerouted = _take_routes(model, routes)
    sequences, length = PROOF_SHAPE
    shape = (sequences, min(length, config.max_position_embeddings))
    # A generator of its own, so that the tokens are the same whatever was drawn before.
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.double(), sum(rerouted)


def _take_routes(model: torch.nn.Module, routes: list[torch.Tensor]) -> list[int]:
    """Record the experts that a mixture chooses, or, if there are records, take them where rounding chose others.

    Two experts whose scores are equal but for rounding are no difference of the weights, but one of 3e-3 of the logits.
    """
    rerouted: list[int] = []
    # The hooks run in the order of the layers, once each, so that a choice is found by its position alone.
    recorded = list(reversed(routes))

    def hook(
        _router: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        scores, weights, chosen = ordered = logits_first(output)
        if not recorded:
            routes.append(chosen)
            return output
        wanted = recorded.pop()
        same = (chosen.sort(-1).values == wanted.sort(-1).values).all(-1, keepdim=True)
        rerouted.append(int((~same).sum()))
        # The weights of other experts have to be worked out anew, as both models do: a softmax over the chosen scores.
        of_wanted = scores.float().gather(-1, wanted).softmax(-1).to(weights.dtype)
        taken = scores, torch.where(same, weights, of_wanted), torch.where(same, chosen, wanted)
        return taken if ordered is output else taken[::-1]

    for name, module in model.named_modules():
        if name.endswith(ROUTER_MODULES):
            module.register_forward_hook(hook)
    return rerouted
