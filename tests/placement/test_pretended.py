"""The pretended GPUs themselves: they must refuse what real ones refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def test_operands_on_two_devices_are_refused(two_gpus: Callable[[], Any]) -> None:
    with two_gpus():
        check()


def check() -> None:
    a, b = torch.ones(3, device="pretended:0"), torch.ones(3, device="pretended:1")
    assert (a.device, b.device) == (torch.device("pretended:0"), torch.device("pretended:1"))
    for left, right in ((a, b), (a, torch.ones(3)), (torch.ones(3), b)):
        with pytest.raises(RuntimeError, match="same device"):
            left + right
    assert (a + torch.tensor(1.0)).tolist() == [2.0] * 3, "a scalar of the CPU may be anywhere"
    assert (a + b.to("pretended:0")).device == a.device
    with pytest.raises(RuntimeError, match="same device"):
        a[b > 0]
    assert a[torch.tensor([0, 1])].tolist() == [1.0, 1.0], "indices of the CPU are allowed"
    a[:2].copy_(torch.tensor([5.0, 6.0]))
    assert a.cpu().tolist() == [5.0, 6.0, 1.0], "views share their values"
