"""What a smoothing does, and what it reports: settings and records of the ``smooth`` transform."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from morphoquant.quantization.transforms.report import TransformReport

Formula = Literal["smoothquant", "awq"]
Loss = Literal["mse", "mae"]
Balance = Literal["none", "mean", "gradient"]

GROUPS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
GRIDS: dict[str, tuple[float, ...]] = {
    "smoothquant": tuple(round(0.5 + 0.05 * i, 2) for i in range(9)),
    "awq": tuple(round(0.05 * i, 2) for i in range(20)),
}


@dataclass(frozen=True)
class SmoothSettings:
    """Which scales, and how their exponents are found.

    Attributes:
        formula: ``smoothquant`` (max|X|^a / max|W|^(1-a)) or ``awq`` (normalised mean|X|^a).
        alpha: the exponent where nothing is searched, 0 to 1.
        search: choose every group's exponent by the error of the part of the block behind it.
        grid: exponents to try; empty takes the formula's own (0.5, 0.55, ..., 0.9, and AWQ's 0,
            0.05, ..., 0.95).
        loss: of the part's output: squared (AWQ) or absolute (MBQ) error.
        balance: ``none``: every token counts the same; ``mean``: every modality does, in
            statistics and loss; ``gradient``: statistics of all tokens, and a loss over answer
            and media tokens, the latter weighed by their gradients (MBQ, SPEC 4.7).
        quantize_activations: let the search also round the group's input, per token. Where
            activations are not quantized in the end either, leave it off.
        groups: those to smooth.
        skip_grouped_attn_out: leave ``attn_out`` alone under grouped-query attention, as AWQ and
            MBQ do. Otherwise query heads that share values share their scales.
        batch_size: answered samples per forward pass of the search (``gradient`` only).
        memory_mb: inputs of a block's parts that are held at a time, MiB.

    Raises:
        ValueError: a field is out of range.
    """

    formula: Formula = "smoothquant"
    alpha: float = 0.5
    search: bool = False
    grid: tuple[float, ...] = ()
    loss: Loss = "mse"
    balance: Balance = "none"
    quantize_activations: bool = False
    groups: tuple[str, ...] = GROUPS
    skip_grouped_attn_out: bool = True
    batch_size: int = 8
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[str, ...]] = {
            "formula": ("smoothquant", "awq"),
            "loss": ("mse", "mae"),
            "balance": ("none", "mean", "gradient"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {choices}")
        if not all(0 <= value <= 1 for value in (self.alpha, *self.grid)):
            raise ValueError(f"exponents lie between 0 and 1: alpha={self.alpha}, grid={self.grid}")
        if not self.groups or set(self.groups) - set(GROUPS):
            raise ValueError(f"groups={self.groups}: choose some of {GROUPS}")
        if self.batch_size < 1 or self.memory_mb < 1:
            raise ValueError("batch_size and memory_mb must be positive")
        if self.balance == "gradient" and not self.search:
            raise ValueError("balance='gradient' weighs the loss of a search: set search=True")

    @property
    def exponents(self) -> tuple[float, ...]:
        """What is tried, in order; of equal losses the first wins."""
        if not self.search:
            return (self.alpha,)
        return self.grid or GRIDS[self.formula]

    @classmethod
    def smoothquant(cls, alpha: float = 0.5, **changes: Any) -> SmoothSettings:
        """As published: one exponent, and only what a norm produces."""
        values: dict[str, Any] = {"alpha": alpha, "groups": ("attn_in", "mlp_in")}
        return cls(**(values | changes))

    @classmethod
    def awq(cls, **changes: Any) -> SmoothSettings:
        """AWQ's scale search (its clip search belongs to the weight slot)."""
        values: dict[str, Any] = {"formula": "awq", "search": True}
        return cls(**(values | changes))

    @classmethod
    def mbq(cls, **changes: Any) -> SmoothSettings:
        """MBQ: AWQ's grid, absolute errors, modalities balanced by gradients."""
        values: dict[str, Any] = {"loss": "mae", "balance": "gradient"}
        return cls.awq(**(values | changes))


@dataclass(frozen=True)
class GroupSmoothing:
    """One smoothed input group.

    Attributes:
        layer: dotted name of the block.
        group: see :class:`morphoquant.models.structure.InputGroup`.
        exponent: the one that was taken.
        losses: (exponent, loss) of everything that was tried; empty without a search.
        smallest, largest: of the scales.
    """

    layer: str
    group: str
    exponent: float
    losses: tuple[tuple[float, float], ...]
    smallest: float
    largest: float


@dataclass(frozen=True)
class LayerBalance:
    """Weights of media tokens in the losses of one layer (an answer token counts 1).

    Attributes:
        layer: dotted name of the block.
        attn, mlp: weight by kind of media (``vision``, ``audio``), of the kinds that occurred.
    """

    layer: str
    attn: dict[str, float] = field(default_factory=dict)
    mlp: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SmoothReport(TransformReport):
    """What :func:`morphoquant.quantization.transforms.smooth.smooth` did.

    Attributes:
        settings: what was asked for.
        groups: every smoothed group, in order of depth.
        skipped: groups that were asked for and left alone, because attention is grouped.
        balance: per layer, where media tokens were weighed by gradients.
    """

    settings: SmoothSettings
    groups: tuple[GroupSmoothing, ...]
    skipped: tuple[str, ...]
    balance: tuple[LayerBalance, ...]
