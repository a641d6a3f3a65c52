"""Every value of ``report`` has a maker, and no maker is out of reach."""

from __future__ import annotations

from typing import get_args

from morphoquant.analysis.reports import REPORTS
from morphoquant.config.schema import RunConfig


def test_config_and_makers_name_the_same_reports() -> None:
    assert set(get_args(RunConfig.model_fields["report"].annotation)) == set(REPORTS)
