"""What is read from the cache is bit for bit what would have been computed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from morphoquant import quantize
from morphoquant.calibration.samples import Calibration, load_samples
from morphoquant.config import RunConfig, load
from morphoquant.config.schema import ScopeConfig
from morphoquant.config.store import register
from morphoquant.quantization import engine, survey
from morphoquant.quantization.gather import gathers
from morphoquant.record import statistics_tables
from morphoquant.sharing.artifacts import ArtifactStore
from morphoquant.sharing.prompts import Prompts, SharedStatistics
from morphoquant.tracking.rundir import RunDirectory

CONF = Path(__file__).parents[2] / "conf"
TOWERS = ["decoder"]


@pytest.fixture(scope="module")
def configure() -> Callable[..., RunConfig]:
    register()

    @functools.cache
    def make(*overrides: str) -> RunConfig:
        fixed = ["statistics.probes=1", "calibration.batch_size=4", "model.dtype=float32"]
        if any("morphoquant" in override for override in overrides):
            fixed.append("method.activation.range.candidates=3")
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            return load(compose("config", overrides=[*fixed, *overrides]))

    return make


@pytest.fixture(scope="module")
def omni(build_adapter: Callable[..., Any]) -> Any:
    """The random thinker with two blocks in its decoder: every test walks it several times."""
    return build_adapter(ScopeConfig(decoder=True, vision=True, audio=True), layers=2)


@pytest.fixture(scope="module")
def few(calibration_config: Any, mini_root: Path) -> Calibration:
    """Five statistics prompts of all modalities, two for the search."""
    return load_samples(calibration_config(samples=5, search_samples=2), mini_root)


@pytest.fixture
def block_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the engine or a survey runs a block."""
    counted: list[int] = []
    run_block = engine.run_block

    def count(*arguments: Any) -> torch.Tensor:
        counted.append(1)
        return run_block(*arguments)

    monkeypatch.setattr(engine, "run_block", count)
    monkeypatch.setattr(survey, "run_block", count)
    return counted


def walked(
    config: RunConfig, adapter: Any, calibration: Calibration, store: ArtifactStore, folder: Path
) -> tuple[dict[str, Any], Prompts]:
    """Everything that the quantization phase decides."""
    prompts = Prompts(config, adapter, store)
    if config.method.transform.name != "none":
        probe = prompts.encode_batch(calibration.samples[:2])
        directory = RunDirectory(folder, {})
        before = adapter.logits(probe)
        quantize.transform(config, adapter, calibration, [probe], before, directory, prompts)
    quantizer = quantize.walk_blocks(config, adapter, list(TOWERS), calibration, prompts)
    return {
        "weights": adapter.model.state_dict(),
        "masks": quantizer.masks,
        "ranges": {k: (c.final.lo, c.final.hi, c.ratios) for k, c in quantizer.choices.items()},
        "manifest": json.dumps([repr(record) for record in quantizer.records]),
        "moments": quantizer.moments,
        "tables": statistics_tables(config, quantizer),
    }, prompts


def same(a: Any, b: Any, place: str = "") -> None:
    """Bitwise equality of nested results."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True, obj=place)
    elif isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            same(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, tuple):
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{place}/{i}")
    else:
        assert a == b, place


@pytest.mark.parametrize(
    ("overrides", "rereads"),
    [
        (("method=rtn",), False),
        (("method=morphoquant",), False),
        (("method=morphoquant", "ablation=mask_local_or_global"), False),
        (("method=morphoquant", "method/compensation=static_bias_per_modality"), True),
        (("method=gptq",), True),
        (("method=atom",), False),
        (("method=morphoquant_folded",), False),
        (("method=masquant", "method.transform.steps=1"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_walk_decides_the_same_with_and_without_the_cache(
    configure: Callable[..., RunConfig],
    omni: Any,
    copied: Any,
    few: Calibration,
    tmp_path: Path,
    block_calls: list[int],
    overrides: tuple[str, ...],
    rereads: bool,
) -> None:
    config = configure(*overrides)
    found, calls, prompts = [], [], []
    for root in (None, tmp_path / "cache", tmp_path / "cache"):
        block_calls.clear()
        store = ArtifactStore(root, maker="first" if not found else f"run {len(found)}")
        result, used = walked(config, copied(omni), few, store, tmp_path)
        found.append(result)
        calls.append(len(block_calls))
        prompts.append(used)
    disabled, cold, warm = found
    same(disabled, cold)
    same(disabled, warm)
    assert calls[0] == calls[1]
    assert calls[2] <= calls[0]
    if not gathers(config.method, config.bits):  # whose weights need a pass of their own
        assert calls[2] < calls[0], "the prompts were observed again"
    assert [p.statistics_from for p in prompts] == [None, None, "run 1"]
    assert prompts[0].read == prompts[2].encoded == 0
    assert (prompts[2].read == prompts[1].encoded + prompts[1].read) == rereads


def test_without_search_samples_the_statistics_prompts_still_pass(
    configure: Callable[..., RunConfig],
    omni: Any,
    copied: Any,
    few: Calibration,
    tmp_path: Path,
) -> None:
    config, alone = configure("method=morphoquant"), replace(few, search=())
    store = ArtifactStore(tmp_path / "cache")
    first, second = (walked(config, copied(omni), alone, store, tmp_path) for _ in range(2))
    same(first[0], second[0])
    assert second[1].statistics_from is not None
    assert second[1].read > 0


def test_a_damaged_entry_costs_only_time(
    configure: Callable[..., RunConfig], omni: Any, copied: Any, few: Calibration, tmp_path: Path
) -> None:
    config, store = configure("method=rtn"), ArtifactStore(tmp_path / "cache")
    first, cold = walked(config, copied(omni), few, store, tmp_path)
    for path in (tmp_path / "cache").glob("*/*/tensors.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    second, prompts = walked(config, copied(omni), few, store, tmp_path)
    same(first, second)
    # Exactly as with an empty cache: a run reads again only what it has just made itself.
    assert (prompts.statistics_from, prompts.read) == (None, cold.read)


@pytest.fixture
def key(omni: Any, few: Calibration, tmp_path: Path) -> Callable[..., str]:
    """Where the statistics of a run would lie."""
    store = ArtifactStore(tmp_path / "cache")

    def make(config: RunConfig, calibration: Calibration = few, towers: Any = TOWERS) -> str:
        quantizer = engine.BlockQuantizer(config.method, config.bits, histograms=True)
        prompts = Prompts(config, omni, store)
        shared = SharedStatistics(prompts, calibration, towers, quantizer)
        return store.folder("statistics", shared.identity).name

    return make


SHARE = {
    "what is chosen from the statistics": ["method.compensation.mask.std_threshold=3"],
    "no compensation": ["method/compensation=none"],
    "no search": ["method.activation.range.search=false"],
    "dynamic activations": ["method/activation=per_token", "method/compensation=none"],
    "activation bits": ["bits.activation=8"],
    "what is asked": ["limit=3", "benchmark=mini_mmmu"],
}
DIFFER = {
    "another grid for the weights": ["method/weight=int"],
    "weight bits": ["bits.weight=8"],
    "weights as they are": ["bits.weight=16"],
    "a rotation": ["method/transform=rotate"],
    "batches": ["calibration.batch_size=2"],
    "pictures": ["model.media.image_max_pixels=2000"],
    "instructions": ["model.system_prompt=Answer."],
    "attention": ["model.attention=eager"],
    "a branch beside the weights": ["method/compensation=low_rank"],
}


@pytest.mark.parametrize("overrides", SHARE.values(), ids=SHARE)
def test_runs_that_observe_the_same_share(
    configure: Callable[..., RunConfig], key: Callable[..., str], overrides: list[str]
) -> None:
    assert key(configure("method=morphoquant", *overrides)) == key(configure("method=morphoquant"))


@pytest.mark.parametrize("overrides", DIFFER.values(), ids=DIFFER)
def test_runs_that_observe_something_else_do_not(
    configure: Callable[..., RunConfig], key: Callable[..., str], overrides: list[str]
) -> None:
    assert key(configure("method=morphoquant", *overrides)) != key(configure("method=morphoquant"))


def test_prompts_are_part_of_the_key(
    configure: Callable[..., RunConfig], key: Callable[..., str], few: Calibration
) -> None:
    config = configure("method=morphoquant")
    fewer = replace(few, samples=few.samples[:-1])
    answered = replace(few.samples[0], answer="another")
    assert key(config, fewer) != key(config)
    assert key(config, replace(few, samples=(answered, *few.samples[1:]))) != key(config)
    assert key(config, replace(few, search=())) == key(config)


@pytest.mark.parametrize("late", ["method=morphoquant_folded", "method=atom"])
def test_weights_that_are_rounded_late_make_all_choices_part_of_the_key(
    configure: Callable[..., RunConfig], key: Callable[..., str], few: Calibration, late: str
) -> None:
    config = configure(late)
    assert key(config) == key(configure(late, "limit=3"))
    assert key(config) != key(configure(late, "method.compensation.mask.std_threshold=3"))
    assert key(config) != key(config, replace(few, search=()))


def test_behind_a_quantized_tower_all_choices_are_part_of_the_key(
    configure: Callable[..., RunConfig], key: Callable[..., str]
) -> None:
    one, other = (
        configure("method=morphoquant", f"method.compensation.mask.std_threshold={t}")
        for t in (2.0, 3.0)
    )
    assert key(one) == key(other)
    towers = ["vision", "decoder"]
    assert key(one, towers=towers) != key(other, towers=towers)


def test_a_batch_comes_back_as_it_was_encoded(
    configure: Callable[..., RunConfig], omni: Any, few: Calibration, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path)
    expected = [omni.encode([s.messages]) for s in few.samples]
    for _ in range(2):
        prompts = Prompts(configure(), omni, store)
        found = [prompts.encode_batch([sample]) for sample in few.samples]
        same(dict(enumerate(expected)), dict(enumerate(found)))
    assert (prompts.read, prompts.encoded) == (len(few.samples), 0)
