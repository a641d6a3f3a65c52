"""The sensitivity table, its suggestions and its figures, from run directories made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from morphoquant.analysis.figures import TableError, cell_heatmap, sensitivity_plot
from morphoquant.analysis.sensitivity import sensitivity
from morphoquant.analysis.suggestion import NAME, command_of, leave, suggest
from morphoquant.config.schema import (
    ActivationConfig,
    BitsConfig,
    MethodConfig,
    SensitivityConfig,
    WeightConfig,
)
from morphoquant.errors import HarnessError

RTN = MethodConfig(
    name="rtn", weight=WeightConfig(format="int"), activation=ActivationConfig(format="int")
)
BLOCKS = {"decoder.0": 0.5, "decoder.1": 0.02, "decoder.2": 0.01}
MODALITIES = {"text": 0.01, "image": 0.4, "video": 0.1, "audio": 0.3}
QUESTIONS = 60
Wanted = dict[str, tuple[float, int]]
"""Unit -> KL divergence, questions lost."""
UNITS: Wanted = {
    "all": (0.6, 20),
    **{unit: (kl, int(30 * kl)) for unit, kl in BLOCKS.items()},
    **{unit: (kl, int(20 * kl)) for unit, kl in MODALITIES.items()},
}


def linears_of(unit: str, width: int) -> list[dict[str, Any]]:
    """Two linears in each of three blocks: 64 x 64 and 32 x 128."""
    chosen = [unit.split(".")[1]] if unit.startswith("decoder.") else ["0", "1", "2"]
    side = {"format": "int", "bits": width, "effective_bits": float(width)}
    return [
        {"name": f"model.layers.{block}.{name}", "group": group, "in_features": into}
        | {"out_features": out, "tokens": 10, "weight": side, "activation": side}
        for block in chosen
        for name, group, out, into in (("a.q", "attn_in", 64, 64), ("b.d", "mlp_out", 32, 128))
    ]


def save(
    root: Path, unit: str, loss: float, lost: int, width: int = 4, asked: bool = True
) -> dict[str, str]:
    """A finished run of one unit (or of ``fp16``); returns its path as a job notes it."""
    name = f"{unit.replace('.', '_')}{width}"
    folder = root / f"{name}-{name.ljust(10, '0')[:10]}"
    folder.mkdir(parents=True)
    right = [0.0] * lost + [1.0] * (QUESTIONS - lost)
    rows = [
        {"benchmark": "mmmu", "task": "mmmu", "doc_id": i, "id": str(i), "modality": "image"}
        | {"target": "A", "correct": verdict}
        for i, verdict in enumerate(right)
    ]
    accuracy: dict[str, Any] = {}
    if asked:
        pd.DataFrame(rows).to_parquet(folder / "samples.parquet")
        value = 100 * float(np.mean(right))
        accuracy = {"mmmu": {"value": value, "n": QUESTIONS, "empty": 0, "unparsed": 0}}
    is_modality = unit in MODALITIES
    bits = {"weight": 16 if is_modality else width, "activation": width}
    only = [f"model.layers.{unit.split('.')[1]}.*"] if unit.startswith("decoder.") else []
    config = {
        "method": RTN.model_dump(mode="json"),
        "bits": bits,
        "model": {"scope": {"only": only}},
    }
    (folder / "identity.json").write_text(json.dumps({"config": config}))
    (folder / "manifest.json").write_text(json.dumps({"linears": linears_of(unit, width)}))
    result: dict[str, Any] = {
        "fingerprint": name.ljust(64, "0"),
        "method": "fp16" if unit == "fp16" else "rtn",
        "scheme": f"w{bits['weight']}a{width}",
        "model": "qwen",
        "reference": None if unit == "fp16" else "fp1616".ljust(64, "0"),
        "slots": {"weight": "none" if is_modality else "int"},
        "scope": {"hash": unit, "towers": ["decoder"]},
        "calibration": {"ids_hash": "c", "name": "c", "samples": 8, "leaked": 0},
        "question_ids": "q",
        "accuracy": accuracy,
        "mean": accuracy["mmmu"]["value"] if asked else None,
        "bits": {"weight": float(bits["weight"]), "activation": float(width)},
        "logits": None if unit == "fp16" else {"kl": loss, "kl/image": 2 * loss, "kl/text": 0.0},
        "versions": {},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return {"run": str(folder)}


def sweep(
    root: Path, units: Wanted = UNITS, width: int = 4, asked: bool = True
) -> list[dict[str, str]]:
    if not list(root.glob("fp16*")):
        save(root, "fp16", 0.0, 0, 16, asked)
    scheme = f"bits=w{width}a{width}"
    return [
        {"overrides": f"experiment=sensitivity {scheme} limit=8 unit={unit}"}
        | save(root, unit, loss, lost, width, asked)
        for unit, (loss, lost) in units.items()
    ]


def test_the_dearest_unit_of_each_kind_stands_first(tmp_path: Path) -> None:
    notes = sweep(tmp_path)
    notes.append({"overrides": "unit=decoder.3", "error": "no room\nat all"})
    report = sensitivity(notes, tmp_path, resamples=200)
    frame = report.frame
    assert list(frame["unit"]) == [
        *("all", "decoder.0", "decoder.1", "decoder.2", "decoder.3"),
        *("image", "audio", "video", "text"),
    ]
    rows = frame.set_index("unit")
    assert rows.loc["decoder.0", "KL share"] == pytest.approx(100 * 0.5 / 0.53)
    assert rows.loc["decoder.0", "weights"] == pytest.approx(100 / 3)
    assert rows.loc["decoder.0", "KL image"] == 1.0
    assert rows.loc["decoder.0", "Δ mean"] == pytest.approx(-100 * 15 / QUESTIONS)
    assert rows.loc["decoder.0", "verdict"] == "lower"
    assert rows.loc["decoder.2", "verdict"] == "no difference found"
    assert rows.loc["decoder.2", "p"] == 1.0
    assert rows.loc["decoder.3", "verdict"] == "failed: no room"
    text = report.markdown()
    assert "Additivity at w4a4: everything at once has KL 0.6;" in text
    assert "Not the same scope" not in text
    assert "Not the same weight quantizer" not in text


def test_the_same_runs_give_the_same_report(tmp_path: Path) -> None:
    notes = sweep(tmp_path)
    first, again = (sensitivity(notes, tmp_path, resamples=100) for _ in range(2))
    pd.testing.assert_frame_equal(first.frame, again.frame)
    assert first.markdown() == again.markdown()
    turned = sensitivity(notes[::-1], tmp_path, resamples=100)
    pd.testing.assert_frame_equal(first.frame, turned.frame)


def test_calibration_prompts_are_enough(tmp_path: Path) -> None:
    """Without questions there is no accuracy, and everything else."""
    notes = sweep(tmp_path, asked=False)
    report = sensitivity(notes, tmp_path)
    assert "mean" not in report.frame
    assert report.frame["KL"].notna().all()
    assert set(report.frame["verdict"]) == {"no questions asked"}
    assert suggest(notes, tmp_path, SensitivityConfig())[0]
    sensitivity_plot(report.frame)


def test_refused_sweeps(tmp_path: Path) -> None:
    notes = sweep(tmp_path)
    with pytest.raises(HarnessError, match="no unit="):
        sensitivity([{"overrides": "method=rtn", "run": notes[0]["run"]}], tmp_path)
    other = save(tmp_path / "other", "decoder.0", 0.1, 0)
    kept = Path(other["run"]) / "result.json"
    kept.write_text(kept.read_text().replace("decoder_04", "quarot_004"))
    twice = [*notes, {"overrides": "method=quarot unit=decoder.0", **other}]
    with pytest.raises(HarnessError, match=r"two jobs of unit=decoder\.0 at w4a4"):
        sensitivity(twice, tmp_path)


def test_a_suggestion_spends_the_budget_where_it_hurts(tmp_path: Path) -> None:
    notes = sweep(tmp_path)
    (found,), missing = suggest(notes, tmp_path, SensitivityConfig(budget=5.5))
    assert not missing
    assert found.kind == "block"
    told = {unit: (o.weight, o.activation) for unit, o in found.allocation.chosen.items()}
    assert told == {"decoder.0": (8, 8), "decoder.1": (4, 4), "decoder.2": (4, 4)}
    assert found.allocation.loss == pytest.approx(0.5 / 256 + 0.03)
    assert found.uniform == pytest.approx({"w4a4": 0.53, "w8a8": 0.53 / 256, "w16a16": 0.0})
    bits = BitsConfig.model_validate(found.bits())
    assert bits.at("model.layers.0.a.q").scheme == "w8a8"
    assert bits.at("model.layers.2.b.d").scheme == "w4a4"
    losses = [
        suggest(notes, tmp_path, SensitivityConfig(budget=budget))[0][0].allocation.loss
        for budget in (4.5, 5.5, 7.0, 9.0, 16.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_measured_widths_come_before_modelled_ones(tmp_path: Path) -> None:
    notes = sweep(tmp_path)
    at_eight: Wanted = {"all": (0.3, 0), "decoder.0": (0.3, 0), "decoder.1": (0.0, 0)}
    at_eight["decoder.2"] = (0.0, 0)
    notes += sweep(tmp_path, at_eight, width=8)
    (found,), _ = suggest(notes, tmp_path, SensitivityConfig(budget=8.5))
    assert found.uniform["w8a8"] == pytest.approx(0.3)
    assert all(option.measured for option in found.allocation.chosen.values())
    assert found.allocation.chosen["decoder.0"].weight == 16


def test_an_incomplete_sweep_suggests_nothing(tmp_path: Path) -> None:
    notes = sweep(tmp_path, {k: v for k, v in UNITS.items() if k != "decoder.1"})
    found, missing = suggest(notes, tmp_path, SensitivityConfig())
    assert not found
    assert missing == ["No suggestion for blocks: not every block was measured."]
    _, missing = suggest(notes[1:], tmp_path, SensitivityConfig())
    assert "unit=all" in missing[0]
    _, missing = suggest(sweep(tmp_path / "b"), tmp_path / "b", SensitivityConfig(budget=3.0))
    assert "sensitivity.budget=3" in missing[0]


def test_what_a_sweep_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "a sweep"
    folder.mkdir()
    notes = sweep(runs)
    report = sensitivity(notes, runs, resamples=100)
    settings = SensitivityConfig(budget=5.5)
    (figure,) = leave(report.frame, notes, runs, settings, folder)
    assert figure.stat().st_size > 5000
    text = (folder / "bits" / f"{NAME}.yaml").read_text()
    BitsConfig.model_validate(OmegaConf.to_container(OmegaConf.create(text)))
    assert (folder / "bits" / f"{NAME}_block.yaml").is_file()
    command = command_of(notes, folder, NAME)
    quoted = f"'--config-dir={folder}'"
    assert command == f"python run.py {quoted} method=rtn limit=8 bits=suggestion"
    assert f"#   {command}\n" in text
    assert "modelled" in text
    said = capsys.readouterr().out
    assert "w8a8: decoder.0" in said
    assert command in said


def test_figures_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    frame = sensitivity(sweep(tmp_path), tmp_path, resamples=100).frame
    drawn = sensitivity_plot(frame)
    assert len(drawn.axes) == 2 * 3  # blocks and modalities; KL, prompts, accuracy
    with pytest.raises(TableError, match="no cell"):
        cell_heatmap(frame)
    with pytest.raises(TableError, match="two rows"):
        sensitivity_plot(pd.concat([frame, frame]))
    with pytest.raises(TableError, match="'KL'"):
        sensitivity_plot(frame.drop(columns="KL"))
    cells = frame[frame["kind"] == "block"].assign(kind="cell")
    cells["unit"] = cells["unit"] + ".mlp_out"
    axes = cell_heatmap(cells).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(BLOCKS)
