"""Ranks as threads around one store: turns, failures, and work that is done once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from morphoquant.errors import HarnessError
from morphoquant.evaluation.answers import Answer, AnswerStore
from morphoquant.evaluation.asking import Asker, Request
from morphoquant.evaluation.tasks import find
from morphoquant.models.messages import Conversation, Generation
from morphoquant.ranks import RankError, Ranks


def everyone(size: int, work: Callable[[Ranks], Any], timeout: float = 20.0) -> list[Any]:
    """What ``work`` returns on every rank, or the error that it ends in."""
    store = HashStore()

    def one(rank: int) -> Any:
        try:
            return work(Ranks(rank, size, rank, store, timeout))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_values_arrive_in_order_of_rank() -> None:
    def work(ranks: Ranks) -> Any:
        first = ranks.gather("squares", ranks.rank**2)
        return first, ranks.leader_says("word", f"from {ranks.rank}")

    assert everyone(3, work) == [([0, 1, 4], "from 0")] * 3
    assert work(Ranks()) == ([0], "from 0"), "one process alone needs no store"


def test_a_difference_is_an_error_on_every_rank() -> None:
    found = everyone(3, lambda ranks: ranks.agree("the model", "b" if ranks.rank == 2 else "a"))
    for error in found:
        assert isinstance(error, RankError)
        assert "rank 0 has a, rank 2 has b" in str(error)


def test_ranks_at_different_places_are_told_so() -> None:
    found = everyone(2, lambda ranks: ranks.gather(f"place {ranks.rank}"))
    assert all(isinstance(e, RankError) and "same command" in str(e) for e in found)


@given(size=st.integers(1, 4), count=st.integers(0, 40))
def test_every_piece_of_work_is_drawn_once(size: int, count: int) -> None:
    def work(ranks: Ranks) -> tuple[list[int], list[int]]:
        first = list(ranks.draw(count))
        ranks.gather("between")
        return first, list(ranks.draw(count + 1))

    found = everyone(size, work)
    for turn, expected in ((0, count), (1, count + 1)):
        assert sorted(n for part in found for n in part[turn]) == list(range(expected))


@pytest.mark.parametrize("failing", [(1,), (0, 2), (0, 1, 2)])
def test_a_failure_is_heard_by_all_and_leaves_them_in_step(failing: tuple[int, ...]) -> None:
    """As in a sweep: a job fails somewhere, the next one is done by all together."""

    def work(ranks: Ranks) -> tuple[str, list[int]]:
        said = ""
        try:
            with ranks.together("job 1"):
                if ranks.rank in failing:
                    raise HarnessError(f"disk {ranks.rank} is full")
                ranks.gather("somewhere in the job")
        except HarnessError as error:
            said = str(error)
        with ranks.together("job 2"):
            return said, ranks.gather("ranks", ranks.rank)

    for rank, (said, ranks) in enumerate(everyone(3, work)):
        assert ranks == [0, 1, 2]
        own = rank in failing
        assert said == (
            f"disk {rank} is full"
            if own
            else f"rank {failing[0]} failed: disk {failing[0]} is full"
        )


def test_a_silent_rank_is_named_after_the_time_is_up() -> None:
    gone = threading.Event()

    def work(ranks: Ranks) -> Any:
        if ranks.rank == 1:
            gone.wait(20)
            return None
        try:
            return ranks.gather("answers")
        finally:
            gone.set()

    error, _ = everyone(2, work, timeout=0.2)
    assert isinstance(error, RankError)
    assert "rank 1 gave no sign of life for 0.2 s at 'answers'" in str(error)


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Ranks.of_process.__wrapped__  # type: ignore[attr-defined]
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ask().size == 1
    monkeypatch.setenv("RANK", "1")
    assert ask().size == 1, "a world of one"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RankError, match="MASTER_ADDR, MASTER_PORT is not"):
        ask()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = ask()
    assert (found.rank, found.size, found.local, found.leads) == (1, 2, 1, False)


# ------------------------------------------------------------------------------ questions


class Counting:
    """Answers with the question's length, and remembers every batch."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def generate(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> list[Generation]:
        texts = [c[0]["content"][0]["text"] for c in conversations]
        self.batches.append(texts)
        return [Generation(str(len(text)), 1, 1) for text in texts]


def requests(count: int) -> list[Request]:
    """Text questions of different lengths."""
    rows = [{"question_id": str(i), "question": "?" * (1 + 4 * (i * 7 % 11))} for i in range(count)]

    def messages(row: dict[str, str]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": row["question"]}]}]

    settings = {"max_new_tokens": 4}
    return [Request(i, lambda row=row: row, messages, settings) for i, row in enumerate(rows)]


def ask(folder: Path, size: int, count: int = 30) -> tuple[list[Any], list[list[str]]]:
    """All ranks' answers to ``count`` questions, and all batches that went to a model."""
    batches: list[list[str]] = []

    def work(ranks: Ranks) -> list[Any]:
        model = Counting()
        with AnswerStore(folder / "task.jsonl", ranks.rank) as store:
            found = Asker(find("mini_videomme"), model, store, 4, None, ranks).ask(requests(count))
        batches.extend(model.batches)
        return found

    return everyone(size, work), batches


def test_shared_questions_are_asked_once_in_the_batches_of_one_process(tmp_path: Path) -> None:
    (alone,), expected = ask(tmp_path / "one", 1)
    found, batches = ask(tmp_path / "three", 3)
    assert sorted(batches) == sorted(expected)
    for answers in found:
        assert [text for text, _ in answers] == [text for text, _ in alone]
    lines = [p.read_text().splitlines() for p in (tmp_path / "three").iterdir()]
    asked = [json.loads(line)["doc_id"] for part in lines for line in part]
    assert sorted(asked) == list(range(30))


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (2, 4)])
def test_another_number_of_ranks_goes_on(tmp_path: Path, before: int, after: int) -> None:
    ask(tmp_path, before, 13)
    for path in tmp_path.iterdir():  # a kill while each was writing
        with path.open("ab") as file:
            file.write(b'{"task": "torn')
    found, batches = ask(tmp_path, after, 30)
    assert sum(map(len, batches)) == 17
    assert all([answer.doc_id for _, answer in answers] == list(range(30)) for answers in found)


def test_a_stale_answer_of_another_rank_hides_no_good_one(tmp_path: Path) -> None:
    def answer(sha: str) -> Answer:
        return Answer("task", 0, "q0", sha, sha, 1, 1, 0.1)

    for rank, sha in ((0, "good"), (1, "stale")):
        with AnswerStore(tmp_path / "task.jsonl", rank) as store:
            store.append([answer(sha)])
    with AnswerStore(tmp_path / "task.jsonl") as store:
        assert store.get(0, "good") == answer("good")
        assert store.get(0, "stale") == answer("stale")
        assert store.get(0, "new") is None
