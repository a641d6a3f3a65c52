"""Work-arounds for broken installations, each guarded to exactly the case it mends."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

_kept_alive: list[Any] = []


def _torchvision_build() -> str | None:
    """The version string in torchvision's own version file, read as text (no import)."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")
    if not version_file.is_file():
        return None
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)['\"]", version_file.read_text())
    return found.group(1) if found else None


def prepare_torchvision() -> None:
    """Let a CUDA build of torchvision be imported beside a CPU build of torch.

    The registry's torchvision wheel is a CUDA build; its native library does not load beside a
    CPU torch, and the import then stops at ``torchvision::nms does not exist``. Declaring the two
    missing operators (they get no kernel: nothing here needs them) lets transforms and the
    processors work. Where the native library does load, a second declaration would abort the
    process, hence the guard: CPU torch *and* a ``+cu`` torchvision. Call before transformers.
    """
    import torch

    if _kept_alive or torch.version.cuda is not None:
        return
    build = _torchvision_build()
    if build is None or "+cu" not in build:
        return
    library = torch.library.Library("torchvision", "DEF")
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    library.define("nms" + schema)
    library.define("qnms" + schema)
    _kept_alive.append(library)
