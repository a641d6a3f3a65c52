from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from morphoquant.config.schema import BenchmarkConfig
from morphoquant.evaluation import tasks

CONF = Path(__file__).parents[2] / "conf" / "benchmark"


def test_importing_evaluation_is_light() -> None:
    code = (
        "import sys, morphoquant.evaluation\n"
        "heavy = {'torch', 'lmms_eval', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parents[1])


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_stock_files_exist_and_name_their_data(task: tasks.Task) -> None:
    stock = tasks.stock_data(task)
    assert "/" in stock.hub
    assert stock.split in ("validation", "test", "sound", "music", "speech")
    assert stock.split in (task.name.rsplit("_", 1)[-1], "validation", "test")


def test_configs_of_the_hub_are_read_from_the_stock_files() -> None:
    assert tasks.stock_data(tasks.find("scienceqa")).config == "ScienceQA-FULL"
    assert tasks.stock_data(tasks.find("scienceqa_img")).config == "ScienceQA-IMG"
    assert tasks.stock_data(tasks.find("air_bench_foundation_music")).config == "Foundation"
    assert tasks.stock_data(tasks.find("mmmu_val")).config is None


def test_labels_are_those_of_the_stock_code() -> None:
    labels = tasks.videomme_labels()
    assert labels["duration"] == ("short", "medium", "long")
    assert [len(labels[c]) for c in ("domain", "sub_category", "task_type")] == [6, 30, 12]


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("limit", [None, 20])
def test_every_config_is_valid(path: Path, limit: int | None) -> None:
    whole = OmegaConf.create({"limit": limit, "benchmark": OmegaConf.load(path)})
    values = OmegaConf.to_container(whole.benchmark, resolve=True)
    benchmark = BenchmarkConfig.model_validate(values)
    assert benchmark.name == path.stem
    assert benchmark.limit == (limit if benchmark.tasks else None)  # nothing to limit
    for name in benchmark.tasks:
        assert tasks.find(name).embedded == path.stem.startswith("mini")
