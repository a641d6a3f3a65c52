"""Shared fixtures: a small random thinker with non-zero biases and gains, and mini benchmarks.

The random model has the shipped model's architecture and processor but none of its training:
every bias and every norm gain is far from its initial value, so that code which forgets one of
them is caught.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from morphoquant.calibration.readers import Sample
from morphoquant.calibration.samples import Calibration, load_samples
from morphoquant.config.schema import (
    CalibrationConfig,
    CalibrationSource,
    MediaConfig,
    ModelConfig,
    ScopeConfig,
)
from morphoquant.models import loading
from morphoquant.models.qwen_omni import text_model

settings.register_profile("repeatable", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("repeatable")
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
Completed = subprocess.CompletedProcess[str]
Command = Callable[..., Completed]
SOURCES = (
    ("mmmu", "mini:mmmu"),
    ("scienceqa", "mini:scienceqa"),
    ("videomme", "mini:videomme"),
    ("air_bench", "mini:air_bench_sound"),
    ("air_bench", "mini:air_bench_music"),
)


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded benchmarks with 8 questions and 24 calibration rows each."""
    from morphoquant.embedded.benchmarks import build

    return build(tmp_path_factory.mktemp("cache") / "mini", evaluation=8, calibration=24)


@pytest.fixture(scope="session")
def calibration_config() -> Callable[..., CalibrationConfig]:
    """Factory of calibration configs over all five embedded sets."""

    def make(**changes: Any) -> CalibrationConfig:
        sources = tuple(CalibrationSource(reader=r, path=p) for r, p in SOURCES)
        values: dict[str, Any] = {
            "name": "test",
            "sources": sources,
            "samples": 10,
            "search_samples": 5,
            "batch_size": 4,
        }
        return CalibrationConfig(**(values | changes))

    return make


@pytest.fixture(scope="session")
def calibration(mini_root: Path, calibration_config: Callable[..., Any]) -> Calibration:
    """Ten statistics samples and five search samples, every modality among them."""
    return load_samples(calibration_config(), mini_root)


@pytest.fixture(scope="session")
def one_of_each(calibration: Calibration) -> dict[str, Sample]:
    """One sample of every modality."""
    found = {s.modality: s for s in reversed(calibration.samples)}
    assert set(found) == {"text", "image", "video", "audio"}
    return found


@pytest.fixture(scope="session")
def mixed(one_of_each: dict[str, Sample]) -> list[list[dict[str, Any]]]:
    """Five conversations: one of each modality, and one that holds all of them at once."""
    singles = [list(one_of_each[name].messages) for name in ("text", "image", "video", "audio")]
    parts = [
        part
        for conversation in singles
        for part in conversation[0]["content"]
        if part["type"] != "text"
    ]
    parts.append({"type": "text", "text": "Which of these is red?"})
    return [*singles, [{"role": "user", "content": parts}]]


def random_model(config: Any, seed: int = 0) -> Any:
    """A thinker with random weights, random biases and random norm gains, in float32."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "norm" in name or "ln_" in name:
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
                parameter[::61] *= 6.0  # a few outlier channels
        # Initialised to zero, padding would pass every sum unnoticed; a trained one is not zero.
        embedding = text_model(model).embed_tokens.weight
        embedding[config.text_config.pad_token_id] = (
            3 * embedding.std() * torch.randn(embedding.shape[1])
        )
    return model.float().eval().requires_grad_(False)


def tiny_adapter(scope: ScopeConfig, tie: bool = True, layers: int | None = None) -> Any:
    """An adapter around :func:`random_model` with the shipped model's config and processor.

    The head is tied, as in Qwen2.5-Omni-3B, unless ``tie`` says otherwise. ``layers`` of the
    decoder may be fewer.
    """
    from morphoquant.compat import prepare_torchvision

    prepare_torchvision()
    from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerConfig

    from morphoquant.models.adapter import OmniAdapter

    folder = loading.embedded_folder("tiny_omni")
    config = Qwen2_5OmniThinkerConfig.from_pretrained(folder)
    config.tie_word_embeddings = tie
    config.text_config.tie_word_embeddings = tie
    if layers is not None:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    described = ModelConfig(
        name="random",
        path="embedded:tiny_omni",
        dtype="float32",
        device="cpu",
        scope=scope,
        media=MediaConfig(video_max_frames=8),
    )
    processor = Qwen2_5OmniProcessor.from_pretrained(folder)
    return OmniAdapter(random_model(config), processor, described)


@pytest.fixture(scope="session")
def omni() -> Any:
    """The random thinker, shared: never change it, take ``fresh_omni`` for that."""
    return tiny_adapter(ScopeConfig(decoder=True, vision=True, audio=True))


@pytest.fixture
def fresh_omni(omni: Any) -> Any:
    """A copy of the random thinker that a test may change."""
    return copy_adapter(omni)


def copy_adapter(adapter: Any) -> Any:
    """The same weights in another model."""
    return type(adapter)(copy.deepcopy(adapter.model), adapter.processor, adapter.config)


@pytest.fixture(scope="session")
def copied() -> Callable[[Any], Any]:
    """:func:`copy_adapter`, for tests that need more than one copy."""
    return copy_adapter


@pytest.fixture(scope="session")
def build_adapter() -> Callable[..., Any]:
    """:func:`tiny_adapter`, for tests that need another config."""
    return tiny_adapter


# Only where it is asked for: a sweep's processes do not all run a job.
INSTEAD = """
import importlib.util, pathlib, sys
class Instead:
    def find_spec(self, name, path=None, target=None):
        if name == "morphoquant.pipeline":
            place = pathlib.Path(__file__).with_name("pipeline.py")
            return importlib.util.spec_from_file_location(name, place)
sys.meta_path.insert(0, Instead())
"""


def instead_of_pipeline(folder: Path, code: str) -> dict[str, str]:
    """The environment in which ``morphoquant.pipeline`` is ``code``, written to a new folder.

    Python imports ``sitecustomize`` first in every process, so workers of any launcher get it too.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(INSTEAD)
    (folder / "pipeline.py").write_text(code)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


@contextmanager
def commands_in(environment: dict[str, str]) -> Iterator[Command]:
    """``command(folder, *arguments)``: ``run.py``, every time in the same process."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "commands.py")],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def command(folder: Path, *arguments: str, module: str | None = None) -> Completed:
            print(json.dumps([str(folder), module, arguments]), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, f"run.py {' '.join(arguments)}: its process is gone"
            code, out, err = json.loads(answer)
            return subprocess.CompletedProcess(arguments, code, out, err)

        yield command
        process.stdin.close()


@pytest.fixture(scope="session")
def command_line() -> Iterator[Command]:
    """``command_line(folder, *arguments)``: the command, without a start of its own.

    Nearly all that a small run costs is what Python imports for it.
    """
    with commands_in({**os.environ, "PYTHONPATH": str(ROOT)}) as command:
        yield command


@pytest.fixture(scope="session")
def replaced() -> Callable[[Path, str], dict[str, str]]:
    """:func:`instead_of_pipeline`, for tests of what happens around a run."""
    return instead_of_pipeline


@pytest.fixture(scope="session")
def command_lines() -> Callable[[dict[str, str]], Any]:
    """:func:`commands_in`, for tests that need another environment."""
    return commands_in
