"""Table 3 of the paper: baseline, with compensation, with the composite loss, beside published.

    python -m experiments.table3                             # the small model
    python -m experiments.table3 method=morphoquant          # the clean preset alone

Rows are ``conf/ablation/table3_*``, the sweep is ``conf/experiment/table3.yaml``.
"""

from experiments.command import run

if __name__ == "__main__":
    run("table3")
