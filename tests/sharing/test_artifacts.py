"""An artifact comes back as it was made, is made once, and never costs a run."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.sharing.artifacts import ArtifactStore

ROOT = Path(__file__).parents[2]
IDENTITY = {"weights": {"format": "nf4", "bits": 4}, "prompts": ["a", "b"]}
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
identities = st.dictionaries(
    st.text(),
    leaves | st.lists(leaves, max_size=2) | st.dictionaries(st.text(), leaves),
    max_size=4,
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return {
        "float64": wide,
        "view": wide[::2, 1],
        "float32": torch.tensor([torch.inf, -0.0, torch.nan, 1e-45]),
        "bfloat16": wide.bfloat16(),
        "int64": torch.arange(5),
        "bool": torch.tensor(True),
        "empty": torch.zeros(0, 3),
    }


def keep(store: ArtifactStore, identity: dict[str, Any] = IDENTITY, mib: int = 0) -> Path:
    with store.claim("things", identity) as claim:
        assert claim.found is None
        padding = {"padding": torch.zeros(mib, 2**20, dtype=torch.uint8)} if mib else {}
        claim.put({"share": 0.1, "names": ["x"]}, tensors() | padding)
    return store.folder("things", identity)


def has(store: ArtifactStore, identity: dict[str, Any] = IDENTITY) -> bool:
    with store.claim("things", identity) as claim:
        return claim.found is not None


@given(identities, st.integers())
def test_the_key_is_the_identity_however_it_is_written(
    identity: dict[str, Any], number: int
) -> None:
    store = ArtifactStore(Path("cache"))
    turned = dict(reversed(identity.items()))
    assert store.folder("a", identity) == store.folder("a", turned)
    one, other = identity | {"new": number}, identity | {"new": number + 1}
    assert store.folder("a", one) != store.folder("a", other)
    assert store.folder("a", identity) != store.folder("b", identity)


def test_an_artifact_comes_back_bit_for_bit(tmp_path: Path) -> None:
    keep(ArtifactStore(tmp_path, maker="first"))
    with ArtifactStore(tmp_path, maker="second").claim("things", IDENTITY) as claim:
        assert claim.found is not None
        assert claim.found.maker == "first"
        assert claim.found.values == {"share": 0.1, "names": ["x"]}
        for name, tensor in tensors().items():
            found = claim.found.tensors[name]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found, tensor))
            assert torch.equal(*raw), name
    files = {p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"}
    assert files == {"entry.json", "tensors.safetensors"}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "last byte of the tensors": lambda f: flip(f / "tensors.safetensors", -1),
    "header of the tensors": lambda f: flip(f / "tensors.safetensors", 3),
    "a digit in the values": lambda f: (f / "entry.json").write_text(
        (f / "entry.json").read_text().replace('"share": 0.1', '"share": 0.2')
    ),
    "tensors cut off": lambda f: os.truncate(f / "tensors.safetensors", 100),
    "entry cut off": lambda f: os.truncate(f / "entry.json", 40),
    "entry empty": lambda f: (f / "entry.json").write_text(""),
    "entry of another kind": lambda f: (f / "entry.json").write_text("[1]"),
    "tensors gone": lambda f: (f / "tensors.safetensors").unlink(),
    "entry gone": lambda f: (f / "entry.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_named_and_made_anew(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    folder = keep(ArtifactStore(tmp_path))
    damage(folder)
    with caplog.at_level(logging.WARNING):
        assert keep(ArtifactStore(tmp_path)) == folder
    (message,) = caplog.messages
    assert str(folder) in message
    assert "damaged" in message
    assert has(ArtifactStore(tmp_path))


def test_an_entry_of_another_identity_is_not_taken(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    other = {"weights": "int"}
    os.rename(keep(store), store.folder("things", other))
    assert not has(store, other)


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path, limit_gb=2.5 / 1024)
    first, second, third = ({"number": i} for i in range(3))
    for age, identity in ((200, first), (100, second)):
        entry = keep(store, identity, mib=1) / "entry.json"
        os.utime(entry, (entry.stat().st_atime - age, entry.stat().st_mtime - age))
    assert has(store, first)  # used now: the second is the oldest
    keep(store, third, mib=1)
    assert [has(store, i) for i in (first, second, third)] == [True, False, True]


def test_what_is_too_large_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ArtifactStore(tmp_path, limit_gb=0.5 / 1024)
    keep(store, mib=1)
    assert "paths.cache_limit_gb" in caplog.text
    assert not has(store)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_place_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    store = ArtifactStore(tmp_path / "cache")
    keep(store)
    keep(store)
    (message,) = caplog.messages
    assert str(tmp_path / "cache") in message
    assert "paths.share_artifacts=false" in message


def test_a_full_disk_is_one_warning_and_leaves_no_litter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    store = ArtifactStore(tmp_path)
    keep(store)
    keep(store)
    assert len(caplog.messages) == 1
    assert "No space left" in caplog.text
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_switched_off_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = ArtifactStore(None)
    for _ in range(2):
        with store.claim("things", IDENTITY) as claim:
            assert claim.found is None
            claim.put({}, tensors())
    assert not list(tmp_path.iterdir())


def test_a_failed_maker_lets_the_next_one_in(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ArtifactStore(tmp_path).claim("things", IDENTITY):
        raise RuntimeError("while it was made")
    assert keep(ArtifactStore(tmp_path)).is_dir()


MAKER = """
import os, sys, time
from pathlib import Path
from morphoquant.sharing.artifacts import ArtifactStore

root, way = Path(sys.argv[1]), sys.argv[2]
while not (root / "go").exists():
    time.sleep(0.01)
with ArtifactStore(root / "cache", maker=str(os.getpid())).claim("things", {"a": 1}) as claim:
    if claim.found is None:
        with (root / "made").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        if way == "die":
            os._exit(1)
        time.sleep(0.5)
        claim.put({"by": os.getpid()})
        print(os.getpid())
    else:
        print(claim.found.values["by"])
assert "torch" not in sys.modules, "values alone need no torch"
"""


def start(folder: Path, way: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(folder), way],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_of_processes_that_start_at_once_one_makes_it(tmp_path: Path) -> None:
    started = [start(tmp_path, "make") for _ in range(4)]
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=60)[0].strip() for process in started]
    (maker,) = (tmp_path / "made").read_text().split()
    assert said == [maker] * 4


def test_a_killed_maker_is_followed_by_another(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    first = start(tmp_path, "die")
    assert first.wait(60) == 1
    second = start(tmp_path, "make")
    assert second.communicate(timeout=60)[0].strip() == str(second.pid)
