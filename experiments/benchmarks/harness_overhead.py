"""What this harness costs over bare lmms-eval, with the same unquantized model.

    python -m experiments.benchmarks.harness_overhead              # all questions of the small sets
    python -m experiments.benchmarks.harness_overhead --limit 16 --repeats 2

*Bare* is ``lmms_eval.evaluator.simple_evaluate`` around the least that answers: messages of a
batch to the model, texts back, nothing kept. *Evaluate* is ``morphoquant.evaluation.evaluate``, and
*run* a whole ``pipeline.run`` without loading the model. All three ask the same questions in the
same batches of the same adapter, and their answers are compared.

The passes take turns and the fastest of each counts. CPU seconds are the process's own, so they
hold on a busy machine; wall seconds also hold what is waited for (``fsync``). What passes outside
the model is counted apart: the model's own seconds are the same work every time, and their noise
is larger than what is looked for. The overhead is what a pass spends outside the model beyond what
*bare* spends there, as a share of *bare*.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_dir

from morphoquant import evaluation, pipeline
from morphoquant.config import RunConfig, load
from morphoquant.config.store import register
from morphoquant.models.adapter import OmniAdapter
from morphoquant.models.messages import Conversation, Generation

CONF = Path(__file__).parents[2] / "conf"
Plan = dict[str, list[list[int]]]
"""Task -> the questions of every batch."""
Answers = dict[tuple[str, int], str]
"""(task, question) -> the text that was scored."""


@dataclass
class Spent:
    """Wall and CPU seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Add what happens inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)

    def least(self, other: Spent) -> Spent:
        return Spent(min(self.wall, other.wall), min(self.cpu, other.cpu))


@dataclass
class Model:
    """The adapter, with the size of every batch."""

    adapter: OmniAdapter
    sizes: list[int] = field(default_factory=list)

    def generate(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> list[Generation]:
        self.sizes.append(len(conversations))
        return self.adapter.generate(conversations, max_new_tokens)


@contextlib.contextmanager
def generating() -> Iterator[Spent]:
    """What ``OmniAdapter.generate`` takes inside, whoever calls it."""
    spent, generate = Spent(), OmniAdapter.generate

    def timed(self: OmniAdapter, *args: Any) -> list[Generation]:
        with spent.measure():
            return generate(self, *args)

    with mock.patch.object(OmniAdapter, "generate", timed):
        yield spent


def configured(limit: int | None, cache: Path, runs: Path) -> RunConfig:
    """The unquantized small model on all embedded sets."""
    register()
    overrides = [
        "method=fp16",
        "bits=w16a16",
        "reference=false",
        "tracker=none",
        f"limit={limit or 'null'}",
    ]
    overrides += [f"paths.cache={cache}", f"paths.runs={runs}"]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return load(compose("config", overrides=overrides))


# ----------------------------------------------------------------------------- the three


def bare(config: RunConfig, model: Model, plan: Plan) -> tuple[Spent, Answers]:
    """``simple_evaluate`` and nothing else."""
    import lmms_eval.evaluator
    from lmms_eval.api.model import lmms

    from morphoquant.evaluation import bridge, tasks
    from morphoquant.evaluation.asking import conversation, cut
    from morphoquant.evaluation.data import locate

    class Bare(lmms):  # type: ignore[misc]  # lmms-eval ships no types
        is_simple = False
        accelerator = None

        def generate_until(self, requests: list[Any]) -> list[str]:
            arguments = {request.args[3]: request.args for request in requests}
            texts: dict[int, str] = {}
            for batch in plan[requests[0].args[4]]:
                prompts, settings = [], {}
                for number in batch:
                    _, to_messages, settings, _, task, split = arguments[number]
                    prompts.append(conversation(to_messages(self.task_dict[task][split][number])))
                found = model.generate(prompts, settings["max_new_tokens"])
                for number, one in zip(batch, found, strict=True):
                    texts[number] = cut(one.text, settings["until"])
            return [texts[request.args[3]] for request in requests]

        def loglikelihood(self, requests: list[Any]) -> Any:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list[Any]) -> Any:
            raise NotImplementedError

        def clean(self) -> None:
            return

    spent, answers = Spent(), {}
    with tempfile.TemporaryDirectory() as folder, spent.measure():
        for name in config.benchmark.tasks:
            task = tasks.find(name)
            (Path(folder) / name).mkdir()
            stock = bridge.load_task(
                task, locate(task, config.benchmark, config.paths), Path(folder) / name
            )
            output = lmms_eval.evaluator.simple_evaluate(
                model=Bare(),
                tasks=[stock],
                task_manager=lmms_eval.evaluator.TaskManager(include_defaults=False),
                limit=config.benchmark.limit,
                bootstrap_iters=0,
                cli_args=bridge._Arguments(Path(folder)),
                process_docs_parallel=1,
            )
            for sample in output["samples"][name]:
                answers[name, sample["doc_id"]] = sample["filtered_resps"][0]
    return spent, answers


def evaluate(config: RunConfig, model: Model) -> tuple[Spent, Answers, Plan]:
    """``evaluation.evaluate`` with an empty folder of answers."""
    spent, before = Spent(), len(model.sizes)
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers"
        with spent.measure():
            found = evaluation.evaluate(model, config.benchmark, config.paths, answers)
        plan = _plan(answers, config.benchmark.tasks, model.sizes[before:])
    return spent, _texts(found.samples), plan


def run(config: RunConfig) -> tuple[Spent, Answers]:
    """``pipeline.run`` in an empty folder, without the loading of the model."""
    import pandas as pd

    loading, spent = Spent(), Spent()
    load_model = OmniAdapter.load

    def timed(described: Any) -> OmniAdapter:
        with loading.measure():
            return load_model(described)

    with tempfile.TemporaryDirectory() as folder:
        paths = config.paths.model_copy(update={"runs": folder})
        fresh = config.model_copy(update={"paths": paths})
        with mock.patch.object(OmniAdapter, "load", timed), spent.measure():
            result = pipeline.run(fresh)
        samples = pd.read_parquet(pipeline.run_path(fresh, result) / "samples.parquet")
    return spent - loading, _texts(samples)


def _texts(samples: Any) -> Answers:
    return {(r.task, r.doc_id): r.answer for r in samples.itertuples()}


def _plan(folder: Path, tasks: Sequence[str], sizes: list[int]) -> Plan:
    """The batches, from the order of the answers and the size of every call."""
    import json

    plan: Plan = {}
    left = iter(sizes)
    for name in tasks:
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        asked = [json.loads(line)["doc_id"] for line in lines]
        plan[name] = []
        while asked:
            size = next(left)
            plan[name].append(asked[:size])
            asked = asked[size:]
    return plan


# ----------------------------------------------------------------------------- what it is


def parts(work: Callable[[], object]) -> dict[str, Spent]:
    """What the named steps of an evaluation take; timed in a pass of its own."""
    from morphoquant.evaluation import answers, asking, bridge, scoring

    steps = {
        "first pass over the questions (hash, size, order)": (asking, "describe"),
        "answers to disk (fsync per batch)": (answers.AnswerStore, "append"),
        "was a verdict drawn at random?": (bridge, "_draws"),
        "records per question": (scoring, "records"),
    }
    found: dict[str, Spent] = {}
    with contextlib.ExitStack() as stack:
        for title, (owner, name) in steps.items():
            spent, original = found.setdefault(title, Spent()), getattr(owner, name)

            def timed(*args: Any, spent: Spent = spent, original: Any = original) -> Any:
                with spent.measure():
                    return original(*args)

            stack.enter_context(mock.patch.object(owner, name, timed))
        work()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, help="questions of every task; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(".cache/morphoquant"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        config = configured(given.limit, given.cache, Path(runs))
        evaluation.check(config.benchmark, config.paths)
        model = Model(OmniAdapter.load(config.model))
        _, expected, plan = evaluate(config, model)  # warm: imports, first touch of the data
        works: dict[str, Callable[[], tuple[Spent, Answers]]] = {
            "bare": lambda: bare(config, model, plan),
            "evaluate": lambda: evaluate(config, model)[:2],
            "run": lambda: run(config),
        }
        least: dict[str, tuple[Spent, Spent]] = {}
        for _ in range(given.repeats):
            for name, work in works.items():
                with generating() as inside:
                    spent, answers = work()
                assert answers == expected, f"{name} gave other answers"
                found = (spent, spent - inside)
                before = least.get(name, found)
                least[name] = (spent.least(before[0]), found[1].least(before[1]))
        steps = parts(lambda: evaluate(config, model))
    whole, outside = least["bare"]
    print(f"{len(expected)} questions, the same answers everywhere; fastest of {given.repeats}")
    print("          wall s   CPU s   of them outside the model   overhead over bare")
    for name, (spent, apart) in least.items():
        wall = 100 * (apart.wall - outside.wall) / whole.wall
        cpu = 100 * (apart.cpu - outside.cpu) / whole.cpu
        print(
            f"{name:9}{spent.wall:7.2f} {spent.cpu:7.2f}        {apart.wall:7.2f} {apart.cpu:7.2f}"
            f"       wall {wall:+5.1f} %, CPU {cpu:+5.1f} %"
        )
    for title, spent in steps.items():
        print(f"  {title}: {1000 * spent.wall:.0f} ms wall, {1000 * spent.cpu:.0f} ms CPU")


if __name__ == "__main__":
    main()
