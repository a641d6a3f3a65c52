"""Small question sets in the four schemas, and a generator that answers by rule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from morphoquant.calibration import readers
from morphoquant.config.schema import BenchmarkConfig, PathsConfig
from morphoquant.models.messages import Conversation, Generation

MINI = (
    "mini_mmmu",
    "mini_scienceqa",
    "mini_videomme",
    "mini_air_bench_sound",
    "mini_air_bench_music",
)
SPLITS = {
    "mmmu": "validation",
    "scienceqa": "test",
    "videomme": "test",
    "air_bench_sound": "sound",
    "air_bench_music": "music",
}
QUESTIONS = 12


def key(conversation: Conversation) -> str:
    """What identifies a conversation, media included."""
    digest = hashlib.sha256()
    for message in conversation:
        for part in message["content"]:
            digest.update(part["type"].encode())
            value = part[part["type"]]
            if part["type"] in ("image", "audio"):
                digest.update(value.tobytes())
            else:  # a clip's folder is where somebody put it
                digest.update((Path(value).name if part["type"] == "video" else value).encode())
    return digest.hexdigest()


class Rule:
    """Answers by ``rule(conversation)`` and remembers which batches it was given."""

    def __init__(self, rule: Callable[[Conversation], str]) -> None:
        self.rule = rule
        self.batches: list[list[Conversation]] = []

    @property
    def asked(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def generate(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> list[Generation]:
        assert max_new_tokens > 0
        self.batches.append(list(conversations))
        texts = [self.rule(conversation) for conversation in conversations]
        return [Generation(text, 10, len(text)) for text in texts]


def always(text: str) -> Rule:
    return Rule(lambda conversation: text)


class Knows(Rule):
    """Knows the answer to every question of the sets below a folder, or how to miss it.

    Prompts are recognised by what ``calibration.readers`` makes of the rows; so a perfect score
    also says that calibration reads rows as the stock tasks do.
    """

    def __init__(self, root: Path, right: bool = True) -> None:
        from datasets import load_from_disk

        self.table: dict[str, str] = {}
        for name, split in SPLITS.items():
            for row in load_from_disk(str(root / name))[split]:
                sample = self._read(root, name, row)
                letter = sample.answer if right else ("B" if sample.answer == "A" else "A")
                self.table[key(sample.messages)] = letter
        super().__init__(lambda conversation: self.table[key(conversation)])

    @staticmethod
    def _read(root: Path, name: str, row: Any) -> readers.Sample:
        if name == "videomme":
            return readers.videomme(row, root / "videos")
        reader = readers.air_bench if name.startswith("air_bench") else getattr(readers, name)
        return reader(row)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sets, with a dozen questions each (half of it for the two of AIR-Bench)."""
    from morphoquant.embedded.benchmarks import build

    return build(tmp_path_factory.mktemp("sets") / "mini", QUESTIONS, 4)


@pytest.fixture
def paths(tmp_path: Path) -> PathsConfig:
    return PathsConfig(runs=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))


def config(
    root: Path, *tasks: str, limit: int | None = None, batch_size: int = 4
) -> BenchmarkConfig:
    return BenchmarkConfig(
        name="test",
        tasks=tasks or MINI,
        data_root=str(root),
        limit=limit,
        batch_size=batch_size,
    )


Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def edited(root: Path, tmp_path: Path) -> Callable[..., Path]:
    """``edited(set, edit, **options)``: a root whose set has its first row edited."""

    def make(name: str, edit: Edit | None = None, drop: str | None = None, row: int = 0) -> Path:
        from datasets import Dataset, DatasetDict, Image, load_from_disk

        data = load_from_disk(str(root / name))[SPLITS[name]]
        features = data.features.copy()
        for column, feature in features.items():
            if isinstance(feature, Image):
                data = data.cast_column(column, Image(decode=False))
        rows = list(data)
        if edit is not None:
            edit(rows[row])
        changed = Dataset.from_list(rows, features=features)
        if drop is not None:
            changed = changed.remove_columns(drop)
        target = tmp_path / "edited"
        DatasetDict({SPLITS[name]: changed}).save_to_disk(str(target / name))
        (target / "videos").symlink_to(root / "videos", target_is_directory=True)
        return target

    return make
