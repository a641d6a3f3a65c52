"""Sums of products of integer codes, group by group: emulated exactly, or on 8-bit integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from morphoquant.quantization.int8_product import Product, pack

INT32 = torch.iinfo(torch.int32)


def integer_product(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """``q p^T`` of int8 [T, K] and int8 [N, K], exactly: int32 [T, N].

    Computed in float64, which holds every sum below 2^53 and multiplies fast on every device
    (integer matrix products exist on few). The caller rules out sums beyond int32.
    """
    return (q.double() @ p.double().T).to(torch.int32)


class GroupProduct(nn.Module):
    """The int32 accumulators of a weight's groups.

    Args:
        codes: int8 [N, K].
        group_width: channels per group; the last group may be shorter.
        low, high: float [K], the codes that activations of every channel can have.

    Raises:
        ValueError: a group's sum could leave int32.
    """

    codes: torch.Tensor

    def __init__(
        self, codes: torch.Tensor, group_width: int, low: torch.Tensor, high: torch.Tensor
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.group_width = group_width
        self.range = int(low.min()), int(high.max())
        largest = torch.maximum(low.abs(), high.abs()).double()
        for g, (p, edge) in enumerate(zip(self.groups(codes), self.groups(largest), strict=True)):
            if float((p.double().abs() @ edge).max()) > INT32.max:
                raise ValueError(f"a sum over group {g} could leave int32: use smaller groups")
        self._products: list[Product] | None = None

    def groups(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., K] cut into the groups' channels."""
        return x.split(self.group_width, dim=-1)

    def pack(self) -> bool:
        """Compute on 8-bit integers from now on, on the device where the codes are.

        Returns:
            Whether this device has such a product for every group; otherwise nothing changes.
        """
        found = [pack(codes, *self.range) for codes in self.groups(self.codes)]
        products = [product for product in found if product is not None]
        if len(products) < len(found):
            return False
        self._products = products
        return True

    @property
    def packed(self) -> bool:
        """Whether the product runs on 8-bit integers."""
        return self._products is not None

    def forward(self, q: torch.Tensor) -> Iterator[torch.Tensor]:
        """Activation codes int8 [T, K] -> the sums of every group: [T, N], integers."""
        parts = self.groups(q)
        if self._products is not None:
            for product, activations in zip(self._products, parts, strict=True):
                yield product(activations)
            return
        for activations, weights in zip(parts, self.groups(self.codes), strict=True):
            yield integer_product(activations, weights)
