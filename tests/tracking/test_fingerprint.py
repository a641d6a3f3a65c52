"""Identity does not depend on how it is written down, and on nothing that it does not hold."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from morphoquant.tracking.fingerprint import code_hash, fingerprint, package_versions

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
identities = st.dictionaries(st.text(min_size=1), trees, min_size=1, max_size=5)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(list(value))}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(identities)
def test_order_of_keys_does_not_matter(identity: dict[str, Any]) -> None:
    assert fingerprint(identity) == fingerprint(reordered(identity))


@given(identities, st.integers())
def test_every_value_matters(identity: dict[str, Any], number: int) -> None:
    assert fingerprint(identity | {"new": number}) != fingerprint(identity | {"new": number + 1})


def test_order_in_lists_and_types_matter() -> None:
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})


def test_code_and_versions() -> None:
    assert len(code_hash()) == 64
    versions = package_versions()
    assert versions["torch"][0].isdigit()
    assert versions["python"].startswith("3.")
    versions["torch"] = "changed"
    assert package_versions()["torch"] != "changed"
