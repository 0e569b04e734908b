"""The check before a big run: is muP right, and is the recipe's learning rate the best one at a cell it has not seen?

check.py  the runs at the cell, and what is written of them: verify
page.py   regret and verdict of the runs, the page as JSON and as text: Page, judge, page_text
picture.py  the picture of the page: plot_verify
evidence.py  all results below a folder on one page for a reviewer: make_evidence, write_evidence
templates/  the template of that page
"""

from typing import TYPE_CHECKING

from hf_power.records.exports import lazily

if TYPE_CHECKING:
    from hf_power.verify.check import verify
    from hf_power.verify.evidence import write_evidence
    from hf_power.verify.page import Page

__all__ = ["Page", "verify", "write_evidence"]

__getattr__ = lazily(
    __name__,
    {
        "Page": "verify.page",
        "verify": "verify.check",
        "write_evidence": "verify.evidence",
    },
)
