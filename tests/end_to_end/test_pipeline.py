"""Real runs of the embedded model through the whole pipeline, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from morphoquant import pipeline
from morphoquant.analysis import table
from morphoquant.analysis.sweeps import TABLES, read_tables
from morphoquant.calibration.samples import CalibrationError
from morphoquant.config import RunConfig, load
from morphoquant.config.store import register
from morphoquant.errors import HarnessError

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """Compose a config as the command line does, into folders shared by this module's tests."""
    root = tmp_path_factory.mktemp("runs")
    register()

    def make(*overrides: str) -> RunConfig:
        fixed = [
            f"paths.runs={root / 'runs'}",
            f"paths.cache={root / 'cache'}",
            "tracker=none",
            "statistics.figures=false",  # seconds a run; one test has them drawn
            "statistics.probes=1",  # of every modality
            "calibration.samples=20",
            "calibration.search_samples=5",
        ]
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            return load(compose("config", overrides=[*fixed, *overrides]))

    return make


def samples(config: RunConfig, result: dict[str, Any]) -> pd.DataFrame:
    """Answers and verdicts of a finished run."""
    return pd.read_parquet(pipeline.run_path(config, result) / "samples.parquet")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rotation_alone_gives_the_same_answers(
    configure: Callable[..., RunConfig], dtype: str
) -> None:
    plain = configure("method=fp16", "limit=9", f"model.dtype={dtype}")
    turned = configure("method=quarot", "bits=w16a16", "limit=9", f"model.dtype={dtype}")
    first, second = pipeline.run(plain), pipeline.run(turned)
    assert second["transform_drift"] <= 1e-4
    assert first["transform_drift"] is None
    a, b = samples(plain, first), samples(turned, second)
    pd.testing.assert_series_equal(a["answer"], b["answer"])
    assert set(a["modality"]) == {"text", "image", "video", "audio"}


@pytest.mark.parametrize("method", ["rtn", "morphoquant"])
def test_batch_size_does_not_change_an_answer(
    configure: Callable[..., RunConfig], method: str
) -> None:
    one = configure(f"method={method}", "limit=9", "benchmark.batch_size=1", "reference=false")
    eight = configure(f"method={method}", "limit=9", "benchmark.batch_size=8", "reference=false")
    a, b = samples(one, pipeline.run(one)), samples(eight, pipeline.run(eight))
    pd.testing.assert_series_equal(a["answer"], b["answer"])


def test_same_run_twice_gives_the_same_numbers_and_leaves_a_whole_record(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = configure("method=morphoquant", "limit=9")
    first = pipeline.run(config)
    again = config.model_copy(
        update={"paths": config.paths.model_copy(update={"runs": str(tmp_path)})}
    )
    second = pipeline.run(again)
    assert first["fingerprint"] == second["fingerprint"]
    for key in ("accuracy", "modality", "bits", "logits", "statistics", "reference"):
        assert first[key] == second[key], key

    directory = pipeline.run_path(again, second)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert len(manifest["linears"]) == 28  # four blocks of seven
    for linear in manifest["linears"]:
        assert linear["weight"]["format"] == "nf4"
        assert linear["activation"]["bits"] == 4
        assert linear["calls"] > 0
        assert linear["tokens"] > 0
    assert 4.0 < second["bits"]["weight"] < 4.2
    outliers = pd.read_parquet(directory / "outliers.parquet")
    assert set(outliers["modality"]) == {"text", "image", "video", "audio", "all"}
    assert outliers.groupby(["layer", "group"]).ngroups == 16
    overlap = pd.read_parquet(directory / "overlap.parquet")
    assert len(overlap) == 16 * 6  # every pair of four modalities
    for name in ("identity.json", "result.json", "channels.parquet", "samples.parquet"):
        assert (directory / name).is_file()


def test_finished_run_is_looked_up_and_not_repeated(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("method=rtn", "limit=4", "benchmark=mini_scienceqa")
    first = pipeline.run(config)

    def refuse(*args: object) -> None:
        raise AssertionError("a finished run was executed again")

    monkeypatch.setattr(pipeline, "_execute", refuse)
    assert pipeline.run(config) == first


def test_parts_can_be_switched_off(configure: Callable[..., RunConfig]) -> None:
    common = ("method=morphoquant", "limit=4", "benchmark=mini_scienceqa", "reference=false")
    whole = pipeline.run(configure(*common))
    bare = pipeline.run(configure(*common, "method/compensation=none"))
    still = pipeline.run(configure(*common, "method.activation.range.search=false"))
    assert bare["bits"]["activation"] == pytest.approx(4.0)
    assert whole["bits"]["activation"] > 4.1  # the masked channels stay in 16 bits
    kls = {run["logits"]["kl"] for run in (whole, bare, still)}
    assert len(kls) == 3, "each part moves the logits"


def test_scope_reaches_the_towers(configure: Callable[..., RunConfig]) -> None:
    config = configure(
        "method=rtn",
        "bits=w8a8",
        "limit=4",
        "reference=false",
        "model.scope.vision=true",
        "model.scope.audio=true",
    )
    result = pipeline.run(config)
    assert result["scope"]["towers"] == ["vision", "audio", "decoder"]
    assert result["scope"]["linears"] == 28 + 3 * 7 + 2 + 2 * 6


def test_calibrating_on_evaluated_samples_is_refused(configure: Callable[..., RunConfig]) -> None:
    source = "{reader:mmmu,path:'mini:mmmu',split:validation}"
    config = configure("method=rtn", "limit=200", f"calibration.sources=[{source}]")
    with pytest.raises(CalibrationError, match=r"leakage.*mmmu/validation_"):
        pipeline.run(config)


def test_a_calibration_that_says_it_leaks_runs_and_is_counted(
    configure: Callable[..., RunConfig],
) -> None:
    common = ("method=rtn_static", "limit=100", "benchmark=mini_scienceqa", "reference=false")
    leaking = configure(*common, "calibration=mini_leaking", "calibration.samples=40")
    result = pipeline.run(leaking)
    assert result["calibration"]["name"] == "mini_leaking"
    asked = set(samples(leaking, result)["id"])
    assert 0 < result["calibration"]["leaked"] <= 50
    assert len(asked) == 100
    assert any("LEAKS" in note for note in table.footnotes([result]))
    quiet = leaking.calibration.model_copy(update={"allow_leakage": False})
    with pytest.raises(CalibrationError, match="leakage"):
        pipeline.run(leaking.model_copy(update={"calibration": quiet}))


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=morphoquant_reference",),
        ("method=morphoquant_paper",),
        ("method=morphoquant_folded",),
        ("method/compensation=static_bias_per_modality",),
        ("ablation=mask_local_or_global",),
        ("ablation=cosine_token",),
    ],
    ids=lambda overrides: overrides[0].split("=")[1],
)
def test_every_reading_runs_and_leaves_its_atlas(
    configure: Callable[..., RunConfig], overrides: tuple[str, ...]
) -> None:
    config = configure(*overrides, "limit=2", "reference=false", "statistics.figures=true")
    result = pipeline.run(config)
    tables = read_tables(pipeline.run_path(config, result))
    assert set(tables) == set(TABLES)
    errors, ranges = tables["errors"], tables["ranges"]
    assert len(errors) == 16 * 4, "every group and modality"
    assert errors["activation_sqnr_db"].between(5, 60).all()
    assert errors["own_ratio_median"].between(0.05, 1).all()
    assert ranges["masked"].any()
    assert (ranges["ratio"] < 1).any()
    assert set(tables["depth"]["block"]) == {0, 1, 2, 3}
    assert tables["outliers"]["abs_q99"].notna().all()
    cost = result["compensation"]
    assert 0 < cost["masked_share"] <= 1
    static = config.method.compensation.name == "static_bias"
    assert (cost["extra_flops_share"] == 0) == (cost["bypass_rate"] == 0) == static
    assert (cost["stored_numbers"] > 0) == static
    assert result["bits"]["activation"] == pytest.approx(4 + 12 * cost["bypass_rate"])
    figures = {p.stem for p in (pipeline.run_path(config, result) / "figures").glob("*.png")}
    assert {"depth", "sqnr", "clipping", "ratios", "overlap_jaccard"} <= figures
    assert (pipeline.run_path(config, result) / "quantizers.safetensors").is_file()
    assert {"kl/text", "kl/image", "kl/video", "kl/audio"} <= set(result["logits"])


def test_quantizing_nothing_fails(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap of comparing the unquantized model with itself: weights that keep their values."""
    from morphoquant.quantization import rounding
    from morphoquant.quantization.weights import QuantizedWeight

    def keep(weight: Any, config: Any, bits: int) -> QuantizedWeight:
        return QuantizedWeight(weight, {"format": "int", "bits": 4, "effective_bits": 4.0})

    monkeypatch.setattr(rounding, "quantize_weight", keep)
    config = configure(
        "method=rtn", "bits=w4a16", "limit=4", "benchmark=mini_scienceqa", "reference=false",
        "seed=7",
    )  # fmt: skip
    with pytest.raises(HarnessError, match="nothing was quantized"):
        pipeline.run(config)


def test_eight_bits_lose_little_and_four_bits_a_lot(configure: Callable[..., RunConfig]) -> None:
    """Direction of effects, on 48 questions per task (the model card has the full figures)."""
    common = ("method=rtn", "limit=48")
    fp16 = pipeline.run(configure("method=fp16", "limit=48"))
    w8a8 = pipeline.run(configure(*common, "bits=w8a8"))
    w4a4 = pipeline.run(configure(*common, "bits=w4a4"))
    assert fp16["mean"] >= 90
    assert abs(w8a8["mean"] - fp16["mean"]) <= 2
    assert w4a4["mean"] <= fp16["mean"] - 8
    assert w8a8["reference"] == w4a4["reference"] == fp16["fingerprint"]


def test_changed_data_is_another_run(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Same ids, other content: neither questions nor calibration may be taken for the old ones."""
    import datasets

    from morphoquant import evaluation

    config = configure("benchmark=mini_scienceqa", "calibration.samples=4")
    before = evaluation.data_hash(config.benchmark, config.paths)
    folder = Path(config.paths.cache) / "mini" / "scienceqa"
    rows = datasets.load_from_disk(str(folder))
    changed = rows.map(lambda row: {"question": row["question"] + " Really?"})
    changed.save_to_disk(str(tmp_path / "scienceqa"))
    other = config.benchmark.model_copy(update={"data_root": str(tmp_path)})
    assert evaluation.data_hash(other, config.paths) != before
    rows.save_to_disk(str(tmp_path / "again" / "scienceqa"))
    same = config.benchmark.model_copy(update={"data_root": str(tmp_path / "again")})
    assert evaluation.question_ids(same, config.paths) == evaluation.question_ids(
        other, config.paths
    )


def test_one_reference_serves_every_calibration(configure: Callable[..., RunConfig]) -> None:
    """The unquantized model reads no calibration prompt, unless its statistics are wanted."""
    common = ("method=fp16", "limit=3", "benchmark=mini_scienceqa")
    first = pipeline.run(configure(*common))
    other = configure(*common, "calibration=mini_no_audio", "calibration.samples=8")
    assert pipeline.run(other)["fingerprint"] == first["fingerprint"]
    assert first["calibration"]["ids_hash"] is None
    assert not [n for n in table.footnotes([first]) if "calibration" in n]
    watched = configure(*common, "statistics.unquantized=true", "calibration.samples=8")
    second = pipeline.run(watched)
    assert second["fingerprint"] != first["fingerprint"]
    assert "outliers" in read_tables(pipeline.run_path(watched, second))
    rtn = ("method=rtn", "limit=3", "benchmark=mini_scienceqa")
    a, b = configure(*rtn), configure(*rtn, "calibration.samples=8")
    assert pipeline.run(a)["reference"] == pipeline.run(b)["reference"] == first["fingerprint"]
    assert pipeline.run(a)["fingerprint"] != pipeline.run(b)["fingerprint"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=smoothquant",),
        ("method=smoothquant", "method/transform=smooth_searched"),
        ("method=awq", "bits=w4a16"),
        ("method=mbq",),
        ("method=gptq",),
        ("method=gptq", "method/weight=gptq_balanced", "bits=w4a8"),
        ("method=spinquant", "method.transform.steps=2"),
        ("method=mquant", "bits=w4a8"),
        ("method=svdquant",),
        ("method=svdquant", "method/compensation=low_rank_whitened"),
        ("method=masquant", "method.transform.steps=2"),
        ("method=atom",),
        ("method=hif4",),
        ("method=nvfp4",),
        ("method=mxfp4",),
        ("method=nf4", "bits=w4a16"),
        ("method=morphoquant_hif4",),
        ("method=morphoquant", "method/transform=rotate"),
        ("method=morphoquant", "method/compensation=dabc_random"),
        ("method=quarot", "bits=w4a4kv4", "method.transform.r3=true"),
    ],
    ids=" ".join,
)
def test_the_field_runs(configure: Callable[..., RunConfig], overrides: tuple[str, ...]) -> None:
    """Every rival from config to verdicts, with its transform checked and its bits counted."""
    small = ("calibration.samples=15", "calibration.search_samples=5")
    config = configure(*overrides, *small, "limit=1", "reference=false")
    result = pipeline.run(config)
    assert result["scheme"] == config.bits.scheme
    transformed = config.method.transform.name != "none"
    assert (result["transform_drift"] is not None) == transformed
    if transformed:
        assert result["transform_drift"] < 1e-6  # float64
    assert 4 <= result["bits"]["weight"] < 8
    assert 4 <= result["bits"]["activation"] <= 16
    manifest = json.loads((pipeline.run_path(config, result) / "manifest.json").read_text())
    assert (manifest["kv_cache"] is not None) == (config.bits.kv < 16)
    if config.bits.kv < 16:
        assert manifest["kv_cache"]["bits"] == 4
    assert 0 <= result["logits"]["top1_agreement"] <= 1
