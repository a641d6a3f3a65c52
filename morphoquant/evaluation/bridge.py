"""The lmms-eval side: a stock task over our data, and our model as an ``lmms``.

Importing this module imports lmms-eval (6–7 s, once per process).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import io
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from morphoquant.compat import prepare_torchvision
from morphoquant.evaluation import tasks as registry
from morphoquant.evaluation.asking import Asker, Request
from morphoquant.evaluation.data import LocalData, hub_failure, open_local
from morphoquant.evaluation.errors import DataError, ScoringError, StorageError
from morphoquant.evaluation.tasks import Task

prepare_torchvision()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lmms_eval.api.task
    import lmms_eval.evaluator
    import numpy as np
    import torch
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.utils import load_yaml_config
    from loguru import logger as loguru_logger
    from tenacity import RetryError

SEED = 0  # the stock parsers draw at random where they find no choice


def _quiet() -> None:
    """Silence lmms-eval's own bars and log lines; its warnings stay within reach of logging.

    Importing it throws all of loguru's handlers away and writes to stdout, in the middle of
    whatever bar is being drawn there.
    """

    def forward(message: Any) -> None:
        level = logging.ERROR if message.record["level"].no >= logging.ERROR else logging.DEBUG
        logging.getLogger("lmms_eval").log(level, message.record["message"])

    loguru_logger.remove()
    loguru_logger.add(forward, level="WARNING", format="{message}")
    for module in (lmms_eval.evaluator, lmms_eval.api.task):
        bar = module.tqdm
        module.tqdm = lambda *args, bar=bar, **kwargs: bar(*args, **{**kwargs, "disable": True})


_quiet()


@contextlib.contextmanager
def _environment(**changes: str | None) -> Iterator[None]:
    """Environment variables with other values (None: unset) for a moment."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


def _alone() -> contextlib.AbstractContextManager[None]:
    """For lmms-eval there is one process: it would deal questions and scoring out by itself."""
    return _environment(RANK=None, WORLD_SIZE=None, LOCAL_RANK=None)


def _stock_config(task: Task, data: LocalData | None, scratch: Path) -> dict[str, Any]:
    """The stock YAML with its functions, whose clips are found in our folder.

    The stock Video-MME code looks for ``$HF_HOME/videomme/data/<id>.mp4`` and reads ``HF_HOME``
    while its YAML is loaded: so that is the only moment at which it is another one. Later (the
    hub's cache is found by it too) it is the user's again.
    """
    home: dict[str, str | None] = {}
    if task.benchmark == "videomme" and data is not None:
        folder = scratch / "hf_home" / "videomme"
        folder.mkdir(parents=True)
        (folder / "data").symlink_to(data.videos.resolve(), target_is_directory=True)
        home["HF_HOME"] = str(folder.parent)
    with _environment(**home):
        config: dict[str, Any] = load_yaml_config(str(registry.stock_yaml(task)), mode="full")
    return config


def _audio_messages(doc_to_text: Callable[..., str]) -> Callable[..., list[dict[str, Any]]]:
    """Messages for AIR-Bench, whose audio column the stock chat mode labels as a video."""

    def doc_to_messages(doc: Any, lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
        text = doc_to_text(doc, lmms_eval_specific_kwargs)
        parts = [{"type": "audio", "url": doc["audio"]}, {"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]

    return doc_to_messages


def _undecoded_audio(rows: Any) -> Any:
    """Rows whose audio stays bytes: decoding it inside ``datasets`` needs torchcodec."""
    from datasets import Audio

    return rows.cast_column("audio", Audio(decode=False))


def _silent(aggregate: Any) -> Any:
    """The same aggregation without what it prints (MMMU prints its table)."""
    if not callable(aggregate):
        return aggregate

    @functools.wraps(aggregate)
    def silent(*args: Any, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return aggregate(*args, **kwargs)

    return silent


def load_task(task: Task, data: LocalData | None, scratch: Path) -> Any:
    """The stock task over our data.

    Args:
        task: which.
        data: the local copy, or None for the hub.
        scratch: an empty folder that lives as long as the task.

    Raises:
        DataError: the data cannot be loaded.
    """
    if data is not None:
        open_local(task, data)  # lmms-eval would retry for eight seconds what is simply not there
    config = _stock_config(task, data, scratch)
    config["task"] = task.name
    if task.split is not None:
        config["test_split"] = task.split
    if data is not None:
        local = {"load_from_disk": True}
        config |= {"dataset_path": str(data.folder), "dataset_name": None, "dataset_kwargs": local}
    elif config.get("dataset_kwargs"):
        # 'token: true' refuses users without one, although these sets are public.
        config["dataset_kwargs"].pop("token", None)
    if task.benchmark == "air_bench":
        config["doc_to_messages"] = _audio_messages(config["doc_to_text"])
        config["process_docs"] = _undecoded_audio
    for metric in config["metric_list"]:
        metric["aggregation"] = _silent(metric.get("aggregation"))
    try:
        return lmms_eval.api.task.ConfigurableMessagesTask(config=config)
    except Exception as error:
        cause = _unwrap(error)
        if data is None:
            raise hub_failure(task, cause) from cause
        raise DataError(
            f"task {task.name}: {data.folder} could not be loaded ({type(cause).__name__}: {cause})"
        ) from cause


def _unwrap(error: BaseException) -> BaseException:
    """The error itself where lmms-eval retried it away."""
    if isinstance(error, RetryError):
        return error.last_attempt.exception() or error
    return error


class HarnessModel(lmms):  # type: ignore[misc]  # lmms-eval ships no types
    """Our generator, seen from lmms-eval: chat messages in, text out."""

    is_simple = False

    def __init__(self, asker: Asker) -> None:
        super().__init__()
        self.asker = asker
        self.accelerator = None  # or lmms-eval makes one, and with it a process group

    def __str__(self) -> str:
        return "morphoquant"

    def generate_until(self, requests: list[Any]) -> list[Any]:
        def request(instance: Any) -> Request:
            _, doc_to_messages, settings, doc_id, task, split = instance.args
            rows = self.task_dict[task][split]
            return Request(doc_id, lambda: rows[doc_id], doc_to_messages, settings)

        answers = self.asker.ask([request(instance) for instance in requests])
        return [
            GenerationResult(text, TokenCounts(answer.input_tokens, answer.output_tokens))
            for text, answer in answers
        ]

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError("every benchmark here is generated, none is scored by likelihood")

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        raise NotImplementedError("every benchmark here is asked in one turn")

    def clean(self) -> None:
        """Keep the model (the stock method deletes it); fix the seed for the scoring that follows.

        Called after generation and before scoring: what a generator draws cannot move a score.
        """
        random.seed(SEED)
        np.random.seed(SEED)


class _Arguments:
    """What lmms-eval reads of its command line."""

    process_with_media = False  # the scoring of these tasks does not look at media
    reasoning_tags = None
    agentic_trace_mode = "basic"

    def __init__(self, output_path: Path) -> None:
        self.output_path = str(output_path)  # AIR-Bench writes its submission file there


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """Give the process its random states back: lmms-eval seeds all three generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def _no_dataset_bars() -> Iterator[None]:
    import datasets

    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def run_task(
    task: Task, data: LocalData | None, limit: int | None, asker: Asker
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One task through ``lmms_eval.evaluator.simple_evaluate``.

    Returns:
        lmms-eval's metrics of the task (``"<metric>,none"``) and its logged samples; every sample
        has got ``"drew"``, whether the stock scoring drew its verdict at random.

    Raises:
        DataError: the data cannot be loaded.
        ScoringError: the stock scoring failed on an answer.
        StorageError: no space left for answers or for what the stock code writes.
    """
    with tempfile.TemporaryDirectory(prefix="morphoquant-") as name, _random_states():
        scratch = Path(name)
        with _no_dataset_bars(), _alone():
            stock = load_task(task, data, scratch)
            manager = lmms_eval.evaluator.TaskManager(include_defaults=False)
            try:
                output = lmms_eval.evaluator.simple_evaluate(
                    model=HarnessModel(asker),
                    tasks=[stock],
                    task_manager=manager,  # the default one would read 1,700 files
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=True,
                    random_seed=SEED,
                    numpy_random_seed=SEED,
                    torch_random_seed=SEED,
                    fewshot_random_seed=SEED,
                    cli_args=_Arguments(scratch),
                    process_docs_parallel=1,  # the random draws follow the order of the rows
                )
            except RetryError as error:
                cause = _unwrap(error)
                raise ScoringError(
                    f"task {task.name}: the stock scoring failed ({type(cause).__name__}: {cause})"
                ) from cause
            except OSError as error:  # AIR-Bench's submission file goes through the scratch folder
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise StorageError(
                        f"task {task.name}: no space left ({error}); all answers are kept. Free "
                        f"some, or set TMPDIR elsewhere, and run the same command again"
                    ) from error
                raise
        samples = sorted(output["samples"][task.name], key=lambda sample: sample["doc_id"])
        score = stock.config.process_results
        for sample in samples:
            sample["drew"] = _draws(score, sample["doc"], sample["filtered_resps"])
            if task.benchmark == "mmmu":
                # No per-sample verdict among MMMU's metrics: its own judge on one sample gives it.
                judge = inspect.unwrap(score).__globals__["evaluate_mmmu"]
                sample["judged"] = judge([sample["mmmu_acc"]])[1]["acc"]
        return output["results"][task.name], samples


def _draws(score: Callable[..., Any], doc: Any, answers: list[str]) -> bool:
    """Whether scoring these answers draws a random number (MMMU, AIR-Bench: no choice found)."""
    before = random.getstate()
    score(doc, [answer.strip() for answer in answers])
    drew = random.getstate() != before
    random.setstate(before)
    return drew
