"""Widths for parts of a model under a budget of bits: an exact multiple-choice knapsack.

Every unit takes one of its options. What is minimised is the sum of the options' losses, subject to
the average effective bits of weights and those of activations, each at most the budget. The sum
takes losses as *additive*: that quantizing two units costs what each costs alone (HAWQ-V2, arXiv
1911.03852, sums sensitivities of layers likewise; its integer program is that of HAWQ-V3, arXiv
2011.10680). Nothing is assumed beyond that, and the optimum is exact: SciPy hands the program to
HiGHS, which branches and bounds until no better choice can exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from morphoquant.errors import HarnessError

SLACK = 1e-9
"""Relative; averages are sums of float64."""
LOSS_RANGE = 1e4
"""Losses are scaled to this sum, so that the solver's absolute gap of 1e-6 is nothing."""


@dataclass(frozen=True)
class Option:
    """One choice of widths for a unit.

    Attributes:
        weight, activation: nominal widths.
        weight_bits, activation_bits: effective, per element.
        loss: what it costs; any unit, the same for all options.
        measured: whether the loss was measured at these widths.
    """

    weight: int
    activation: int
    weight_bits: float
    activation_bits: float
    loss: float
    measured: bool = True


@dataclass(frozen=True)
class Candidate:
    """A unit and what it can be given.

    Attributes:
        name: of the unit.
        weights: number of its weights.
        elements: activation elements that went through its quantizers (any scale, the same for
            all units).
        options: at least one.
    """

    name: str
    weights: float
    elements: float
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """The best choice.

    Attributes:
        chosen: unit -> its option.
        loss: the sum that was minimised.
        weight_bits, activation_bits: averages over all units.
    """

    chosen: dict[str, Option]
    loss: float
    weight_bits: float
    activation_bits: float


def average(candidates: Sequence[Candidate], chosen: Sequence[Option]) -> tuple[float, float]:
    """Average effective bits of weights and of activations."""
    weights = np.array([c.weights for c in candidates], dtype=float)
    elements = np.array([c.elements for c in candidates], dtype=float)
    return (
        float(weights @ [o.weight_bits for o in chosen] / weights.sum()),
        float(elements @ [o.activation_bits for o in chosen] / elements.sum()),
    )


def allocate(candidates: Sequence[Candidate], budget: float) -> Allocation:
    """The options with the least sum of losses within the budget.

    Args:
        candidates: every unit with its options.
        budget: upper bound of the average effective bits, of weights and of activations each
            (of a side that no option narrows there is none).

    Raises:
        HarnessError: even the smallest options need more; says how much.
    """
    options = [option for c in candidates for option in c.options]
    owner = np.repeat(np.arange(len(candidates)), [len(c.options) for c in candidates])
    share = np.array([[c.weights, c.elements] for c in candidates], dtype=float)
    share /= share.sum(0)
    bits = np.array([[o.weight_bits, o.activation_bits] for o in options])
    spent = (share[owner] * bits).T  # [2, options]
    counts = spent_sides(candidates)
    _refuse_too_small(candidates, spent, owner, budget)
    losses = np.array([o.loss for o in options])
    total = np.abs(losses).sum()
    scaled = losses * (LOSS_RANGE / total) if total > 0 else losses
    one_each = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
    bound = budget * (1 + SLACK)
    while True:
        found = milp(
            scaled,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(spent, ub=np.where(counts, bound, np.inf)),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise HarnessError(f"no choice of widths for {budget:g} bits: {found.message}")
        picked = np.flatnonzero(found.x > 0.5)
        chosen = [options[i] for i in picked]
        weight_bits, activation_bits = average(candidates, chosen)
        worst = np.array([weight_bits, activation_bits])[counts].max(initial=0.0)
        over = float(worst) - budget * (1 + SLACK)
        if over <= 0:
            break
        bound -= 2 * over  # the solver's own tolerance let it through
    names = {c.name: option for c, option in zip(candidates, chosen, strict=True)}
    return Allocation(names, float(sum(o.loss for o in chosen)), weight_bits, activation_bits)


def spent_sides(candidates: Sequence[Candidate]) -> np.ndarray:
    """bool [2], whether any option narrows the weights, and the activations.

    A side that no option narrows (activations of a weight-only method) has no budget.
    """
    pairs = [(o.weight_bits, o.activation_bits) for c in candidates for o in c.options]
    return np.any(np.array(pairs) < 16, axis=0, keepdims=True)[0]


def _refuse_too_small(
    candidates: Sequence[Candidate], spent: np.ndarray, owner: np.ndarray, budget: float
) -> None:
    """Least possible bits of each side by itself; options are not chosen for both at once here."""
    counts = spent_sides(candidates)
    for row, counted, side in zip(spent, counts, ("weights", "activations"), strict=True):
        least = sum(row[owner == i].min() for i in range(len(candidates)))
        if counted and least > budget * (1 + SLACK):
            raise HarnessError(
                f"sensitivity.budget={budget:g}: {side} need {least:.2f} effective bits on average "
                "even at the smallest of sensitivity.widths. Raise the budget, or add a smaller "
                "width."
            )
