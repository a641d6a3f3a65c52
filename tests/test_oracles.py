"""Others' implementations that tests compare with: all there, in the pinned version.

No test that needs one of them skips when it is missing. This one says which is, and what to do.
"""

from __future__ import annotations

import importlib
import platform
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from morphoquant.compat import prepare_torchvision

ROOT = Path(__file__).parents[1]
# What is installed, the module that tests import, and what it is the oracle of.
ORACLES = {
    "bitsandbytes": ("bitsandbytes.functional", "NF4 and FP4"),
    "compressed-tensors": ("compressed_tensors.quantization", "INT4, MXFP4 and NVFP4"),
    "torchao": ("torchao.quantization.quant_primitives", "integer grids, MXFP4 and NVFP4"),
    "llmcompressor": ("llmcompressor", "SmoothQuant, AWQ and GPTQ"),
    "en-dtypes": ("en_dtypes", "HiF8"),
}
INSTALL = "pip install -c constraints.txt -e '.[test]'"


def requirements() -> dict[str, Requirement]:
    """The test dependencies that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(line) for line in project["optional-dependencies"]["test"]]
    return {each.name: each for each in found}


@pytest.mark.parametrize("name", ORACLES)
def test_the_oracle_is_there(name: str) -> None:
    module, purpose = ORACLES[name]
    needed = requirements()[name]
    if needed.marker is not None and not needed.marker.evaluate():
        pytest.skip(f"{name} is not made for {sys.platform} on {platform.machine()}")
    try:
        found = version(name)
        prepare_torchvision()  # transformers, which some of them import, may need it
        importlib.import_module(module)
    except (PackageNotFoundError, ImportError) as error:
        pytest.fail(f"{name}, the oracle of {purpose}, is missing ({error}). Run {INSTALL}")
    assert found in needed.specifier, f"{name} {found}, needed {needed}. Run {INSTALL}"
    assert f"\n{name}=={found}\n" in (ROOT / "constraints.txt").read_text(), (
        f"constraints.txt pins another {name} than {found}"
    )


def test_no_test_skips_where_an_oracle_is_missing() -> None:
    skipping = "importor" + "skip"
    modules = {module.partition(".")[0] for module, _ in ORACLES.values()}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for line in path.read_text().splitlines():
            if skipping in line:
                assert not any(module in line for module in modules), f"{path.name}: {line}"
