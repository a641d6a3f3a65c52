"""Table 1 of the paper: methods at w4a16, w8a8 and w4a4, measured beside published.

    python -m experiments.table1                             # the small model
    python -m experiments.table1 model=qwen2_5_omni_3b model.path=FOLDER \
        calibration=mmmu_scienceqa benchmark=paper

Rows are ``conf/row``, the sweep is ``conf/experiment/table1.yaml``.
"""

from experiments.command import run

if __name__ == "__main__":
    run("table1")
