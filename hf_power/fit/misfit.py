"""Whether a law describes the cells that it was fitted to, in words."""

import math

import numpy as np

from hf_power.fit.law import FittedLaw
from hf_power.fit.optima import Optima
from hf_power.fit.squares import Array

# A law whose cells lie further off than this, beyond their own errors, is of little use: a factor of 1.19.
MAX_SPREAD_OCTAVES = 0.25
# A trend is worth a sentence if it moves the rate by so much, root mean square over the cells, and is so unlikely by
# chance; several are looked at, and cells of one trunk are correlated, so the level is a strict one.
MIN_TREND_OCTAVES = 0.1
LEVEL = 0.001


def misfit_of(optima: Optima, fitted: FittedLaw) -> list[str]:
    """Sentences on how the cells depart from the law; none where it describes them.

    Two things count. The spread: the scatter of the optima beyond their own errors, if it exceeds MAX_SPREAD_OCTAVES
    and chi-squared rejects at LEVEL that the errors alone explain the scatter. Trends: what a further term would take
    out of the residuals, for the squares of log2 of tokens, batch and size, their products, and the size itself, if it
    is MIN_TREND_OCTAVES or more and an F-test rejects at LEVEL, divided by the number of terms, that there is none.
    """
    from scipy.special import chdtrc

    found = _trends(optima, fitted)
    own = np.maximum(optima.sd, 1e-3)
    chi2 = float(np.sum((fitted.residuals / own) ** 2))
    spread = math.sqrt(fitted.spread)
    if spread > MAX_SPREAD_OCTAVES and float(chdtrc(fitted.freedom, chi2)) < LEVEL:
        found.insert(
            0,
            f"their optima lie {spread:.2f} octaves off it beyond their own errors, which are {np.median(own):.2f} (R2 "
            f"{fitted.r2:.2f}): fit each size, schedule and data set alone, or a part of the batches",
        )
    return [f"the law does not describe these cells because {sentence}" for sentence in found]


def _trends(optima: Optima, fitted: FittedLaw) -> list[str]:
    from scipy.special import fdtrc

    terms = _terms(optima, fitted)
    design = _tangent(optima, fitted)
    weights = np.sqrt(1 / (np.maximum(optima.sd, 1e-3) ** 2 + fitted.spread))
    base, rest = _squares(design, fitted.residuals, weights)
    found = []
    for sentence, column in terms:
        freedom = len(optima.lr) - design.shape[1] - 1
        if freedom < 3 or np.linalg.matrix_rank(np.column_stack([design, column]), tol=1e-6) == design.shape[1]:
            continue
        squares, left = _squares(np.column_stack([design, column]), fitted.residuals, weights)
        chance = float(fdtrc(1, freedom, (base - squares) * freedom / max(squares, 1e-12)))
        size = float(np.sqrt(np.mean((rest - left) ** 2)))
        if chance * len(terms) < LEVEL and size >= MIN_TREND_OCTAVES:
            found.append((chance, f"{sentence.format(size=f'{size:.2f} octaves')}"))
    return [sentence for _, sentence in sorted(found)[:2]]


def _squares(design: Array, y: Array, weights: Array) -> tuple[float, Array]:
    """Weighted sum of squares around a least-squares fit, and its residuals."""
    solution, *_ = np.linalg.lstsq(design * weights[:, None], y * weights, rcond=None)
    rest = y - design @ solution
    return float(np.sum((weights * rest) ** 2)), rest


def _tangent(optima: Optima, fitted: FittedLaw) -> Array:
    """The law's design at its best cap, with what moving the cap and its growth would do."""
    found, form = fitted.parameters, fitted.form
    design, _ = form.design(optima, (found.cap, found.k))
    columns = list((design - design.mean(axis=0)).T[1:])
    if math.isfinite(found.cap):
        above = (optima.beta > found.cap_at(optima.tokens)).astype(np.float64)  # type: ignore[arg-type]
        columns += [above] + ([above * (optima.tokens - optima.tokens.mean())] if form.critical == "growing" else [])
    return np.stack([np.ones_like(optima.lr), *columns], axis=1)


def _terms(optima: Optima, fitted: FittedLaw) -> list[tuple[str, Array]]:
    """What the law lacks: a sentence with {size}, and the column of a term."""
    size = optima.size if np.ptp(optima.size) > 0 else optima.width
    t, b, n = (x - x.mean() for x in (optima.tokens, optima.beta, size))
    kind = fitted.form.size or "model's size"
    terms = [
        ("the optimum bends over the tokens by {size}: fit the longer horizons alone", t * t),
        (
            "the optimum bends over the batch by {size}: look for a critical batch, or fit the smaller batches alone",
            b * b,
        ),
        (
            "the optimum's growth with the batch depends on the tokens by {size}: look for a critical batch that grows, or "
            "fit the smaller batches alone",
            t * b,
        ),
    ]
    if np.ptp(size) > 0:
        terms += [
            (f"the optimum depends on the {kind} by {{size}}: fit a size exponent, or each {kind} alone", n),
            (f"the optimum bends over the {kind} by {{size}}: fit each {kind} alone", n * n),
            (f"the exponent of the tokens depends on the {kind} by {{size}}: fit each {kind} alone", t * n),
            (f"the exponent of the batch depends on the {kind} by {{size}}: fit each {kind} alone", b * n),
        ]
    return terms
