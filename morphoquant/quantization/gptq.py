"""GPTQ on one layer: second moments of its input, and rounding with error feedback (SPEC 4.4).

With ``E = W - W_hat`` the squared error of the layer's output is ``tr(E H E^T)``. For the upper
triangular V with ``H = V V^T`` this is the sum over columns j of

    |E_j V_jj + sum_{i<j} E_i V_ij|^2

and a column that is rounded after those before it should be aimed at

    w_j + sum_{i<j} E_i V_ij / V_jj

Notable choices:
    * This is GPTQ (Frantar et al. 2023) in the form of Chee et al. 2023 (QuIP, theorem 6: "OPTQ is
      LDLQ"). Its usual form updates all later columns with rows of ``U = V^-1``, the Cholesky
      factor of ``H^-1``; the values are the same, but here one Cholesky replaces two and an
      inverse, and finished columns are only read.
    * V comes from the ordinary lower factor of H with rows and columns in reverse.
    * Lazy blocks: the errors of all finished blocks reach a block in one matrix product.
    * The matrix is worked on transposed, so that a column of the weight is contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from morphoquant.errors import ActivationError
from morphoquant.formats.integer import (
    Granularity,
    Grid,
    dequantize,
    expand_slices,
    quantize_codes,
)
from morphoquant.formats.weights import Clip, QuantizedWeight, fake_quantize_weight
from morphoquant.models.structure import MODALITIES, Modality

BALANCED: Mapping[Modality, float] = dict.fromkeys(MODALITIES, 1.0)
"""Every modality has the same say, however many tokens it has."""

PIECE = 1 << 24  # elements of the activation multiplied at a time: bounds the float32 copy


class Hessian:
    """Streaming second moments of a layer's input, ``H`` of SPEC 4.4.

    Pooled: ``H = 2/T sum_t x x^T``. With modality weights w: ``H = sum_mu w_mu / n_mu
    sum_{t in mu} x x^T``, so that the many image tokens of a prompt do not outvote its text.
    (GPTQ does not depend on the scale of H, so the 2 is a matter of convention.)

    Products and sums are float32, float64 where ``dtype`` says so. Sums depend on order and batch
    size in their last bits only. Memory: one [channels, channels] matrix (1.4 GB for the 18944
    inputs of a 7B ``down_proj``), with modality weights one for each modality seen.

    Args:
        channels: inputs of the layer.
        device: where the sums live; activations are moved there.
        modality_weights: None for the pooled form, :data:`BALANCED` for equal weights. A modality
            left out weighs nothing.
        dtype: of the sums, float32 or float64.

    Raises:
        ValueError: a weight is negative, or none is positive.
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str = "cpu",
        modality_weights: Mapping[Modality, float] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if modality_weights is not None:
            values = modality_weights.values()
            if min(values, default=0) < 0 or max(values, default=0) <= 0:
                raise ValueError(
                    "modality weights must not be negative and one must be positive, "
                    f"got {dict(modality_weights)}"
                )
        self.channels = channels
        self.device = torch.device(device)
        self.dtype = dtype
        self.weights = modality_weights
        # Keyed by modality; pooled sums are under None.
        self._sums: dict[Modality | None, torch.Tensor] = {}
        self._counts: dict[Modality | None, int] = {}

    @property
    def tokens(self) -> int:
        """Tokens counted so far."""
        return sum(self._counts.values())

    def update(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Add one batch.

        Args:
            x: activations [..., channels], any floating dtype.
            labels: :class:`Modality` of every token, [...]; padding is skipped. None where no
                token is padding and modalities do not matter.

        Raises:
            ValueError: shapes do not fit, or labels are missing where modalities are weighted.
        """
        if x.shape[-1] != self.channels:
            raise ValueError(f"expected {self.channels} channels, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.channels)
        if labels is None:
            if self.weights is not None:
                raise ValueError("a Hessian weighted by modality needs the labels of its tokens")
            self._add(None, rows)
            return
        if labels.shape != x.shape[:-1]:
            raise ValueError(
                f"labels {tuple(labels.shape)} do not fit activations {tuple(x.shape)}"
            )
        flat = labels.reshape(-1).to(x.device)
        if self.weights is None:
            self._add(None, rows[flat != Modality.PADDING])
            return
        for modality, weight in self.weights.items():
            if weight > 0:
                self._add(modality, rows[flat == modality])

    def _add(self, key: Modality | None, rows: torch.Tensor) -> None:
        if rows.shape[0] == 0:
            return
        if key not in self._sums:
            shape = (self.channels, self.channels)
            self._sums[key] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for piece in rows.split(max(1, PIECE // self.channels)):
            values = piece.to(self.device, self.dtype)
            self._sums[key].addmm_(values.T, values)
        self._counts[key] = self._counts.get(key, 0) + rows.shape[0]

    def merge(self, other: Hessian) -> None:
        """Add another accumulator's tokens; associative and commutative up to rounding.

        Raises:
            ValueError: the other one has other channels or modality weights.
        """
        if other.channels != self.channels or other.weights != self.weights:
            raise ValueError("only Hessians of equal channels and modality weights can be merged")
        for key, total in other._sums.items():
            found = total.to(self.device, self.dtype)
            self._sums[key] = self._sums[key] + found if key in self._sums else found.clone()
            self._counts[key] = self._counts.get(key, 0) + other._counts[key]

    def value(self) -> torch.Tensor:
        """H, a new tensor [channels, channels].

        Raises:
            ActivationError: no token was seen, or one was NaN, infinite or overflowed.
        """
        if self.tokens == 0:
            raise ActivationError(
                "no calibration token reached this layer: GPTQ has nothing to go by. "
                "Use calibration samples that exercise it, or round it with rtn"
            )
        total: torch.Tensor | None = None
        for key, found in self._sums.items():
            weight = 2.0 if key is None or self.weights is None else self.weights[key]
            scaled = found * (weight / self._counts[key])
            total = scaled if total is None else total.add_(scaled)
        assert total is not None
        if not torch.isfinite(total.diagonal()).all():
            raise ActivationError("second moments met a NaN or infinite value, or overflowed")
        return total


def _factor(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower Cholesky factor L of the damped H in the *reverse* of ``order``, [K, K].

    ``V_ij = L_{K-1-i, K-1-j}`` is the upper factor for columns in ``order``; see :func:`_upper`.
    """
    backwards = order.flip(0)
    # A copy, transposed (it is symmetric) because LAPACK factors columns in place.
    work = hessian[backwards[:, None], backwards].mT
    diagonal = work.diagonal()
    dead = diagonal == 0
    # The mean is over live columns: any other value for dead ones would make the damping depend
    # on how many there are.
    mean = diagonal[~dead].mean()
    diagonal[dead] = mean
    diagonal += damping * mean
    info = torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(work, out=(work, info))
    if int(info) != 0 or not torch.isfinite(work.diagonal()).all():
        raise ActivationError(
            f"the Hessian of {len(order)} channels is not positive definite with damping "
            f"{damping:g} of its mean diagonal: raise the damping, calibrate on more tokens, or "
            "accumulate the Hessian in float64"
        )
    return work


def _upper(lower: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Columns [start, stop) of V, rows [0, stop): a copy [stop, stop - start]."""
    size = lower.shape[0]
    return lower[size - stop :, size - stop : size - start].flip(0, 1)


def _check(weight: torch.Tensor, hessian: torch.Tensor, damping: float, block: int) -> None:
    if weight.ndim != 2:
        raise ValueError(f"expected a weight [out, in], got shape {tuple(weight.shape)}")
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"a weight {tuple(weight.shape)} needs a Hessian {(weight.shape[1],) * 2}, "
            f"got {tuple(hessian.shape)}"
        )
    if damping < 0 or block < 1:
        raise ValueError(f"damping must be >= 0 and block >= 1, got {damping} and {block}")
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal).all():
        raise ActivationError("the Hessian has a NaN or infinite diagonal")
    if not (diagonal > 0).any():
        raise ActivationError(
            "the Hessian is zero: all calibration activations of this layer were zero. "
            "Use calibration samples that exercise it, or round it with rtn"
        )


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    granularity: Granularity = "per_channel",
    group_size: int = 128,
    symmetric: bool = True,
    clip: Clip = "minmax",
    act_order: bool = False,
    damping: float = 0.01,
    block: int = 128,
    static_groups: bool = False,
) -> QuantizedWeight:
    """Round a weight column by column, each making up for the errors of those before it.

    Grids, ranges and the clip search are those of
    :func:`morphoquant.formats.weights.fake_quantize_weight`, which is what this equals for a
    diagonal H without zeros. 16 bits are the caller's business: then nothing is called.

    Group scales are taken when a group's first column is reached, from weights that already make
    up for the errors so far (the paper's choice; a block is then a group). ``static_groups``
    takes them from the original weight, which loses less at two or three bits with ``minmax``:
    weights that make up for large errors widen the ranges. With ``act_order`` they are static in
    any case: columns of one group are then not rounded one after the other, but every group stays
    a run of neighbours, so the result needs no group index and runs on ordinary kernels.

    Columns whose input was always zero are set to zero, before ranges are taken.

    Args:
        weight: [out, in]; left alone.
        hessian: [in, in], symmetric; left alone. :meth:`Hessian.value`.
        bits: 2 to 8.
        granularity: ``per_tensor``, ``per_channel`` or ``per_group``.
        symmetric: the ``restricted`` grid, else the ``asymmetric`` one.
        clip: ``minmax``, or ``mse`` for the search of SPEC 1.4.
        act_order: columns in falling order of H's diagonal instead of their own.
        damping: added to the diagonal, in units of the mean over live columns.
        block: columns whose mutual errors are handled one at a time. A matter of speed only.
        static_groups: see above.

    Returns:
        codes, scales and values in the original order of columns. Computed in float32, in float64
        where the weight or the Hessian is.

    Raises:
        ActivationError: the Hessian is zero, not finite, or not positive definite when damped.
        ValueError: shapes, bits, damping or block out of range.
    """
    _check(weight, hessian, damping, block)
    grid = Grid(bits, "restricted" if symmetric else "asymmetric")
    wide = torch.float64 in (weight.dtype, hessian.dtype)
    work = torch.float64 if wide else torch.float32
    outputs, inputs = weight.shape
    moments = hessian.detach().to(weight.device, work)
    matrix = weight.detach().to(work).masked_fill(moments.diagonal() == 0, 0.0)
    refresh = granularity == "per_group" and not (act_order or static_groups)
    if act_order:
        order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    else:
        order = torch.arange(inputs, device=weight.device)
    if refresh:
        block = group_size
        scales: list[torch.Tensor] = []
        zeros: list[torch.Tensor | None] = []
    else:
        whole = fake_quantize_weight(matrix, bits, granularity, group_size, symmetric, clip)
        scales = list(whole.scale.reshape(-1, whole.scale.shape[-1]).unbind(-1))
        offsets = whole.zero_point
        zeros = (
            [None] * len(scales)
            if offsets is None
            else list(offsets.reshape(-1, offsets.shape[-1]).unbind(-1))
        )
    slice_of = (order // group_size).tolist() if granularity == "per_group" else [0] * inputs
    lower = _factor(moments, order, damping)
    # [in, out]: a row holds a column of the weight until it is rounded, of its error from then on.
    state = matrix.T[order]
    codes = torch.empty((inputs, outputs), dtype=grid.code_dtype, device=weight.device)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        upper = _upper(lower, start, stop)
        inner = upper[start:]
        feedback = upper[:start].T @ state[:start]
        if refresh:
            # The weights that are best for this group given the errors so far: E V_<G V_GG^-1.
            shift = torch.linalg.solve_triangular(inner.T, feedback, upper=False)
            now = (state[start:stop] + shift).T
            group = fake_quantize_weight(now, bits, "per_channel", symmetric=symmetric, clip=clip)
            scales.append(group.scale[:, 0])
            zeros.append(None if group.zero_point is None else group.zero_point[:, 0])
        aim = state[start:stop].addcdiv(feedback, inner.diagonal()[:, None])
        pull = (inner / inner.diagonal()).T.contiguous()
        errors = state[start:stop]
        for j in range(stop - start):
            if j:
                aim[j].addmv_(errors[:j].T, pull[j, :j])
            scale, zero = scales[slice_of[start + j]], zeros[slice_of[start + j]]
            found = quantize_codes(aim[j], scale, zero, grid)
            codes[start + j] = found
            errors[j] -= dequantize(found, scale, zero)
    original = torch.empty_like(codes)
    original[order] = codes
    return _assembled(original.T.contiguous(), scales, zeros, weight.dtype, granularity, group_size)


def _assembled(
    codes: torch.Tensor,
    scales: list[torch.Tensor],
    zeros: list[torch.Tensor | None],
    dtype: torch.dtype,
    granularity: Granularity,
    group_size: int,
) -> QuantizedWeight:
    """Codes [out, in] with one scale (and zero point) per slice, each [out] or [1]."""
    found = [zero for zero in zeros if zero is not None]
    scale = scales[0] if granularity == "per_tensor" else torch.stack(scales, dim=-1)
    zero: torch.Tensor | None = None
    if found:
        zero = found[0] if granularity == "per_tensor" else torch.stack(found, dim=-1)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return expand_slices(values, codes.shape[1], granularity, group_size)

    values = dequantize(codes, spread(scale), None if zero is None else spread(zero))
    return QuantizedWeight(values.to(dtype), codes, scale, zero)
