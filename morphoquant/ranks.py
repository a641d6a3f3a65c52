"""Several processes on one run: who is who, what they agree on, who takes which piece of work.

``torchrun --nproc_per_node N run.py ...`` (or ``accelerate launch``, or anything else that sets
RANK, WORLD_SIZE and MASTER_ADDR) starts N processes with the same command. Every one of them does
the same until questions are asked; those are handed out batch by batch, and rank 0 alone writes
the run directory. Notable choices:

- What ranks exchange are small facts (hashes, counters, "I failed"), never tensors: a key-value
  store is enough. There is no process group, so there is no collective to hang in, and it is the
  same on CPUs and GPUs.
- Every exchange is a numbered turn that all ranks take part in. A rank that fails says so in the
  turn that the others are at, so a failed job of a sweep leaves all ranks in step for the next.
- Batches are drawn from a counter instead of dealt out in advance: no rank waits longer than one
  batch for another, whatever the questions cost, and batches are those that one process makes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from morphoquant.errors import HarnessError

if TYPE_CHECKING:
    from torch.distributed import Store

TIMEOUT = 7200.0  # seconds for which a rank may be behind: it may wait for what another observes
TIMEOUT_VARIABLE = "MORPHOQUANT_RANK_TIMEOUT"
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FAREWELL = 10.0  # seconds that a rank waits for the others at its end


class RankError(HarnessError):
    """Another rank failed, does not answer, or computed something else."""


class Ranks:
    """This process among those of a run; by default it is the only one.

    Attributes:
        rank: 0 to ``size - 1``, over all machines.
        size: how many processes there are.
        local: number of this process on its machine: of its GPU.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local: int = 0,
        store: Store | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.rank, self.size, self.local = rank, size, local
        self.timeout = timeout
        self._store = store
        self._turn = 0

    @staticmethod
    @lru_cache(maxsize=1)
    def of_process() -> Ranks:
        """What the launcher of this process says; nothing is connected before the first exchange.

        Raises:
            RankError: it says only half of it.
        """
        known = {name: os.environ.get(name) for name in NEEDED}
        if known["RANK"] is None or int(known["WORLD_SIZE"] or 1) == 1:
            return Ranks()
        missing = [name for name, value in known.items() if value is None]
        if missing:
            raise RankError(
                f"RANK={known['RANK']} is set, {', '.join(missing)} is not: start several "
                f"processes with torchrun --nproc_per_node N run.py ..., or unset RANK"
            )
        timeout = float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT))
        local = int(os.environ.get("LOCAL_RANK") or 0)
        return Ranks(int(known["RANK"]), int(known["WORLD_SIZE"] or 1), local, None, timeout)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    # ------------------------------------------------------------------- exchanging

    def gather(self, label: str, value: Any = None, patient: bool = False) -> list[Any]:
        """Every rank's ``value``, in order of rank; a barrier too.

        Args:
            label: what this is about; the same on every rank.
            value: anything that JSON can say.
            patient: wait without limit, where the others may rightly be hours late.

        Raises:
            RankError: a rank failed, is at something else, or stays away.
        """
        if self.size == 1:
            return [value]
        self._post({"at": label, "value": value})
        found = []
        for rank in range(self.size):
            found.append(self._read(rank, label, patient))
        self._turn += 1
        for rank, said in enumerate(found):
            if "failed" in said:
                raise RankError(f"rank {rank} failed: {said['failed']}")
        odd = [(rank, said["at"]) for rank, said in enumerate(found) if said["at"] != label]
        if odd:
            raise RankError(
                f"rank {self.rank} is at {label!r}, rank {odd[0][0]} at {odd[0][1]!r}: start every "
                f"process with the same command"
            )
        return [said["value"] for said in found]

    def leader_says(self, label: str, value: Any, patient: bool = False) -> Any:
        """Rank 0's ``value``, on every rank."""
        return self.gather(label, value if self.leads else None, patient)[0]

    def agree(self, label: str, value: Any) -> None:
        """Make sure that every rank has the same ``value``.

        Raises:
            RankError: they differ.
        """
        found = self.gather(label, value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise RankError(
                    f"{label}: rank 0 has {found[0]}, rank {rank} has {other}. They must be the "
                    f"same before questions are shared; run on GPUs of one kind with one "
                    f"environment, or in one process"
                )

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A piece of work that ends for all ranks at once: well, or in an error on every one.

        Raises:
            RankError: another rank failed.
        """
        try:
            yield
            self.gather(f"the end of {what}")
        except RankError:
            raise
        except Exception as error:
            if self.size > 1:
                text = str(error) if isinstance(error, HarnessError) else repr(error)
                with suppress(RankError, RuntimeError):  # the store went with its keeper
                    self._post({"at": what, "failed": text})
                    for rank in range(self.size):  # a launcher ends all when one process ends
                        self._read(rank, what, patient=False)
                self._turn += 1
            raise

    def leave(self) -> None:
        """End with the others: one keeps the store, and one has to say what went wrong."""
        if self.size == 1 or self._store is None:
            return
        with suppress(RuntimeError):
            gone = self._store.add("left", 1)
            deadline = time.monotonic() + FAREWELL
            while gone < self.size and time.monotonic() < deadline:
                time.sleep(0.05)
                gone = self._store.add("left", 0)

    # ------------------------------------------------------------------- sharing work

    def draw(self, count: int) -> Iterator[int]:
        """Numbers below ``count``, each given to one rank only, as it is ready for the next."""
        if self.size == 1:
            yield from range(count)
            return
        store, key = self._connected(), f"drawn/{self._turn}"
        while (number := store.add(key, 1) - 1) < count:
            yield number

    def count(self, more: int, own: int) -> int:
        """How much all ranks have done this turn: ``more`` just now, of ``own`` by this rank."""
        return own if self.size == 1 else self._connected().add(f"done/{self._turn}", more)

    # ------------------------------------------------------------------- the store

    def _connected(self) -> Store:
        if self._store is None:
            from torch import distributed

            limit = timedelta(seconds=self.timeout)
            try:
                store, _, _ = next(distributed.rendezvous("env://", timeout=limit))
            except (RuntimeError, ValueError) as error:
                raise RankError(f"rank {self.rank} finds no other rank: {error}") from error
            self._store = distributed.PrefixStore("morphoquant", store)
        return self._store

    def _post(self, said: dict[str, Any]) -> None:
        self._connected().set(f"{self._turn}/{self.rank}", json.dumps(said))

    def _read(self, rank: int, label: str, patient: bool) -> dict[str, Any]:
        """What ``rank`` says this turn. Asked for again and again: a signal gets through."""
        store, key = self._connected(), f"{self._turn}/{rank}"
        deadline, pause = time.monotonic() + self.timeout, 0.001
        try:
            while not store.check([key]):
                if not patient and time.monotonic() > deadline:
                    raise RankError(
                        f"rank {rank} gave no sign of life for {self.timeout:g} s at {label!r}; "
                        f"what was computed is kept, start again ({TIMEOUT_VARIABLE}=SECONDS to "
                        f"wait longer)"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            found: dict[str, Any] = json.loads(store.get(key))
        except RuntimeError as error:
            raise RankError(f"rank {rank} cannot be reached at {label!r}: {error}") from error
        return found
