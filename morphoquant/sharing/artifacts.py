"""Artifacts that runs share: computed once, by whichever process comes first.

::

    <root>/<kind>/<key>/
        entry.json            identity, values, the tensors' size and sha256, who made it
        tensors.safetensors   where there are tensors
    <root>/<kind>/<key>.lock  held while the entry is made; the other processes wait and read

The key is the fingerprint of an identity: whatever the content depends on has to be in it. An entry
is written under another name and renamed, so that nobody reads half of one, and checked whenever it
is read. Nothing here may cost a run: a damaged entry is made anew, a cache that cannot be written
is one warning.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphoquant.tracking.fingerprint import fingerprint

if TYPE_CHECKING:
    import torch
    from filelock import BaseFileLock

log = logging.getLogger(__name__)

ENTRY, TENSORS, LOCK = "entry.json", "tensors.safetensors", ".lock"
GIB = 2**30
ABANDONED = 24 * 3600.0  # seconds after which half an entry is taken for a killed process's


class _DamageError(Exception):
    """Why an entry cannot be used."""


@dataclass(frozen=True)
class Artifact:
    """What was kept.

    Attributes:
        values: anything JSON.
        tensors: on the CPU.
        maker: name of the run that made it.
    """

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    maker: str = ""


class ArtifactStore:
    """A folder of artifacts, bounded in size: those not used for longest go first.

    Args:
        root: the folder, or None to keep and find nothing.
        limit_gb: GiB that all entries together may take.
        maker: name of the run that works with the store, kept with what it makes.
    """

    def __init__(self, root: Path | None, limit_gb: float = 20.0, maker: str = "") -> None:
        self.root = root
        self.limit = limit_gb * GIB
        self.maker = maker
        self._failed = False

    @contextmanager
    def claim(self, kind: str, identity: Mapping[str, Any]) -> Iterator[Claim]:
        """The artifact of ``identity``, or the right to make it.

        ``found`` of what is given is the artifact, or None: then :meth:`Claim.put` keeps one.
        While a process has not put what it claimed (or left the context) others wait.
        """
        claim = Claim(self, kind, dict(identity))
        if self.root is None:
            yield claim
            return
        claim.found = self._read(claim.folder, claim.identity)
        if claim.found is None:
            claim.lock = self._lock(claim.folder)
            if claim.lock is not None:  # another process may have made it meanwhile
                claim.found = self._read(claim.folder, claim.identity)
                if claim.found is not None:
                    claim.release()
        try:
            yield claim
        finally:
            claim.release()

    def folder(self, kind: str, identity: Mapping[str, Any]) -> Path:
        """Where the artifact of ``identity`` lies, or would lie."""
        assert self.root is not None
        return self.root / kind / fingerprint(dict(identity))[:40]

    # ------------------------------------------------------------------- reading

    def _read(self, folder: Path, identity: dict[str, Any]) -> Artifact | None:
        try:
            return _load(folder, identity)
        except _DamageError as error:
            if not folder.exists():  # another process made room in this very moment
                return None
            log.warning("%s is damaged (%s): it is removed and made anew", folder, error)
            _remove(folder)
        except OSError as error:
            self.give_up(error)
        return None

    # ------------------------------------------------------------------- writing

    def _lock(self, folder: Path) -> BaseFileLock | None:
        """The entry's lock, once it is free; None where there can be none."""
        from filelock import FileLock, Timeout

        if self._failed:
            return None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.with_name(folder.name + LOCK))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("waiting: another process makes %s", folder)
                lock.acquire()
        except (OSError, NotImplementedError) as error:  # read-only, or a disk without locks
            self.give_up(error)
            return None
        return lock

    def write(
        self, folder: Path, identity: dict[str, Any], values: Any, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Put an entry in its place, then make room; a failure is a warning."""
        if self._failed:
            return
        temporary = folder.with_name(f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        try:
            temporary.mkdir(parents=True)
            entry: dict[str, Any] = {"identity": identity, "values": values, "maker": self.maker}
            if tensors:
                entry["tensors"] = _save(temporary / TENSORS, tensors)
            entry["sha256"] = fingerprint(entry)
            (temporary / ENTRY).write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
            self._make_room(folder)
        except OSError as error:
            self.give_up(error)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def give_up(self, error: BaseException) -> None:
        """Say once that nothing more can be kept."""
        if not self._failed:
            reason = getattr(error, "strerror", None) or error
            log.warning(
                "%s: the cache cannot be used (%s); the run goes on without it. Set paths.cache="
                "FOLDER elsewhere, or paths.share_artifacts=false",
                self.root,
                reason,
            )
        self._failed = True

    def _make_room(self, newest: Path) -> None:
        """Remove what was not used for longest until everything fits again."""
        assert self.root is not None
        entries = []
        for folder in self.root.glob("*/*"):
            with suppress(OSError):  # gone meanwhile
                if folder.name.startswith("."):
                    if time.time() - folder.stat().st_mtime > ABANDONED:
                        shutil.rmtree(folder, ignore_errors=True)
                elif folder.is_dir():
                    size = sum(path.stat().st_size for path in folder.iterdir())
                    used = (folder / ENTRY).stat().st_mtime_ns
                    entries.append((folder == newest, used, folder, size))
        total = sum(size for *_, size in entries)
        for is_newest, _, folder, size in sorted(entries):
            if total <= self.limit:
                break
            if is_newest:
                log.warning(
                    "%s takes %.2f GiB by itself and is not kept; raise paths.cache_limit_gb",
                    folder,
                    size / GIB,
                )
            _remove(folder)
            folder.with_name(folder.name + LOCK).unlink(missing_ok=True)
            total -= size


@dataclass
class Claim:
    """An artifact that was found, or the right to make it.

    Attributes:
        found: the artifact; None where it has to be made.
    """

    store: ArtifactStore
    kind: str
    identity: dict[str, Any]
    found: Artifact | None = None
    lock: BaseFileLock | None = None

    @property
    def folder(self) -> Path:
        return self.store.folder(self.kind, self.identity)

    def put(
        self, values: dict[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Keep what was made, and let go of the claim.

        Args:
            values: anything JSON.
            tensors: of any device; copied.
        """
        if self.store.root is not None:
            self.store.write(self.folder, self.identity, values, dict(tensors or {}))
        self.release()

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None


def _load(folder: Path, identity: dict[str, Any]) -> Artifact | None:
    """Read and check an entry; None where there is none."""
    try:
        text = (folder / ENTRY).read_bytes()
    except FileNotFoundError:
        if folder.is_dir():
            raise _DamageError(f"no {ENTRY}") from None
        return None
    try:
        entry = json.loads(text)
        promised = entry.pop("sha256")
        if fingerprint(entry) != promised:
            raise _DamageError(f"{ENTRY} is not what was written")
        if fingerprint(entry["identity"]) != fingerprint(identity):
            raise _DamageError("it belongs to something else")
        tensors = {}
        if "tensors" in entry:
            tensors = _open(folder / TENSORS, entry["tensors"])
        found = Artifact(entry["values"], tensors, entry["maker"])
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise _DamageError(f"{ENTRY} cannot be read: {error}") from error
    with suppress(OSError):
        os.utime(folder / ENTRY)  # used: others go first
    return found


def _open(path: Path, promised: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        size = path.stat().st_size
        if size != promised["bytes"]:
            raise _DamageError(f"{TENSORS} has {size} bytes, written were {promised['bytes']}")
        with path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() != promised["sha256"]:
                raise _DamageError(f"{TENSORS} is not what was written")
        return load_file(path)
    except FileNotFoundError as error:
        raise _DamageError(f"no {TENSORS}") from error
    except SafetensorError as error:
        raise _DamageError(f"{TENSORS} cannot be read: {error}") from error


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write tensors; returns size and hash of the file.

    Raises:
        OSError: it could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # Copies: safetensors refuses views and tensors that share their memory.
        save_file({k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, path)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
        found = file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": found}


def _remove(folder: Path) -> None:
    """Take an entry out of its place in one step, so that nobody reads half of it."""
    with suppress(OSError):
        aside = folder.with_name(f".{folder.name}-old-{uuid.uuid4().hex[:8]}")
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
