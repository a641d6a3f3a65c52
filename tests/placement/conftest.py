"""Two GPUs that are not there: tensors that say where they lie, and refuse to be mixed.

A :class:`Placed` tensor holds its values on the CPU and reports another device. Every operation
runs on the CPU after the check that real GPUs make (all operands on one device, scalars of the CPU
excepted), and its result lies where its operands did. So code that forgets to move a tensor from
one GPU to another, or between a GPU and the CPU, fails here as it would there, while its numbers
can be compared with those of the CPU bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from morphoquant.models.adapter import OmniAdapter

aten = torch.ops.aten
ANY_DEVICE = (aten.copy_.default, aten._copy_from.default)  # (destination, source)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
MATH_BACKEND = 0
NAME = "pretended"


class _Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc, name-defined]
    def is_available(self) -> bool:
        return False  # nobody is to choose this device by itself

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, device: int) -> bool:
        return True


@cache
def _register() -> None:
    """Make the device's name known; it cannot be taken back, and does nothing by itself."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, hook=_Hooks())


class Placed(torch.Tensor):
    """``held`` on the CPU, pretending to lie on ``device``."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Placed:
        made: Placed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return Placed(self.held.data, self.device)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        assert isinstance(value, Placed), "weights stay on their GPU"
        assert value.device == self.device
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.held}, {self.device})"

    def new_tensor(self, data: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=self.dtype, device=self.device)

    def tolist(self) -> Any:
        return self.held.tolist()

    def __deepcopy__(self, memo: Any) -> Placed:
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


def _each(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """``change`` for every tensor of an operation's argument or result: it is one, or a list.

    What torch's general tree_map does too, at many times the cost: an operation is called a
    hundred thousand times.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([_each(v, change) for v in value])
    return value


def _where(func: Any, args: Any, kwargs: Any) -> torch.device | None:
    """The device that an operation computes on; None for the CPU.

    Raises:
        RuntimeError: as torch does, for operands on several devices.
    """
    if func in INDEXING:  # indices may lie on the CPU
        args = (args[0], [i for i in args[1] if isinstance(i, Placed)], *args[2:])
    tensors: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        _each(value, tensors.append)
    if func in ANY_DEVICE:
        tensors = tensors[:1]
    placed = {t.device for t in tensors if isinstance(t, Placed)}
    if not placed:
        return None
    loose = [t for t in tensors if not isinstance(t, Placed) and t.ndim > 0]
    if len(placed) > 1 or loose:
        shown = ", ".join(sorted({str(d) for d in placed} | {str(t.device) for t in loose}))
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, found {shown}")
    return next(iter(placed))


def _inner(value: torch.Tensor) -> torch.Tensor:
    return value.held if isinstance(value, Placed) else value


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, its operands checked and its result placed."""
    device = _where(func, args, kwargs)
    asked = kwargs.get("device")
    if asked is not None:
        asked = torch.device(asked)
        kwargs = {**kwargs, "device": torch.device("cpu")}
        device = asked if asked.type == NAME else None
        if device is not None and device.index is None:
            device = torch.device(NAME, 0)
    kwargs.pop("pin_memory", None)
    kwargs.pop("non_blocking", None)
    if func is aten._fused_sdp_choice.default:
        return MATH_BACKEND
    first = args[0] if args else None
    found = func(
        *[_each(value, _inner) for value in args],
        **{name: _each(value, _inner) for name, value in kwargs.items()},
    )
    if isinstance(first, Placed) and found is first.held:
        return first  # in place
    if device is None:
        return found
    return _each(found, lambda t: t if isinstance(t, Placed) else Placed(t, device))


class TwoGpus(TorchDispatchMode):
    """While it is on, tensors can be made on and moved to ``pretended:0`` and ``pretended:1``."""

    def __enter__(self) -> TwoGpus:
        # torch.tensor(values, device=...) then moves them where it can be seen.
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, dict(kwargs or {}))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> type[TwoGpus]:
    """``with two_gpus():`` a machine with two pretended GPUs.

    Tensors of a subclass have no place in inference mode; gradients are only switched off here.
    """
    _register()
    backward = torch.Tensor.backward

    def in_this_thread(self: torch.Tensor) -> None:
        with torch.autograd.set_multithreading_enabled(False):
            backward(self)

    # The engine has no thread for a device that is not there.
    monkeypatch.setattr(torch.Tensor, "backward", in_this_thread)
    for name in ("logits", "generate"):
        method = getattr(OmniAdapter, name).__wrapped__
        monkeypatch.setattr(OmniAdapter, name, torch.no_grad()(method))
    return TwoGpus


@pytest.fixture
def spread() -> Callable[[Any], dict[str, Any]]:
    """Dispatch an adapter's model over both GPUs as ``device_map`` does, neighbours apart."""

    def dispatch(adapter: Any) -> dict[str, Any]:
        from accelerate import dispatch_model

        from morphoquant.models import qwen_omni

        model = adapter.model
        names = {id(module): name for name, module in model.named_modules()}
        text = qwen_omni.text_model(model)
        parts: dict[str, Any] = {
            names[id(qwen_omni.audio_tower(model))]: 1,
            names[id(qwen_omni.vision_tower(model))]: 0,
            names[id(text.embed_tokens)]: 0,
            names[id(text.norm)]: 0,
            names[id(text.rotary_emb)]: 0,
            names[id(model.lm_head)]: 1,
        }
        parts |= {b.name: i % 2 for i, b in enumerate(adapter.blocks("decoder"))}
        found = {name: f"{NAME}:{number}" for name, number in parts.items()}
        adapter.model = dispatch_model(model, found, main_device=f"{NAME}:0")
        return found

    return dispatch
