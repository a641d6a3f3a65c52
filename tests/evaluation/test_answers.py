from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from morphoquant.evaluation import StorageError
from morphoquant.evaluation.answers import Answer, AnswerStore

texts = st.text(st.characters(), max_size=30)  # surrogates and line separators among them
answers = st.builds(
    Answer,
    task=texts,
    doc_id=st.integers(0, 10**6),
    id=texts,
    prompt_sha256=texts,
    text=texts,
    input_tokens=st.integers(0, 10**6),
    output_tokens=st.integers(0, 10**6),
    seconds=st.floats(0, 1e6, allow_nan=False),
)
lists = st.lists(answers, min_size=1, max_size=8, unique_by=lambda answer: answer.doc_id)
anew = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def one(doc_id: int = 0, text: str = "A") -> Answer:
    return Answer("task", doc_id, f"q{doc_id}", "sha", text, 5, 1, 0.25)


def write(path: Path, items: list[Answer]) -> None:
    path.unlink(missing_ok=True)
    with AnswerStore(path) as store:
        store.append(items)


@anew
@given(items=lists)
def test_round_trip(tmp_path: Path, items: list[Answer]) -> None:
    write(tmp_path / "a.jsonl", items)
    with AnswerStore(tmp_path / "a.jsonl") as store:
        assert len(store) == len(items)
        for item in items:
            assert store.get(item.doc_id, item.prompt_sha256) == item


@anew
@given(items=lists, data=st.data())
def test_a_file_torn_anywhere_keeps_its_whole_lines(
    tmp_path: Path, items: list[Answer], data: st.DataObject
) -> None:
    path = tmp_path / "a.jsonl"
    write(path, items)
    whole = path.read_bytes()
    torn = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_bytes(torn)
    kept = torn.count(b"\n")
    with AnswerStore(path) as store:
        assert len(store) == kept
        assert path.read_bytes() == torn[: torn.rfind(b"\n") + 1]
        store.append(items[kept:])
    assert path.read_bytes() == whole


def test_another_prompt_is_not_answered(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [one()])
    with AnswerStore(tmp_path / "a.jsonl") as store:
        assert store.get(0, "sha") is not None
        assert store.get(0, "other") is None
        assert store.get(1, "sha") is None


def test_the_newest_answer_wins(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [one(text="A")])
    with AnswerStore(tmp_path / "a.jsonl") as store:
        store.append([one(text="B")])
    with AnswerStore(tmp_path / "a.jsonl") as store:
        found = store.get(0, "sha")
    assert found is not None
    assert found.text == "B"


@pytest.mark.parametrize("line", [b"\0\0\0", b"{}", b"[1]", b'{"task": 3}', b"\xff"])
def test_a_damaged_line_is_skipped_with_a_warning(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [one(0), one(1)])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + second)
    with AnswerStore(path) as store:
        assert len(store) == 2
    assert "line 2" in caplog.text


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the kernel refuses the write half way."""
    path = tmp_path / "a.jsonl"
    write(path, [one(0)])
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerStore(path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
        try:
            with pytest.raises(StorageError, match=r"a\.jsonl.*1 answers written before are safe"):
                store.append([one(1)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        store.append([one(1)])
    with AnswerStore(path) as store:
        assert len(store) == 2


def test_an_unusable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file") as caught:
        AnswerStore(tmp_path / "file" / "a.jsonl")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno in (errno.ENOTDIR, errno.EEXIST)
