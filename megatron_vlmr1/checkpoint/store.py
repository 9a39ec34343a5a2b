"""Checkpoints on disk: whole and proven, or not there.

``directory/step_N`` is a published checkpoint with a ``manifest.json`` (sha256 and size of every file);
``step_N.tmp-*`` is one being written; ``latest`` is a symbolic link to the newest. This module knows nothing of what
the files hold. Publishing order: flush every file, write the manifest, rename, move ``latest``, prune. A crash at any
point leaves the checkpoints before it valid, and `Store.clean` removes what it left behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_vlmr1.checkpoint.hashing import sha256

MANIFEST = "manifest.json"
LATEST = "latest"
_FORMAT = 1
_OWN_KEYS = {"format", "step", "created", "files", "sha256"}
_MANIFEST_LIMIT_BYTES = 64 << 20
_HASH_THREADS = min(8, os.cpu_count() or 1)
_STEP = re.compile(r"step_(0|[1-9]\d{0,17})", re.ASCII)
_LEFTOVER = re.compile(r"(step_\d+|latest)\.tmp-[0-9a-f]+", re.ASCII)
_REPLACED = re.compile(r"(step_\d+)\.old-[0-9a-f]+", re.ASCII)

Listing = dict[str, dict[str, Any]]
"""Size and sha256 of files, by their paths below a directory, with slashes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay; whatever it says, the newest one does.

    Attributes:
        last: so many of the newest ones.
        every: those whose step is a multiple of it; 0 none.
        best: the one with the best value among the `figures` of its facts, as a name and whether higher is better; of
            equal ones the newest.
    """

    last: int
    every: int = 0
    best: tuple[str, bool] | None = None

    def __post_init__(self) -> None:
        assert self.last >= 1, "at least one checkpoint stays"


class Store:
    """The checkpoints of one run, in `directory`, of which those stay that `keep` names.

    Only one process (rank 0) may call `clean`, `begin`, `publish` and `discard`; all ranks write files into the
    directory that `begin` returned. On a filesystem shared by several nodes each rank calls `prove` on what it wrote,
    and rank 0 hands that to `publish`.
    """

    def __init__(self, directory: str | Path, keep: Keep) -> None:
        self.directory = Path(directory)
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the published steps, valid or not, in ascending order."""
        if not self.directory.is_dir():
            return []
        found = (_STEP.fullmatch(entry.name) for entry in self.directory.iterdir() if _is_real_directory(entry))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return where the checkpoint of `step` is or will be."""
        return self.directory / f"step_{step}"

    def clean(self) -> list[Path]:
        """Remove what dead attempts left half written; call it before the first `begin` of an attempt.

        Returns:
            The paths that were removed.

        Raises:
            OSError: something cannot be removed.
        """
        removed = []
        for entry in sorted(self.directory.iterdir()) if self.directory.is_dir() else []:
            replaced = _REPLACED.fullmatch(entry.name)
            if replaced and not (self.directory / replaced[1]).exists():
                entry.rename(self.directory / replaced[1])  # the crash came between the two renames of publish
            elif replaced or _LEFTOVER.fullmatch(entry.name):
                _remove(entry)
                removed.append(entry)
        return removed

    def begin(self, step: int) -> Path:
        """Make and return the temporary directory that the files of `step` are to be written into.

        Raises:
            OSError: the directory cannot be made.
        """
        temporary = self.directory / f"step_{step}.tmp-{secrets.token_hex(4)}"
        temporary.mkdir(parents=True)
        return temporary

    def discard(self, temporary: Path) -> None:
        """Remove the temporary directory of a save that failed."""
        assert _LEFTOVER.fullmatch(temporary.name), temporary
        shutil.rmtree(temporary, ignore_errors=True)

    def publish(self, step: int, temporary: Path, facts: Mapping[str, Any], proven: Listing | None = None) -> Path:
        """Make the files in `temporary` the checkpoint of `step`, then prune. All ranks have finished writing.

        A checkpoint of the same step is replaced.

        Args:
            step: number of optimizer steps done.
            temporary: what `begin` returned, filled.
            facts: JSON values that go into the manifest beside ``step``, ``created`` and ``files``: layout, digest of
                the config and the like.
            proven: files that are flushed and hashed already, as `prove` returned them.

        Returns:
            The published directory.

        Raises:
            OSError: the disk failed; nothing was published and `temporary` is gone.
        """
        assert temporary.parent == self.directory and not _OWN_KEYS & facts.keys()
        target = self.path(step)
        old = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}")
        link = self.directory / f"{LATEST}.tmp-{secrets.token_hex(4)}"
        with ExitStack() as undo:
            undo.callback(self.discard, temporary)
            files = _prove_rest(temporary, proven or {})
            _write_manifest(temporary, step, facts, files)
            undo.callback(link.unlink, missing_ok=True)
            link.symlink_to(target.name)  # here, so that only renames are left, which need no space on the disk
            if target.exists():
                target.rename(old)
                undo.callback(old.rename, target)
            temporary.rename(target)
            undo.callback(target.rename, temporary)
            _flush(self.directory)
            link.replace(self.directory / LATEST)
            undo.pop_all()
        shutil.rmtree(old, ignore_errors=True)
        self._prune(step)
        return target

    def newest_valid(
        self,
        log: Callable[[str], None] = logger.warning,
        steps: Sequence[int] | None = None,
        problem_of: Callable[[Path], str] = lambda path: summary(verify(path)),
    ) -> tuple[int, Path] | None:
        """Return step and path of the newest checkpoint whose every file is as it was published.

        Args:
            log: told once for each newer checkpoint that had to be passed over, with the file that is wrong.
            steps: those to look at, in ascending order; all by default.
            problem_of: says what is wrong with a checkpoint, or nothing; ranks that share the work agree in it.
        """
        for step in reversed(self.steps() if steps is None else steps):
            problem = problem_of(self.path(step))
            if not problem:
                return step, self.path(step)
            log(f"{self.path(step)} is not valid and is passed over: {problem}")
        return None

    def _prune(self, published: int) -> None:
        try:
            # Steps above the published one are of a course that was given up; they must not crowd out this one's.
            course = [step for step in self.steps() if step <= published]
        except OSError as error:  # it is published all the same
            logger.warning("old checkpoints in %s could not be listed: %s", self.directory, error)
            return
        stay = {*course[-self.keep.last :], self._best(course)}
        stay |= {step for step in course if self.keep.every and step % self.keep.every == 0}
        for step in sorted(set(course) - stay):
            try:
                # Renamed first, so that a crash in the middle can't leave a step with half its files.
                gone = self.path(step).rename(self.directory / f"step_{step}.tmp-{secrets.token_hex(4)}")
                shutil.rmtree(gone)
            except OSError as error:
                logger.warning("old checkpoint %s could not be removed: %s", self.path(step), error)

    def _best(self, steps: Iterable[int]) -> int | None:
        """Return the step with the best figure, as the manifests tell; None where none has one."""
        if self.keep.best is None:
            return None
        name, higher = self.keep.best
        found: list[tuple[float, int]] = []
        for step in steps:
            try:
                value = read_manifest(self.path(step)).get("figures", {}).get(name)
            except ValueError:
                continue  # damaged: `newest_valid` says so where it matters
            if value is not None:
                found.append((float(value) if higher else -float(value), step))
        return max(found)[1] if found else None


def verify(path: str | Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Compare a checkpoint directory with its manifest, by size and sha256.

    Args:
        path: of the checkpoint.
        share: (i, n) compares the i-th of n shares of the files, about as large as the others.

    Returns:
        One line for each problem, each naming its file; empty when the checkpoint is what was published.
    """
    path = Path(path)
    try:
        listed = read_manifest(path)["files"]
        present = {file.relative_to(path).as_posix(): file for file in _walk(path)}
    except (OSError, ValueError) as error:
        return [str(error)]
    present.pop(MANIFEST)
    extra = [f"{name} is not in the manifest" for name in sorted(present.keys() - listed.keys())]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        mine = sorted(sorted(listed.items(), key=lambda item: item[1]["size"])[share[0] :: share[1]])
        found = pool.map(lambda item: _compare(path, item[0], item[1]), mine)
        return [problem for problem in found if problem] + extra


def summary(problems: Sequence[str]) -> str:
    """Return the first problem and the number of the others, nothing without any."""
    more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
    return f"{problems[0]}{more}" if problems else ""


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint directory, checked against its own checksum and the directory's name.

    Raises:
        ValueError: it is missing, cut, changed, or of another format; one line.
    """
    file = Path(path) / MANIFEST
    try:
        if file.stat().st_size > _MANIFEST_LIMIT_BYTES:
            raise ValueError("too large")
        manifest = json.loads(file.read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise ValueError(f"not a manifest of format {_FORMAT}")
        if manifest.pop("sha256", None) != _digest(manifest):
            raise ValueError("its content does not match its own checksum")
        if type(manifest.get("step")) is not int or not _is_listing(manifest.get("files")):
            raise ValueError("step or files is not as it should be")
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no manifest; not a published checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a usable manifest: {error}") from error
    named = _STEP.fullmatch(Path(path).resolve().name)
    if named and manifest["step"] != int(named[1]):
        raise ValueError(f"{file}: it belongs to step {manifest['step']}")
    return manifest


def flush_tree(directory: Path) -> None:
    """Ask the disk to keep every file and directory below `directory` (fsync), deepest first.

    Raises:
        OSError: the disk failed.
    """
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        list(pool.map(_flush, _walk(directory)))
    _flush_folders(directory)


def prove(directory: Path, files: Iterable[Path]) -> Listing:
    """Flush files below `directory` and hash them, for `Store.publish`.

    Raises:
        OSError: the disk failed.
    """
    paths = sorted(files)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        list(pool.map(_flush, paths))
        hashes = list(pool.map(sha256, paths))
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": digest.hex()}
        for path, digest in zip(paths, hashes, strict=True)
    }


def _prove_rest(directory: Path, proven: Listing) -> Listing:
    """Prove what is not yet proven, and ask the disk to keep the folders.

    Raises:
        OSError: the disk failed, or has not all of what was proven, perhaps by another node.
    """
    present = {file.relative_to(directory).as_posix(): file for file in _walk(directory)}
    assert not any(file.is_symlink() for file in present.values()), "a checkpoint holds its own files"
    for name, entry in proven.items():
        if name not in present or present[name].stat().st_size != entry["size"]:
            raise OSError(f"{directory / name}: not as it was written")
    rest = prove(directory, [file for name, file in present.items() if name not in proven])
    _flush_folders(directory)
    return dict(sorted((proven | rest).items()))


def _write_manifest(directory: Path, step: int, facts: Mapping[str, Any], files: Listing) -> None:
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "step": step,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "files": files,
    }
    manifest["sha256"] = _digest(manifest)
    with (directory / MANIFEST).open("x", encoding="ascii") as out:
        json.dump(manifest, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    _flush(directory)


def _is_listing(files: object) -> bool:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _compare(directory: Path, name: str, listed: Mapping[str, Any]) -> str | None:
    file = directory / name
    try:
        info = file.lstat()
        # Neither a symbolic link, which could be pointed elsewhere after the check, nor a pipe, which would block.
        if not stat.S_ISREG(info.st_mode) or not file.resolve().is_relative_to(directory.resolve()):
            return f"{name} is not a file of this directory"
        if info.st_size != listed["size"]:
            return f"{name} has {info.st_size} bytes instead of {listed['size']}"
        return None if sha256(file).hex() == listed["sha256"] else f"{name} has changed: its sha256 differs"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_folders(directory: Path) -> None:
    for folder, _, _ in os.walk(directory, topdown=False):
        _flush(Path(folder))


def _walk(directory: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory, onerror=_raise):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in names + links)


def _raise(error: OSError) -> None:
    raise error


def _is_real_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_real_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink()
