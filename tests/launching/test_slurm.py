"""``hydra/launcher=slurm`` against commands that behave as SLURM's, and run the jobs here."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from morphoquant.analysis.sweeps import read_notes

COMMANDS = {
    # Keeps the script, starts every task of its array, answers as sbatch does.
    "sbatch": """
for script; do :; done
cp "$script" "$FAKE_SLURM/submitted.sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 "$last"); do
    SLURM_JOB_ID=70$task SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 \\
        SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_LOCALID=0 SLURM_PROCID=0 \\
        SLURM_JOB_NODELIST=localhost sh "$script" > /dev/null 2>&1 &
done
echo "Submitted batch job 7"
""",
    "srun": """
while ! [ -x "$1" ]; do shift; done
"$@" || echo "$SLURM_ARRAY_TASK_ID" >> "$FAKE_SLURM/failed"
""",
    "sacct": """
echo "JobID|State|NodeList"
for task in 0 1 2; do
    state=RUNNING
    grep -qx "$task" "$FAKE_SLURM/failed" 2> /dev/null && state=OUT_OF_MEMORY
    echo "7_$task|$state|localhost"
done
""",
    "scontrol": "echo localhost\n",
}


@pytest.fixture
def cluster(tmp_path: Path, light: dict[str, str]) -> Path:
    """A folder of stand-ins for SLURM's commands, first on the path of ``light``."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, script in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}")
        (folder / name).chmod(0o755)
    light["PATH"] = f"{folder}{os.pathsep}{light['PATH']}"
    light["FAKE_SLURM"] = str(folder)
    return folder


def test_one_array_of_jobs_with_the_users_resources(
    tmp_path: Path, cluster: Path, done: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    found = done(
        "-m",
        "method=rtn,quarot,morphoquant",
        "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.timeout_min=90",
        "hydra.launcher.mem_gb=32",
        "hydra.launcher.array_parallelism=2",
        "+hydra.launcher.additional_parameters.mail-type=END",
    )
    assert found.returncode == 1, found.stderr  # one of them is killed
    script = (cluster / "submitted.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    assert options["partition"] == "gpu"
    assert options["time"] == "90"
    assert options["mem"] == "32GB"
    assert options["gpus-per-node"] == "1"
    assert options["array"] == "0-2%2"
    assert options["mail-type"] == "END"
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    first, killed, last = read_notes(sweep)
    assert "run" in first
    assert "run" in last
    assert "OUT_OF_MEMORY" in killed["error"]
    assert list(sweep.glob(".submitit/**/*_submitted.pkl")), "its folder is the sweep's"
    assert options["error"].startswith(str(sweep))
    assert "quarot" in (sweep / "table.md").read_text()
