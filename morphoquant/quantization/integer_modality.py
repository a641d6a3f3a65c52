"""Integer emulation of a linear with one static activation scale per modality (SPEC 4.8).

    Y_m = s_m sum_g u_g (sum_{k in g} p_k q_k) + [b + s_m z_m sum_g u_g sum_{k in g} p_k] + panel
               int32 accumulator per group                constant bias                   16 bits

The codes of the weight serve every modality m. Its scale lies outside of the sum over channels, so
it needs no folding, but all rows of a product have to share it: tokens come *arranged*, and there
is one product per modality. The panel holds the columns of channels that are kept in 16 bits (the
rotated mean); their codes are zero.
"""

from __future__ import annotations

import torch
from torch import nn

from morphoquant.formats.weights import QuantizedWeight
from morphoquant.models.structure import MODALITIES
from morphoquant.quantization.arrange import RUNS, Arrangement
from morphoquant.quantization.integer_product import GroupProduct
from morphoquant.quantization.ranges import StaticGrid

INT8 = torch.iinfo(torch.int8)


class ModalityIntegerLinear(nn.Module):
    """Takes the place of an ``nn.Linear``; integer codes on both sides.

    Args:
        weight: symmetric integers [N, K] of 2 to 8 bits with one scale for all, per row or group.
        grid: [1 + modalities, 1]: of all tokens, which padding takes, then of each modality.
        bias: [N] or None, not quantized.
        mask: bool [K] of channels that stay in 16 bits, or None.
        columns: [N, kappa], the weight of those channels, in ascending order.
        group_size: channels per scale of the weight, or None where rows have one.

    Raises:
        ValueError: the parts do not match, the weight has zero points, masked channels are in its
            codes too, activation codes do not fit int8, or a sum could leave int32.
    """

    scale: torch.Tensor
    bias: torch.Tensor
    channels: torch.Tensor
    columns: torch.Tensor
    step: torch.Tensor
    offset: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __init__(
        self,
        weight: QuantizedWeight,
        grid: StaticGrid,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        codes = weight.codes
        n, k = codes.shape
        mask = torch.zeros(k, dtype=torch.bool, device=codes.device) if mask is None else mask
        columns = weight.dequantized[:, :0] if columns is None else columns
        _check(weight, grid, bias, mask, columns)
        low, high = (edge.expand(k) for edge in (grid.low.min(), grid.high.max()))
        self.product = GroupProduct(codes, group_size or k, low, high)
        scale = weight.scale.expand(n, -1)
        if scale.shape[1] != len(self.product.groups(codes)):
            raise ValueError(f"scales {tuple(weight.scale.shape)} for groups of {group_size}")
        # What a zero point adds: the same for every token of a modality.
        shift = (grid.step * grid.offset).double()
        sums = torch.stack([p.double().sum(1) for p in self.product.groups(codes)], dim=1)
        constant = shift * (scale.double() * sums).sum(1)
        if bias is not None:
            constant += bias.detach()
        for name, value in {
            "scale": scale,
            "bias": constant,
            "channels": mask.nonzero().flatten(),
            "columns": columns,
            "step": grid.step,
            "offset": grid.offset,
            "low": grid.low,
            "high": grid.high,
        }.items():
            self.register_buffer(name, value)

    def pack(self) -> bool:
        """Compute on 8-bit integers from now on; False where this device cannot."""
        return self.product.pack()

    def quantize(self, x: torch.Tensor, row: int) -> torch.Tensor:
        """int8 codes of [..., K] on the grid of one row; in float32, as the simulation does."""
        codes = torch.div(x.float(), self.step[row]).sub_(self.offset[row]).round_()
        return codes.clamp_(self.low[row], self.high[row]).nan_to_num_(nan=0.0).to(torch.int8)

    def forward(self, x: torch.Tensor, arrangement: Arrangement) -> torch.Tensor:
        """Arranged tokens [batch, tokens, K] -> [batch, tokens, N], in the dtype of ``x``.

        Raises:
            ValueError: the arrangement is of other tokens.
        """
        if x.shape[:-1] != arrangement.order.shape:
            raise ValueError(
                f"an arrangement of {tuple(arrangement.order.shape)} tokens does not fit an "
                f"activation {tuple(x.shape)}"
            )
        out = x.new_empty(*x.shape[:-1], self.scale.shape[0])
        runs = arrangement.runs()
        for kind in RUNS:
            places = [(b, run[kind]) for b, run in enumerate(runs) if kind in run]
            if not places:
                continue
            parts = [x[b, run] for b, run in places]
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
            found = self._rows(rows, int(kind) + 1).split([len(part) for part in parts])
            for (b, run), part in zip(places, found, strict=True):
                out[b, run] = part
        return out

    def _rows(self, x: torch.Tensor, row: int) -> torch.Tensor:
        """Tokens of one modality, [rows, K] -> [rows, N]."""
        work = torch.promote_types(x.dtype, torch.float32)
        q = self.quantize(x, row)
        out = torch.zeros(len(x), len(self.scale), dtype=work, device=x.device)
        for g, accumulator in enumerate(self.product(q)):
            out.addcmul_(accumulator.to(work), self.scale[:, g].to(work))
        out.mul_(self.step[row].to(work)).add_(self.bias[row].to(work))
        if self.channels.numel():
            out += x[:, self.channels].to(work) @ self.columns.to(work).T
        return out.to(x.dtype)


def _check(
    weight: QuantizedWeight,
    grid: StaticGrid,
    bias: torch.Tensor | None,
    mask: torch.Tensor,
    columns: torch.Tensor,
) -> None:
    """Refuse parts that do not belong together."""
    n, k = weight.codes.shape
    rows = (1 + len(MODALITIES), 1)
    if weight.codes.dtype != torch.int8 or weight.zero_point is not None:
        raise ValueError("the weight's codes have zero points: use a symmetric grid")
    if grid.step.shape != rows:
        raise ValueError(f"expected steps {list(rows)}, got shape {tuple(grid.step.shape)}")
    if bool((grid.low < INT8.min).any()) or bool((grid.high > INT8.max).any()):
        raise ValueError("activation codes must fit int8")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"expected a bias [{n}], got shape {tuple(bias.shape)}")
    if mask.shape != (k,) or columns.shape != (n, int(mask.sum())):
        raise ValueError(
            f"a mask {tuple(mask.shape)} and columns {tuple(columns.shape)} do not fit a weight "
            f"{(n, k)}"
        )
    if bool(weight.codes[:, mask].any()):
        raise ValueError("masked channels are in the codes already: round the weight without them")
