"""From dataclasses to a parser whose complaints are one sentence each, and from a command line to settings."""

import argparse
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers.hf_argparser import DataClassType, HfArgumentParser

from hf_power.cli.arguments import EvaluateArguments
from hf_power.cli.front import EXIT_CODES
from hf_power.compat import own_flags
from hf_power.data.text import DataArguments
from hf_power.records.errors import UserError, refused_by, shown
from hf_power.records.files import parse_json
from hf_power.register import check_parts
from hf_power.settings.arguments import unknown_setting
from hf_power.settings.read import flatten, load_yaml
from hf_power.settings.sections import SECTIONS, TRAINING_DEFAULTS, Tokens, unknown_key
from hf_power.settings.settings import Settings

# Where transformers says little, or something else than hf-power does.
OWN_HELP = {
    "output_dir": "Folder of the run: run.json, checkpoints, the finished model. It is needed.",
    "per_device_train_batch_size": "Blocks of an optimizer step on one device; with the devices, the accumulation and "
    "block_size they make tokens_per_step.",
    "learning_rate": "eta_max, the cap of the power schedule; of other schedules the peak.",
    "lr_scheduler_type": "power, or a schedule of transformers.",
    "lr_scheduler_kwargs": "Arguments of the schedule as JSON; of power: a, b, batch_exponent, decay_ratio, decay_shape "
    "and more, see get_power_schedule.",
}

# The words that HfArgumentParser takes for a truth value.
_TRUTHS = {"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"}


class Parser(HfArgumentParser):
    """HfArgumentParser with positional fields, one spelling of each option in the help, and a `UserError` for a mistake.

    A dash in the name of an option is taken for an underscore, so that --dry-run is --dry_run. An option that is not known
    is refused with the nearest one that is, before anything that is missing is named.
    """

    def __init__(self, verb: str, summary: str, *kinds: type) -> None:
        # argparse adds --help while it is being initialized, through the method below, so these come first.
        self.names: list[str] = []
        # Options that set the field of another name, as --no_X sets X.
        self.fields: dict[str, str] = {}
        self.switches: set[str] = set()
        self.has_positional = False
        super().__init__(
            [DataClassType(kind) for kind in kinds],
            prog=f"hf-power {verb}",
            description=summary,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            # An abbreviation would change its meaning with the next option that is added.
            allow_abbrev=False,
        )
        # RunArguments reads the text itself, and its error names the setting.
        self.register("type", Tokens, str)

    def add_argument(self, *names: str, **given: Any) -> argparse.Action:
        """Add a field as HfArgumentParser asks for it, with what its metadata say beyond argparse's own keywords."""
        # HfArgumentParser hands the metadata of a field on as keywords, so what argparse does not know is taken out here.
        positional, option = given.pop("positional", False), given.pop("option", None)
        default = given.get("default")
        text = str(given.get("help", ""))
        if default not in (None, False, argparse.SUPPRESS) and default != []:
            text += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
        given["help"] = text.replace("%", "%%")
        if positional:
            self.has_positional = True
            if not given.pop("required", False):
                given["nargs"] = "?"
            return super().add_argument(names[0].lstrip("-"), **given)
        if option is not None:
            names, given["dest"] = (f"--{option}",), names[0].lstrip("-")
        # The spelling with dashes is dropped from the help, because `spelled` takes it for every option.
        names = tuple(name for name in names if "-" not in name.lstrip("-"))
        self.names += [name.lstrip("-") for name in names]
        self.fields |= {name.lstrip("-"): str(given["dest"]) for name in names if "dest" in given}
        if "choices" in given:
            given["type"] = functools.partial(_chosen, tuple(map(str, given["choices"])), given["type"])
        elif given.get("const") is True and isinstance(default, str):
            # HfArgumentParser takes a field that is a text or a bool for a bool.
            given["type"] = str
        if given.get("nargs") == "?" and given.get("const") is True:
            self.switches |= set(names)
        return super().add_argument(*names, **given)

    def read(self, argv: list[str]) -> tuple[Any, ...]:
        """The dataclasses, filled from a command line."""
        return self.filled(self.spelled(argv))

    def spelled(self, argv: list[str]) -> list[str]:
        """The command line with underscores in its options, and with =true after a switch that stands alone.

        A switch takes a truth value if one follows, so argparse would give it the positional word that follows.
        """
        words: list[str] = []
        for word, following in zip(argv, [*argv, ""][1:], strict=True):
            if _is_number(word) and words and words[-1].startswith("--") and "=" not in words[-1]:
                # argparse takes -5M for an option.
                words[-1] += f"={word}"
                continue
            if word.startswith("-") and not _is_number(word):
                name, equals, value = word.partition("=")
                name = name if not name.startswith("--") else "--" + name[2:].replace("-", "_")
                if (plain := name.lstrip("-")) not in self.names:
                    raise UserError(self.unknown(name, plain, self.names))
                alone = self.has_positional and name in self.switches and not equals
                if alone and following.lower() not in _TRUTHS:
                    equals, value = "=", "true"
                word = f"{name}{equals}{value}"
            words.append(word)
        return words

    # The sentence for an option that is not known.
    unknown = staticmethod(unknown_key)

    def filled(self, words: list[str]) -> tuple[Any, ...]:
        """The dataclasses, filled from a command line that `spelled` has gone through."""
        return _complete(
            self.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
        )

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a `UserError`, in place of the usage and an exit."""
        ends = message.endswith(("?", "..."))
        raise UserError(f"command line: {message if ends else message.rstrip('.') + '.'}")


class EvaluateParser(Parser):
    """The options of evaluate; the data of the model's own run are the defaults of the section data."""

    def __init__(self, verb: str, summary: str) -> None:
        super().__init__(verb, summary, EvaluateArguments, DataArguments)

    def read(self, argv: list[str]) -> tuple[EvaluateArguments, DataArguments]:
        """The arguments, and where the held-out text comes from."""
        from hf_power.evaluate.heldout import data_of_run

        # The defaults depend on the model, so the options are read once for its name and then again with them.
        words = self.spelled(argv)
        model = Path(self.parse_known_args(words)[0].model)
        own, scored = data_of_run(model)
        self.set_defaults(max_tokens=scored, **flatten({"data": own}, f"{model}/run.json"))
        arguments, data = self.filled(words)
        return arguments, data


class SettingsParser(Parser):
    """[FILE.yaml] [--key value ...], for the settings of a run and for the arguments that a verb has beside them."""

    unknown = staticmethod(unknown_setting)

    def __init__(self, verb: str, summary: str, *beside: type) -> None:
        self.needs = "--recipe recipe.json --output_dir FOLDER " if beside else ""
        # An older transformers lacks more than this, and would end in a traceback of its own.
        check_parts(("_get_grad_norm",))
        self.beside = beside
        super().__init__(verb, summary, *beside, *SECTIONS.values())
        self.set_defaults(**TRAINING_DEFAULTS)

    def read(self, argv: list[str]) -> tuple[Any, ...]:
        """What the verb has beside the settings, and the settings; the command line wins over the file."""
        files = [word for word in argv[:1] if not word.startswith("-")]
        words = self.spelled(own_flags(argv[len(files) :]))
        for name, value in itertools.pairwise(words):
            # TrainingArguments would say what is wrong with it, and not with which argument.
            if name.startswith("--") and name.endswith(("_kwargs", "_config")) and value.startswith("{"):
                parse_json(value.encode(errors="replace"), name, "write it with double quotes")
        values = load_yaml(files[0]) if files else {}
        self.set_defaults(**values)
        # TrainingArguments checks its values as it is built, which is here.
        with refused_by("settings"):
            parsed = self.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
        filled = _complete(parsed)
        given = {word.lstrip("-").split("=")[0] for word in words if word.startswith("--")}
        given = {self.fields.get(name, name) for name in given}
        given |= {name for name, value in values.items() if value is not None}
        *beside, model, mup, data, run, training = filled
        return (*beside, Settings(model, mup, data, run, training, frozenset(given), files[0] if files else None))

    def format_help(self) -> str:
        """The options without the hundred of TrainingArguments that have the defaults of transformers."""
        page = argparse.ArgumentParser(
            self.prog,
            usage=f"%(prog)s SETTINGS.yaml {self.needs}[--key value ...]",
            description=f"{self.description}\n\nEach key of the YAML is an option of the same name.",
            epilog=f"and every other argument of transformers.TrainingArguments\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sections = {f"options of {self.prog}": kind for kind in self.beside} | SECTIONS
        for section, kind in sections.items():
            group = page.add_argument_group(section)
            for key in (each for each in dataclasses.fields(kind) if each.init):
                if section != "training" or key.name in TRAINING_DEFAULTS:
                    text = OWN_HELP.get(key.name) or " ".join(key.metadata["help"].split()).replace("%", "%%")
                    default = TRAINING_DEFAULTS.get(key.name, key.default)
                    group.add_argument(f"--{key.name}", help=f"{text} (default: {default})")
        return page.format_help()


def parse_settings(argv: Sequence[str]) -> Settings:
    """[FILE.yaml] [--key value ...] -> Settings; the command line wins over the file."""
    settings: Settings = SettingsParser("pretrain", "").read(list(argv))[0]
    return settings


def _chosen(choices: Sequence[str], read: Callable[[str], object], text: str) -> object:
    """One of the choices of an option, with the nearest one where it is none."""
    if text not in choices:
        raise argparse.ArgumentTypeError(unknown_key(shown(text), text, list(choices)))
    return read(text)


def _complete(parsed: tuple[Any, ...]) -> tuple[Any, ...]:
    """What was parsed without the words that are left over, of which there may be none."""
    *filled, rest = parsed
    if rest:
        raise UserError(f"command line: {shown(rest[0])} belongs to no option: leave it out, or name its option.")
    return tuple(filled)


def _is_number(word: str) -> bool:
    """Whether a word is a negative number, perhaps with a unit, and so no option."""
    return re.match(r"-\.?\d", word) is not None
