"""Execute notebooks in place: ``python -m morphoquant.analysis.execute notebooks/*.ipynb``.

The kernel is the interpreter that this runs under, and nothing is stored but what the cells show:
the same runs give the same file.
"""

from __future__ import annotations

import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from morphoquant.errors import HarnessError

KERNEL = "python3"


def execute(path: Path, folder: Path | None = None, env: Mapping[str, str] | None = None) -> Any:
    """A notebook executed from top to bottom; the file stays as it is.

    Args:
        path: of the ``.ipynb`` file.
        folder: working directory of the kernel; default: the notebook's.
        env: environment of the kernel; default: this process's.

    Returns:
        The ``nbformat`` notebook with its outputs. Its kernel was this interpreter, whatever
        kernels are installed; its metadata hold no times, versions or paths.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        HarnessError: nbclient or ipykernel is not installed.
    """
    try:
        import ipykernel  # noqa: F401  (the kernel is made from it)
        import nbformat
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient
    except ImportError as error:
        raise HarnessError(f"{error}: install the extra 'test'") from error
    notebook = nbformat.read(path, as_version=4)
    # Without folders to look in, the only kernel is the native one: this interpreter.
    specs = KernelSpecManager(kernel_dirs=[])
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name=KERNEL, kernel_spec_manager=specs),
        record_timing=False,
        timeout=600,
        resources={"metadata": {"path": str(folder or path.parent)}},
    )
    options: dict[str, Any] = {} if env is None else {"env": dict(env)}
    client.execute(cleanup_kc=True, **options)  # a kernel that was handed over outlives the call
    notebook.metadata = {
        "kernelspec": {"display_name": KERNEL, "language": "python", "name": KERNEL}
    }
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            output.get("metadata", {}).clear()
            if "image/png" in data:
                data["image/png"] = _smaller(data["image/png"])
    return notebook


def _smaller(png: str) -> str:
    """A PNG in base64 with a palette of 256 colours, which takes a third of the bytes."""
    packed = BytesIO()
    drawn = Image.open(BytesIO(b64decode(png))).convert("RGB")
    drawn.quantize(256).save(packed, format="PNG", optimize=True)
    return b64encode(packed.getvalue()).decode()


def main(paths: Sequence[str]) -> None:
    """Execute notebooks in place."""
    import nbformat

    for path in map(Path, paths):
        executed = execute(path)
        nbformat.write(executed, path)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
