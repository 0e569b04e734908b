"""Which form of the law the cells support: with a size, with a critical batch, or with one that grows."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from hf_power.fit.optima import REFERENCE, Optima, Parameters
from hf_power.fit.result import TriedForm
from hf_power.fit.squares import Array, least_squares
from hf_power.schedule import TOKENS_PER_BETA

Critical = Literal["none", "fixed", "growing"]
Size = Literal["parameters", "width"]
_CAPS_PER_OCTAVE = {"fixed": 8, "growing": 4}
GROWTHS = tuple(np.arange(0.1, 1.51, 0.1).round(1).tolist())
_MIN_FREEDOM = 3
_NO_CAP = (math.inf, 0.0)


class Form(NamedTuple):
    """``log2 lr = log2_a + b log2 T + s log2 size + c min(log2 beta, cap + k (log2 T - log2 1e9))``.

    size: what it counts, None without it; critical: no cap, one with k = 0, or one that grows; c: held, None if free.
    """

    size: Size | None = None
    critical: Critical = "none"
    c: float | None = None

    @property
    def num_free(self) -> int:
        """Fitted parameters."""
        return 2 + (self.c is None) + (self.size is not None) + ("none", "fixed", "growing").index(self.critical)

    @property
    def name(self) -> str:
        """The form in words."""
        parts = {"none": "", "fixed": "a critical batch", "growing": "a critical batch that grows"}
        return (
            " and ".join(part for part in (self.size and f"the {self.size}", parts[self.critical]) if part) or "simple"
        )

    def caps(self, optima: Optima) -> list[tuple[float, float]]:
        """The grid of (cap, k), cap as log2 beta at 1e9 tokens.

        At the mean horizon it reaches from the second-smallest batch, below which c would have no data, to the largest.
        """
        if self.critical == "none":
            return [_NO_CAP]
        batches = np.unique(optima.beta)
        num = math.ceil((batches[-1] - batches[1]) * _CAPS_PER_OCTAVE[self.critical]) + 1
        middles = np.linspace(batches[1], batches[-1], num)
        shift = float(optima.tokens.mean()) - REFERENCE
        growths = (0.0,) if self.critical == "fixed" else GROWTHS
        return [(float(middle) - k * shift, k) for k in growths for middle in middles]

    def finer(self, optima: Optima, cap: tuple[float, float]) -> list[tuple[float, float]]:
        """The grid around one of its points, eight times as fine."""
        if self.critical == "none":
            return [_NO_CAP]
        shift, step = float(optima.tokens.mean()) - REFERENCE, 1 / _CAPS_PER_OCTAVE[self.critical]
        growths = cap[1] + (np.linspace(-0.1, 0.1, 17) if self.critical == "growing" else np.zeros(1))
        middles = cap[0] + cap[1] * shift + np.linspace(-step, step, 17)
        return [(float(middle - k * shift), float(k)) for k in growths for middle in middles]

    def design(self, optima: Optima, cap: tuple[float, float]) -> tuple[Array, Array]:
        """Design and offset of log2 lr: 1, log2 T, min(log2 beta, cap) unless c is held, and the size."""
        capped = np.minimum(optima.beta, cap[0] + cap[1] * (optima.tokens - REFERENCE))
        columns = [np.ones_like(capped), optima.tokens]
        columns += [capped] if self.c is None else []
        columns += [optima.size] if self.size else []
        return np.stack(columns, axis=1), np.zeros_like(capped) if self.c is None else self.c * capped

    def parameters(self, solution: Array, cap: tuple[float, float]) -> Array:
        """Columns of `Parameters` from rows of solutions of the design."""
        rest = list(np.atleast_2d(solution).T)
        log2_a, b = rest[0], rest[1]
        c = rest[2] if self.c is None else np.full_like(log2_a, self.c)
        s = rest[-1] if self.size else np.zeros_like(log2_a)
        return np.stack([log2_a, b, c, np.full_like(log2_a, cap[0]), np.full_like(log2_a, cap[1]), s], axis=1)


def best_caps(
    form: Form, optima: Optima, y: Array, weights: Array, caps: Sequence[tuple[float, float]]
) -> tuple[Array, Array]:
    """Parameters and squares of the best cap for each row of weights (folds) or of y (draws), which are broadcast.

    The weights of y are (rows, cells) or (1, cells), and so are those of `weights`; weights of 0 leave a cell out.
    """
    num = max(len(y), len(weights))
    found, best = np.full(num, np.inf), np.empty((num, len(Parameters._fields)))
    total = weights.sum(axis=1, keepdims=True)
    for cap in caps:
        design, offset = form.design(optima, cap)
        columns, target = design[:, 1:], y - offset
        # Around their means, for log2 of the tokens is far from 0 beside its spread.
        middles = weights @ columns / total
        level = (weights * target).sum(axis=1, keepdims=True) / total
        gram = (weights[:, None, :] * columns.T) @ columns
        gram -= total[..., None] * middles[:, :, None] * middles[:, None, :]
        # Where a cap is below all batches of a fold nothing tells c, and the least ridge makes it 0.
        gram += 1e-9 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(columns.shape[1])
        right = (weights * target) @ columns - total * level * middles
        slopes = np.linalg.solve(gram, right[..., None])[..., 0]
        solution = np.concatenate([level - (slopes * middles).sum(axis=1, keepdims=True), slopes], axis=1)
        squares = np.sum(weights * (target - solution @ design.T) ** 2, axis=1)
        better = squares < found - 1e-12
        found[better] = squares[better]
        best[better] = form.parameters(solution, cap)[better]
    return best, found


def choose_form(optima: Optima, forms: Sequence[Form]) -> tuple[Form, tuple[TriedForm, ...], list[str]]:
    """The form that predicts left-out cells best, or a simpler one that does as well; forms[0] is the simplest.

    All cells of one size and horizon are left out together (single cells, where there are less than four such groups).
    A form is taken if, over these groups, its squared errors are lower than those of the simplest by more than the
    standard error of the difference, if an F-test at 5 % rejects the simplest against it, and if its critical batch lies
    inside the measured batches. Of these the one with the least error counts, or the simplest within a standard error
    of it: the one-standard-error rule of Breiman et al. (1984).

    Returns:
        The form, what was tried (the squared errors as root of their mean, in octaves), and sentences on what was not.
    """
    weights = least_squares(*_simple(optima, forms[0])).weights
    groups = groups_of(optima)
    tried, notes, errors, inside = [], [], [], []
    for form in forms:
        poor = len(optima.lr) - form.num_free < _MIN_FREEDOM or not _can_tell(optima, form, groups)
        if poor and form != forms[0]:
            continue
        caps = form.caps(optima)
        folds = weights * (groups != np.unique(groups)[:, None])
        parameters, _ = best_caps(form, optima, optima.lr[None], folds, caps)
        held_out = [
            weights[out] @ (optima.lr[out] - Parameters(*parameters[i]).log2_lr(*(x[out] for x in optima.places))) ** 2
            for i, out in enumerate(groups == group for group in np.unique(groups))
        ]
        whole, squares = best_caps(form, optima, optima.lr[None], weights[None], caps)
        errors.append(np.array(held_out))
        inside.append(_is_inside(form, optima, Parameters(*whole[0]), caps))
        rms = math.sqrt(sum(held_out) / weights.sum())
        tried.append((form, TriedForm(form.name, form.num_free, rms, False), float(squares[0])))
    good = [0] + [i for i in range(1, len(tried)) if inside[i] and _is_better(tried, errors, i, optima)]
    least = min(good, key=lambda i: errors[i].sum())
    near = [i for i in good if errors[i].sum() - errors[least].sum() <= _standard_error(errors[i] - errors[least])]
    chosen = min(near, key=lambda i: (tried[i][0].num_free, errors[i].sum()))
    edge = [i for i in range(len(tried)) if not inside[i] and _is_better(tried, errors, i, optima)]
    if tried[chosen][0].critical == "none" and edge:
        second = round(2 ** float(np.unique(optima.beta)[1]) * TOKENS_PER_BETA)
        notes.append(
            "no critical batch: the best one does not lie within the batches, above the second-smallest batch, "
            f"{second:,} tokens per step, run smaller or larger batches"
        )
    records = tuple(replace(record, chosen=i == chosen) for i, (_, record, _) in enumerate(tried))
    return tried[chosen][0], records, notes


def _simple(optima: Optima, form: Form) -> tuple[Array, Array, Array]:
    design, offset = form.design(optima, _NO_CAP)
    return design, optima.lr - offset, optima.sd


def groups_of(optima: Optima) -> Array:
    """A number for each size and horizon, or for each cell where these are less than four."""
    kinds = np.round(np.stack([optima.size, optima.width, optima.tokens], axis=1) * 30)
    _, groups = np.unique(kinds, axis=0, return_inverse=True)
    return np.asarray(groups.ravel() if groups.max() >= 3 else np.arange(len(kinds)), dtype=np.float64)


def _can_tell(optima: Optima, form: Form, groups: Array) -> bool:
    """Whether the cells vary in what the form speaks of, each fold of them too."""
    batches, horizons = len(np.unique(optima.beta)), len(np.unique(np.round(optima.tokens * 30)))
    if (form.critical != "none" and batches < 4) or (form.critical == "growing" and horizons < 3):
        return False
    if form.size is None:
        return True
    for group in np.unique(groups):
        design, _ = Form(form.size, c=form.c).design(optima, _NO_CAP)
        left = design[groups != group]
        if np.linalg.matrix_rank((left - left.mean(axis=0))[:, 1:], tol=1e-6) < design.shape[1] - 1:
            return False
    return True


def _is_inside(form: Form, optima: Optima, found: Parameters, caps: Sequence[tuple[float, float]]) -> bool:
    """Whether a critical batch, at the mean horizon, has measured batches on both sides, and k is not the largest."""
    if form.critical == "none":
        return True
    batches, middle = np.unique(optima.beta), found.cap_at(float(optima.tokens.mean()))
    within = batches[1] + 1e-6 < middle < batches[-1] - 1e-6
    return bool(within and found.k < max(k for _, k in caps) + (form.critical == "fixed"))


def _is_better(
    tried: Sequence[tuple[Form, TriedForm, float]], errors: Sequence[Array], index: int, optima: Optima
) -> bool:
    from scipy.special import fdtri

    gain = errors[0] - errors[index]
    form, _, squares = tried[index]
    more, freedom = form.num_free - tried[0][0].num_free, len(optima.lr) - form.num_free
    noise = squares + 1e-9 * len(optima.lr)  # Without noise in the losses only rounding would be left.
    rejected = (tried[0][2] - squares) * freedom > float(fdtri(more, freedom, 0.95)) * more * noise
    return bool(rejected and gain.sum() > _standard_error(gain))


def _standard_error(differences: Array) -> float:
    """Of their sum."""
    return float(math.sqrt(len(differences)) * differences.std(ddof=1)) if len(differences) > 1 else math.inf
