"""Granite and GraniteMoe as plain Llama and Mixtral, and back, with a proof.

export.py   `export_model`: the verb, and the proof of equal logits, `proof_rule`; `export_text` of its record.
source.py   the model to be exported, read and checked: `find_source`, `read_donor`, `tensor_files`, `stored_dtype`.
fold.py     muP's multipliers folded into weights: `fold_factors`, `Conversion`, `write_weights`.
"""

from typing import TYPE_CHECKING

from hf_power.records.exports import lazily

if TYPE_CHECKING:
    from hf_power.export.export import export_model

__all__ = ["export_model"]

__getattr__ = lazily(
    __name__,
    {
        "export_model": "export.export",
    },
)
