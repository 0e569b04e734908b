"""The records of what is done with a model: eval.json, export.json and push.json."""

from dataclasses import dataclass, field, fields, replace
from typing import TypedDict

from hf_power.records.files import REMEDY, Record
from hf_power.records.run import Data, Hardware, Model
from hf_power.records.schema import UNTIL_KNOWN, Amount, Count, Json

EVAL_FILE, EXPORT_FILE, PUSH_FILE = "eval.json", "export.json", "push.json"


@dataclass(frozen=True)
class Evaluation(Record):
    """Results of one model, in eval.json; those on text and those on tasks come from two verbs and share the file.

    Attributes:
        metrics: loss (nats per token), perplexity, accuracy, and bits_per_byte where the tokenizer's bytes are known.
        data: the text, with the fingerprint of the scored tokens.
        tasks: task -> metric -> value, with "num_samples".
    """

    FILE = EVAL_FILE
    REMEDY = REMEDY

    model: Model = field(default_factory=Model)
    metrics: dict[str, float] | None = field(default=None, metadata=UNTIL_KNOWN)
    num_tokens: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    num_bytes: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    data: Data | None = field(default=None, metadata=UNTIL_KNOWN)
    dtype: str | None = field(default=None, metadata=UNTIL_KNOWN)
    batch_size: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    processes: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    versions: dict[str, str] | None = field(default=None, metadata=UNTIL_KNOWN)
    hardware: Hardware | None = field(default=None, metadata=UNTIL_KNOWN)
    seconds: Amount | None = field(default=None, metadata=UNTIL_KNOWN)
    tasks: dict[str, dict[str, float]] | None = field(default=None, metadata=UNTIL_KNOWN)
    tasks_settings: dict[str, dict[str, Json]] | None = field(default=None, metadata=UNTIL_KNOWN)

    def added_to(self, before: "Evaluation") -> "Evaluation":
        """These results, and those before of another kind or another task, if they are of the same weights."""
        if before.model.get("weights_sha256") != self.model.get("weights_sha256"):
            return self
        new = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        new["model"] = {**before.model, **self.model}
        for name in ("tasks", "tasks_settings"):
            if name in new:
                new[name] = {**(getattr(before, name) or {}), **new[name]}
        return replace(before, **new)


class Source(TypedDict, total=False):
    """The model that was exported; tokens_seen only if it has a run.json."""

    name: str | None
    tokens_seen: Count | None


@dataclass(frozen=True)
class Proof:
    """The comparison of the logits of fixed tokens: max |x - y| / max |x| over the source's x and the export's y."""

    tokens: Count | None = None
    max_relative_difference: float | None = None
    tolerance: Amount | None = None
    computed_in: str | None = None
    rerouted: Count | None = field(default=None, metadata=UNTIL_KNOWN)


@dataclass(frozen=True)
class Export(Record):
    """The record of an export.

    Attributes:
        from_: family of the source ("from" in the file), and `to` that of the export.
        multipliers: muP's multipliers that were folded into the weights.
        power_of_two: whether their factors are, so that folding rounds nothing.
        source_config: config.json of the source, from which `--to granite` finds its way back.
        proof: None until the logits were compared.
    """

    FILE = EXPORT_FILE
    REMEDY = "pass the folder of an exported model"

    from_: str = ""
    to: str = ""
    dtype: str = ""
    multipliers: dict[str, float] = field(default_factory=dict)
    power_of_two: bool | None = None
    head_dim: Count | None = None
    tied: bool | None = None
    source_config: dict[str, Json] = field(default_factory=dict)
    source: Source = field(default_factory=Source)
    lineage: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    proof: Proof | None = field(default=None, metadata=UNTIL_KNOWN)


@dataclass(frozen=True)
class Target:
    """A revision of the repository that a push is to reach.

    Attributes:
        step: of the weights; None if they could not be staged.
        status: "waiting", "failed", "kept" or "verified".
        error: why it failed, and `reason` why what is there was kept.
        commit: of the verified revision, with its number of files and bytes.
    """

    step: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    status: str = "waiting"
    error: str | None = field(default=None, metadata=UNTIL_KNOWN)
    reason: str | None = field(default=None, metadata=UNTIL_KNOWN)
    commit: str | None = field(default=None, metadata=UNTIL_KNOWN)
    files: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    bytes: Count | None = field(default=None, metadata=UNTIL_KNOWN)


@dataclass(frozen=True)
class Push(Record):
    """The record of a run's pushes: to user/name, what became of each revision, and whether all of them were verified.

    `revision` is that of the finished model, `checkpoints` is "none", "last" or "all".
    """

    FILE = PUSH_FILE
    REMEDY = "delete it to push anew"

    repo: str
    revision: str | None
    checkpoints: str | None
    license: str | None
    complete: bool
    targets: dict[str, Target]
