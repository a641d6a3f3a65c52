"""What a user or a machine does wrong, by the real command: said plainly, and nothing is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

RUN = ("method=rtn_static", "bits.weight=3", "reference=false")
LIGHT = ("method=fp16", "benchmark.tasks=[mini_scienceqa]", "limit=1")


def check_said(done: Any, code: int, *words: str) -> None:
    """The exit code, the words, and no traceback."""
    assert done.code == code, done.said
    assert "Traceback" not in done.said, done.said
    for word in words:
        assert word in done.said, done.said


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture
def copy(whole: Any, tmp_path: Path) -> Path:
    """The folder of a finished sweep, to be spoiled."""
    return shutil.copytree(whole[0], tmp_path / "copy")


def test_a_second_sweep_in_the_same_folder(command: Any, copy: Path) -> None:
    stopped = command.sweep(copy, fate={"at": "open sweep/jobs/0001.json", "kind": "stop"})
    assert stopped.code is None, stopped.said
    before = files(copy / "sweep" / "jobs")
    second = command.sweep(copy)
    words = (str(copy / "sweep"), f"process {stopped.pid} ", "since 20", "hydra.sweep.dir")
    check_said(second, 2, "another sweep works in this folder", "no job was started", *words)
    assert files(copy / "sweep" / "jobs") == before
    first = command.go_on(stopped)
    check_said(first, 0)
    assert len(files(copy / "sweep" / "jobs")) == 2
    assert not list((copy / "sweep").glob(".holder*"))


def test_a_run_directory_that_is_read_only(command: Any, whole: Any, tmp_path: Path) -> None:
    """It is refused before the model is loaded, and goes on once it may be written."""
    (second,) = (p for p in whole[1].points if "-rtn_" in p and p.endswith("scienceqa.jsonl 1"))
    folder = tmp_path / "here"
    killed = command(folder, *RUN, fate={"at": second, "kind": "kill"})
    assert killed.code == -9, killed.said
    (run,) = folder.glob("runs/*-rtn_static-*")
    kept = run / "answers" / "mini_scienceqa.jsonl"
    before = kept.read_bytes()
    assert before.count(b"\n") == 1
    run.chmod(0o500)
    done = command(folder, *RUN, fate={"kind": "powerless"})
    check_said(done, 1, run.name, "Permission denied", "same command again")
    assert not any("cache/artifacts/inputs" in point for point in done.points)
    run.chmod(0o700)
    check_said(command(folder, *RUN, fate={"kind": "powerless"}), 0)
    assert kept.read_bytes().startswith(before[: before.index(b"\n") + 1])
    (sound,) = whole[0].glob("runs/*-rtn_static-*")
    assert (run / "samples.parquet").read_bytes() == (sound / "samples.parquet").read_bytes()


def test_a_place_where_no_folder_can_be(command: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    where = "paths.runs=file/runs"
    done = command(tmp_path, "-m", "method=fp16,rtn", where)
    check_said(done, 2, "no job was started", str(tmp_path / "file" / "runs"), "paths.runs=FOLDER")
    check_said(command(tmp_path, "method=fp16", where), 1, "file/runs", "paths.runs=FOLDER")


def test_damaged_cache_entries_cost_time_only(command: Any, copy: Path, whole: Any) -> None:
    """One bit is flipped in every file of the cache."""
    damaged = [p for p in (copy / "cache" / "artifacts").rglob("*") if p.suffix != ".lock"]
    for path in (p for p in damaged if p.is_file()):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    shutil.rmtree(copy / "runs")
    done = command(copy, *RUN)
    check_said(done, 0, "is removed and made anew")
    for kind in ("content", "checkpoint", "inputs", "statistics"):
        assert f"cache/artifacts/{kind}/" in done.said, done.said
    (here,) = copy.glob("runs/*")
    for name in ("samples.parquet", "quantizers.safetensors", "errors.parquet"):
        assert (here / name).read_bytes() == (whole[0] / "runs" / here.name / name).read_bytes()


def test_a_weight_that_is_not_a_number(command: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from morphoquant.models.loading import embedded_folder

    model = shutil.copytree(embedded_folder("tiny_omni"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.2.self_attn.k_proj.weight"))
    tensors[name][1, 2] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    done = command(tmp_path, *LIGHT, f"model.path={model}")
    check_said(done, 1, "NaN", "layers.2.self_attn.k_proj.weight")
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_video_that_does_not_decode(command: Any, mini_root: Path, tmp_path: Path) -> None:
    """Its index is in order and its pictures are not: refused before a run directory is made."""
    sets = shutil.copytree(mini_root, tmp_path / "sets")
    clip = sets / "videos" / "clip_evaluation_0002.mp4"
    content = bytearray(clip.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start:end] = b"\xff" * (end - start)
    clip.write_bytes(content)
    done = command(tmp_path, *RUN, f"benchmark.data_root={sets}")
    check_said(done, 1, "mini_videomme", "row 1", str(clip), "a video that decodes")
    assert not (tmp_path / "runs").exists()
    shutil.copy(mini_root / "videos" / clip.name, clip)
    within = (*RUN, "benchmark.tasks=[mini_videomme]", "limit=2", f"benchmark.data_root={sets}")
    check_said(command(tmp_path, *within), 0)


def test_wandb_out_of_reach(command: Any, tmp_path: Path) -> None:
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:1"}
    online = ("tracker=wandb", "tracker.mode=online")
    done = command(tmp_path, *LIGHT, *online, environment=nowhere)
    check_said(done, 0)
    assert done.said.count("kept offline") == 1, done.said
    assert list(tmp_path.glob("runs/*/wandb/offline-run-*"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tracker.mode=onlin", ("tracker.mode", "onlin", "offline")),
        (
            "tracker.project=team/quantization",
            ("tracker.project", "team/quantization", "tracker.entity"),
        ),
    ],
)
def test_wandb_misconfigured(command: Any, tmp_path: Path, override: str, words: Any) -> None:
    done = command(tmp_path, "-m", "method=fp16,rtn", "tracker=wandb", override)
    check_said(done, 2, "no job was started", *words)
    assert not list(tmp_path.iterdir())
