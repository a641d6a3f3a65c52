"""Integer emulation of a linear with per-channel static activation scales (SPEC 2.11).

    Y = sum_g u_g (sum_{k in g} p_k q_k)  +  [b + sum_g u_g sum_{k in g} p_k z_k]  +  panel
        int32 accumulator per group          constant bias                         16 bits

The panel is one of two, and which one follows from how the weight was folded:

- channels left out of the codes: ``x_S W[:, S]^T`` with the *full* values;
- channels still in the codes: the residual ``(x - x_hat)_S W_Q[:, S]^T``, gated by element where
  the compensation has a limit.

The full values can never be added on top of codes that contain them. Zero points enter as they
are, not clipped to the code range, so channels of constant sign are right.

By itself this is an emulation: it computes what an integer kernel computes, not as fast.
:meth:`IntegerLinear.pack` gives it a product that really runs on 8-bit integers.
"""

from __future__ import annotations

import torch
from torch import nn

from morphoquant.quantization.compensation import DynamicCompensation
from morphoquant.quantization.folding import FoldedWeight
from morphoquant.quantization.integer_product import GroupProduct
from morphoquant.quantization.ranges import StaticGrid

INT8 = torch.iinfo(torch.int8)


class IntegerLinear(nn.Module):
    """Takes the place of an ``nn.Linear``; integer codes on both sides.

    Args:
        folded: the weight, 2 to 8 bits.
        grid: the activation grid that ``folded`` was made with; codes must fit int8.
        bias: [N] or None, not quantized.
        residual: compensation whose masked channels stay in the integer path (the weight was
            folded with ``exclude_masked=False``), or None.

    Raises:
        ValueError: the weight has no integer codes; grid, mask or bias do not match it; the
            compensated channels are left out of the codes already; or a group's sum could leave
            int32.
    """

    scale: torch.Tensor
    step: torch.Tensor
    offset: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    bias: torch.Tensor
    channels: torch.Tensor
    panel: torch.Tensor

    def __init__(
        self,
        folded: FoldedWeight,
        grid: StaticGrid,
        bias: torch.Tensor | None = None,
        residual: DynamicCompensation | None = None,
    ) -> None:
        super().__init__()
        _check(folded, grid, bias, residual)
        n, k = folded.codes.shape
        self.residual = residual
        # A left-out channel, or one whose only level is zero, has code 0 whatever comes.
        silent = folded.step == 0
        silent[folded.channels] = True
        for name, value in {
            "scale": folded.scale,
            "step": torch.where(folded.step > 0, folded.step, 1.0),
            "offset": grid.offset.expand(k).masked_fill(silent, 0.0),
            "low": grid.low.expand(k).masked_fill(silent, 0.0),
            "high": grid.high.expand(k).masked_fill(silent, 0.0),
        }.items():
            self.register_buffer(name, value)

        self.product = GroupProduct(folded.codes, folded.group_width, self.low, self.high)
        constant = folded.scale.new_zeros(n, dtype=torch.float64)
        if bias is not None:
            constant += bias.detach()
        parts = (self.product.groups(t) for t in (folded.codes, self.offset))
        for g, (p, z) in enumerate(zip(*parts, strict=True)):
            constant += folded.scale[:, g] * (p.double() @ z.double())
        self.register_buffer("bias", constant)

        channels, panel = folded.channels, folded.panel
        if residual is not None:
            channels = residual.mask.nonzero().flatten()
            panel = folded.dequantized[:, channels]
        self.register_buffer("channels", channels)
        self.register_buffer("panel", panel)

    def pack(self) -> bool:
        """Compute on 8-bit integers from now on; False where this device cannot."""
        return self.product.pack()

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """int8 codes of [..., K]; 0 in left-out channels and for NaN."""
        codes = torch.div(x, self.step).sub_(self.offset).round_()
        return codes.clamp_(self.low, self.high).nan_to_num_(nan=0.0).to(torch.int8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in the dtype of ``x``; float64 inside for float64, else float32."""
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype != torch.float64:
            rows = rows.float()
        q = self.quantize(rows)
        out = self.bias.to(rows.dtype).expand(rows.shape[0], -1).clone()
        for g, accumulator in enumerate(self.product(q)):
            out.addcmul_(accumulator.to(rows.dtype), self.scale[:, g].to(rows.dtype))
        if self.channels.numel():
            out += self._sixteen_bit(rows, q) @ self.panel.to(rows.dtype).T
        return out.to(x.dtype).reshape(*x.shape[:-1], self.product.codes.shape[0])

    def _sixteen_bit(self, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """What goes through the panel: values [T, K] and codes [T, K] -> [T, kappa]."""
        chosen = x[:, self.channels]
        if self.residual is None:
            return chosen
        levels = q[:, self.channels].to(x.dtype) + self.offset[self.channels]
        gate = self.residual.gate(x).expand_as(x)[:, self.channels]
        return torch.where(gate, chosen - levels * self.step[self.channels], 0.0)

    def cost(self, tokens: int) -> dict[str, float]:
        """Multiply-accumulates of one call (SPEC 2.11, cost model).

        Args:
            tokens: rows of the input.

        Returns:
            ``integer_macs``: of the dense product, left-out columns included (their codes are
            stored as zeros). ``panel_macs``: in 16 bits; an upper bound where elements are gated.
            ``overhead``: ``kappa / K``; times the ratio of the two rates (4 for int4 against
            16 bits) it is the share of time that the panel adds.
        """
        n, k = self.product.codes.shape
        kappa = self.channels.numel()
        return {
            "integer_macs": tokens * n * k,
            "panel_macs": tokens * n * kappa,
            "overhead": kappa / k,
        }

    def extra_repr(self) -> str:
        n, k = self.product.codes.shape
        return f"in_features={k}, out_features={n}, panel={self.channels.numel()}"


def _check(
    folded: FoldedWeight,
    grid: StaticGrid,
    bias: torch.Tensor | None,
    residual: DynamicCompensation | None,
) -> None:
    """Refuse parts that do not belong together."""
    n, k = folded.codes.shape
    if folded.codes.dtype != torch.int8:
        raise ValueError(f"a weight of {folded.bits} bits has no integer codes")
    if not torch.equal(grid.step.expand(k), folded.step):
        raise ValueError("the weight was folded with other activation steps")
    if bool((grid.low < INT8.min).any()) or bool((grid.high > INT8.max).any()):
        raise ValueError("activation codes must fit int8")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"expected a bias [{n}], got shape {tuple(bias.shape)}")
    if residual is None:
        return
    if residual.mask.shape != (k,):
        raise ValueError(f"expected a mask [{k}], got shape {tuple(residual.mask.shape)}")
    if folded.channels.numel():
        raise ValueError(
            "channels are left out of the codes already; fold with exclude_masked=False to "
            "compensate a residual"
        )
