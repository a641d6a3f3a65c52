"""Scores through the real lmms-eval; answers come from a rule instead of a model."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morphoquant.config.schema import PathsConfig
from morphoquant.evaluation import DataError, ScoringError, evaluate, question_ids
from morphoquant.evaluation.results import SAMPLE_COLUMNS

from .conftest import MINI, QUESTIONS, Knows, Rule, always, config

Edited = Callable[..., Path]


def test_perfect_answers_score_100_in_every_task(
    root: Path, paths: PathsConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int, str]] = []
    found = evaluate(Knows(root), config(root), paths, tmp_path, lambda *event: seen.append(event))
    assert list(found.tasks) == list(MINI)
    for name, result in found.tasks.items():
        assert result.value == 100.0, name
        assert result.n == (QUESTIONS if "air" not in name else QUESTIONS // 2)
        assert result.stderr == 0.0
        assert result.empty == result.unparsed == 0
    assert tuple(found.samples.columns) == SAMPLE_COLUMNS
    assert (found.samples["correct"] == 1.0).all()
    assert (found.samples["parsed"] == found.samples["target"]).all()
    assert set(found.samples["id"]) == question_ids(config(root), paths)
    assert len(found.samples) == len(set(found.samples["id"]))
    pooled = found.by_benchmark()
    assert list(pooled) == ["mmmu", "scienceqa", "videomme", "air_bench"]
    assert all(row["n"] == QUESTIONS and row["value"] == 100.0 for row in pooled.values())
    modality = found.by_modality()
    assert {name: row["n"] for name, row in modality.items()} == {
        "image": QUESTIONS + 3,
        "text": QUESTIONS - 3,
        "video": QUESTIONS,
        "audio": QUESTIONS,
    }
    assert seen[0] == (0, QUESTIONS, "mini_mmmu")
    assert seen[-1] == (QUESTIONS // 2, QUESTIONS // 2, "mini_air_bench_music")
    noise = capfd.readouterr()
    for word in ("Postprocess", "Overall", "it/s", "lmms_eval"):
        assert word not in noise.out + noise.err


def test_wrong_answers_score_0(root: Path, paths: PathsConfig, tmp_path: Path) -> None:
    found = evaluate(Knows(root, right=False), config(root), paths, tmp_path)
    assert [result.value for result in found.tasks.values()] == [0.0] * 5
    assert not found.samples["unparsed"].any()
    assert (found.samples["parsed"] != found.samples["target"]).all()


def test_empty_answers_are_counted(root: Path, paths: PathsConfig, tmp_path: Path) -> None:
    found = evaluate(always(" "), config(root, limit=4), paths, tmp_path)
    for name, result in found.tasks.items():
        assert (result.empty, result.unparsed) == (4, 4), name
    assert found.tasks["mini_scienceqa"].value == found.tasks["mini_videomme"].value == 0.0


def test_unparsed_answers_are_counted_and_repeat(
    root: Path, paths: PathsConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stock MMMU and AIR-Bench score them by chance: under one seed the same chance, always."""

    def half(conversation: Any) -> str:
        random.random()  # a generator that draws numbers must not move the scoring's
        return "A" if len(conversation[0]["content"][-1]["text"]) % 2 else "i do not know"

    first = evaluate(Rule(half), config(root), paths, tmp_path / "1")
    random.seed(99)
    again = evaluate(Rule(half), config(root, batch_size=1), paths, tmp_path / "2")
    resumed = evaluate(always("never asked"), config(root), paths, tmp_path / "1")
    unparsed = sum(result.unparsed for result in first.tasks.values())
    assert 0 < unparsed < len(first.samples)
    columns = ["task", "doc_id", "answer", "parsed", "correct", "unparsed"]
    assert first.samples[columns].equals(again.samples[columns])
    assert first.samples[columns].equals(resumed.samples[columns])
    assert (first.samples["unparsed"] == (first.samples["answer"] == "i do not know")).all()
    if first.tasks["mini_mmmu"].unparsed:
        assert "share of the score is luck" in caplog.text


def test_random_states_are_given_back(root: Path, paths: PathsConfig, tmp_path: Path) -> None:
    random.seed(7)
    before = random.getstate()
    evaluate(always("A"), config(root, "mini_scienceqa", limit=2), paths, tmp_path)
    assert random.getstate() == before


def test_nothing_is_left_behind(
    root: Path, paths: PathsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No submission file in the working directory, no changed HF_HOME."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    tasks = ("mini_air_bench_sound", "mini_videomme")
    evaluate(always("A"), config(root, *tasks, limit=2), paths, tmp_path / "answers")
    assert os.environ["HF_HOME"] == str(tmp_path / "home")
    assert not list(work.iterdir())
    assert sorted(p.name for p in (tmp_path / "answers").iterdir()) == [
        "mini_air_bench_sound.jsonl",
        "mini_videomme.jsonl",
    ]


def test_an_interrupted_run_repeats_no_question(
    root: Path, paths: PathsConfig, tmp_path: Path
) -> None:
    tasks = ("mini_scienceqa", "mini_videomme")
    whole = evaluate(Knows(root), config(root, *tasks), paths, tmp_path / "whole")
    knows = Knows(root)

    class Stops(Knows):
        def generate(self, conversations: Any, max_new_tokens: int) -> Any:
            if self.asked >= 8:
                raise KeyboardInterrupt
            return super().generate(conversations, max_new_tokens)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Stops(root), config(root, *tasks), paths, tmp_path / "part")
    path = tmp_path / "part" / "mini_scienceqa.jsonl"
    kept = path.read_bytes().count(b"\n")
    assert kept >= 8
    with path.open("ab") as file:
        file.write(b'{"task": "mini_scienceqa", "doc_')
    found = evaluate(knows, config(root, *tasks), paths, tmp_path / "part")
    assert knows.asked == 2 * QUESTIONS - kept
    assert found.samples.equals(whole.samples)
    done = always("never asked")
    assert evaluate(done, config(root, *tasks), paths, tmp_path / "part").samples.equals(
        whole.samples
    )
    assert done.asked == 0


def test_a_changed_question_is_asked_again(
    root: Path, edited: Edited, paths: PathsConfig, tmp_path: Path
) -> None:
    evaluate(always("A"), config(root, "mini_scienceqa"), paths, tmp_path)
    where = edited("scienceqa", lambda row: row.update(hint="Something else."), row=4)
    again = always("A")
    evaluate(again, config(where, "mini_scienceqa"), paths, tmp_path)
    assert again.asked == 1


def test_batches_hold_one_kind_and_their_size_changes_nothing(
    root: Path, paths: PathsConfig, tmp_path: Path
) -> None:
    tables = []
    for size in (1, 3, 64):
        knows = Knows(root, right=False)
        chosen = config(root, "mini_scienceqa", "mini_mmmu", batch_size=size)
        tables.append(evaluate(knows, chosen, paths, tmp_path / str(size)).samples)
        assert max(len(batch) for batch in knows.batches) <= size
        for batch in knows.batches:
            kinds = {tuple(part["type"] for part in c[0]["content"]) for c in batch}
            assert len({"image" in kind for kind in kinds}) == 1
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_a_clip_lost_during_the_run_is_a_data_error(
    edited: Edited, paths: PathsConfig, tmp_path: Path
) -> None:
    where = edited("videomme", lambda row: row.update(videoID="gone"), row=3)
    with pytest.raises(DataError, match=r"mini_videomme, question 3.*gone"):
        evaluate(always("A"), config(where, "mini_videomme"), paths, tmp_path / "answers")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("air_bench_sound", {"audio": {"bytes": b"RIFF and nothing more", "path": None}}),
        ("air_bench_sound", {"audio": {"bytes": None, "path": "not/there.wav"}}),
        ("scienceqa", {"image": {"bytes": b"no picture", "path": None}}),
    ],
)
def test_media_that_do_not_decode_are_named(
    edited: Edited, paths: PathsConfig, tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    where = edited(name, lambda row: row.update(values), row=3)
    with pytest.raises(DataError, match=f"mini_{name}, question 3"):
        evaluate(always("A"), config(where, f"mini_{name}"), paths, tmp_path / "answers")


def test_data_that_cannot_be_loaded(tmp_path: Path, paths: PathsConfig) -> None:
    with pytest.raises(DataError, match=r"no folder .*mmmu"):
        evaluate(always("A"), config(tmp_path, "mmmu_val"), paths, tmp_path / "answers")


def test_real_schemas(root: Path, tmp_path: Path, paths: PathsConfig) -> None:
    """As published: an Audio column, ScienceQA without ids, open and two-picture questions."""
    from datasets import Audio, Dataset, DatasetDict, Image, load_from_disk

    target = tmp_path / "data"
    sound = load_from_disk(str(root / "air_bench_sound"))["sound"]
    sound = sound.cast_column("audio", Audio(decode=False)).cast_column("audio", Audio())
    sets = DatasetDict({"sound": sound, "music": sound, "speech": sound})
    sets.save_to_disk(str(target / "air_bench"))
    science = load_from_disk(str(root / "scienceqa"))["test"].remove_columns("id")
    DatasetDict({"test": science}).save_to_disk(str(target / "scienceqa"))
    mmmu = load_from_disk(str(root / "mmmu"))["validation"]
    features = mmmu.features.copy()
    for i in range(1, 8):
        mmmu = mmmu.cast_column(f"image_{i}", Image(decode=False))
    rows = list(mmmu.select(range(3)))
    rows[0] |= {"question_type": "open", "answer": "12.5", "options": "[]"}
    rows[1] |= {"question": "<image 1> or <image 2>?", "image_2": rows[2]["image_1"]}
    changed = Dataset.from_list(rows, features=features)
    DatasetDict({"validation": changed}).save_to_disk(str(target / "mmmu"))

    def rule(conversation: Any) -> str:
        text = conversation[0]["content"][-1]["text"]
        return "so it is 12.5" if "single word" in text else "B"

    tasks = ("mmmu_val", "scienceqa", "air_bench_foundation_sound", "air_bench_foundation_speech")
    chosen = config(target, *tasks)
    from morphoquant.evaluation import check

    check(chosen, paths)
    found = evaluate(Rule(rule), chosen, paths, tmp_path / "answers")
    table = found.samples.set_index(["task", "doc_id"])
    assert table.loc[("mmmu_val", 0), "correct"] == 1.0
    assert "12.5" in table.loc[("mmmu_val", 0), "parsed"]
    assert set(found.samples["id"]) == question_ids(chosen, paths)
    assert set(found.samples["modality"]) == {"image", "text", "audio"}
    letters = found.samples[found.samples["doc_id"] > 0]
    assert (letters["correct"] == (letters["target"] == "B")).all()


def test_records_that_do_not_add_up_are_refused(
    root: Path, paths: PathsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morphoquant.evaluation import scoring

    monkeypatch.setattr(scoring, "_correct", lambda task, sample: 1.0)
    with pytest.raises(ScoringError, match=r"lmms-eval scores .* the mean of the 12"):
        evaluate(always("A"), config(root, "mini_mmmu"), paths, tmp_path)


def test_warnings_of_ours_stay(
    root: Path, paths: PathsConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        evaluate(always("?"), config(root, "mini_mmmu", limit=2), paths, tmp_path)
    assert "mini_mmmu: 2 of 2 answers name no choice" in caplog.text
