"""Why a run is another run than the one that is already there."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.tracking.differences import differences, explain, flatten, nearest
from morphoquant.tracking.fingerprint import code_files, code_hash, git_state
from morphoquant.tracking.rundir import RunDirectory

NAME = "tiny-rtn-w4a4-mini"
BASE: dict[str, Any] = {
    "config": {"calibration": {"samples": 128, "sources": ["a"]}, "seed": 0},
    "code": "a" * 64,
    "versions": {"torch": "2.13.0", "numpy": "2.4"},
    "question_data": "0" * 16,
}
keys = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3),
)
identities = st.dictionaries(keys, trees, max_size=4)


def changed(**values: Any) -> dict[str, Any]:
    """``BASE`` with some dotted keys (``__`` for the dot) set."""
    found = json.loads(json.dumps(BASE))
    for key, value in values.items():
        *parents, leaf = key.split("__")
        place = found
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    return found


@given(identities)
def test_equal_identities_do_not_differ(identity: dict[str, Any]) -> None:
    assert differences(identity, json.loads(json.dumps(identity))) == []


@given(identities, identities)
def test_every_differing_key_is_told_once(one: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = flatten(one), flatten(other)
    expected = {key for key in a.keys() | b.keys() if a.get(key, ...) != b.get(key, ...)}
    assert {line.split(":")[0] for line in differences(one, other)} == expected
    assert len(differences(one, other)) == len(expected)


def test_values_are_shown_and_hashes_named() -> None:
    new = changed(
        config__calibration__samples=64,
        versions__torch="2.14.0",
        code="b" * 64,
        question_data="1" * 16,
    )
    assert differences(BASE, new) == [
        "code",
        "config.calibration.samples: 128 → 64",
        "question_data",
        "versions.torch: 2.13.0 → 2.14.0",
    ]


def test_changed_files_are_named_where_both_sides_tell_them() -> None:
    old = {"code": "a" * 64, "about": {"files": {"x.py": "1", "y.py": "1", "gone.py": "1"}}}
    new = {"code": "b" * 64, "about": {"files": {"x.py": "1", "y.py": "2", "new.py": "1"}}}
    assert differences(old, new) == ["code (gone.py, new.py, y.py)"]
    assert differences({"code": "a" * 64}, new) == ["code"]


def test_the_nearest_run_is_the_one_with_fewest_differences_then_the_newest(
    tmp_path: Path,
) -> None:
    far = RunDirectory.open(tmp_path, NAME, changed(config__seed=1, versions__torch="1"))
    old = RunDirectory.open(tmp_path, NAME, changed(config__seed=2))
    new = RunDirectory.open(tmp_path, NAME, changed(config__seed=3))
    RunDirectory.open(tmp_path, f"{NAME}-more", BASE)  # another name that begins alike
    (tmp_path / f"{NAME}-0000000000").mkdir()
    (tmp_path / f"{NAME}-0000000000" / "identity.json").write_text("{torn")
    for age, run in ((300, old), (200, new), (100, far)):
        state = (run.path / "identity.json").stat()
        os.utime(run.path / "identity.json", (state.st_atime - age, state.st_mtime - age))
    found = nearest(tmp_path, NAME, BASE)
    assert found == (new.path, ["config.seed: 3 → 0"])
    assert explain(tmp_path, NAME, BASE) == (
        f"another run than {new.path.name} (unfinished): config.seed: 3 → 0"
    )
    new.finish({"fingerprint": "f"})
    assert "(finished)" in (explain(tmp_path, NAME, BASE) or "")
    assert explain(tmp_path, "another", BASE) is None


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, NAME, {"config": {str(i): 0 for i in range(20)}})
    said = explain(tmp_path, NAME, {"config": {str(i): 1 for i in range(20)}})
    assert said is not None
    assert said.count("→") == 6
    assert said.endswith("and 14 more")


def test_a_new_directory_says_what_it_has_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def about() -> dict[str, Any]:
        asked.append(1)
        return {"files": {"x.py": "1"}}

    with caplog.at_level(logging.INFO):
        first = RunDirectory.open(tmp_path, NAME, BASE, about)
        assert caplog.messages == []
        second = RunDirectory.open(tmp_path, NAME, changed(config__seed=1), about)
        RunDirectory.open(tmp_path, NAME, changed(config__seed=1), about)
    (message,) = caplog.messages
    assert second.path.name in message
    assert "config.seed: 0 → 1" in message
    assert len(asked) == 2, "only of what is new"
    told = json.loads((first.path / "identity.json").read_text())
    assert told == BASE | {"about": {"files": {"x.py": "1"}}}
    assert first.fingerprint == RunDirectory.open(tmp_path, NAME, BASE).fingerprint


def test_files_of_the_code() -> None:
    files = code_files()
    assert "quantization/engine.py" in files
    assert "tracking/rundir.py" not in files, "cannot move a number"
    assert len({code_hash(), code_hash("models"), code_hash("formats", "models")}) == 3
    assert code_hash(*{name.split("/")[0] for name in files}) == code_hash()


def test_git_is_asked_and_may_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = git_state()
    if state is not None:  # a checkout; an archive of the sources has no repository
        assert len(state["commit"]) == 40
        assert isinstance(state["changed"], bool)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() is None
