"""Pure reward functions: text and truth to a float. No torch. One file per reward, found by its file name.

Each file has ``score(item: RewardItem) -> float`` which returns a finite value in the range that it documents, or
raises `RewardFailure`. With ``item.compat == "vlm-r1"`` it returns the published value, and fails where the published
code raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from megatron_vlmr1.rewards.item import RewardItem

RewardFunction = Callable[[RewardItem], float]

FROZEN = "VLMR1_FILES"  # in the environment: a directory with users' files as they were when their job was submitted


def names() -> list[str]:
    """Return the names of the rewards that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def about(name: str) -> str:
    """Return what a reward of the package says of itself in one line, its range included."""
    words = importlib.import_module(f"{__name__}.{name}").__doc__
    assert words is not None
    return words.partition("\n")[0]


@functools.cache
def get(name: str, files: tuple[str, ...] = ()) -> RewardFunction:
    """Return a reward function by name: the package's own, else a function of that name in one of `files`.

    Args:
        name: as in ``rewards.weights``.
        files: the user's Python files. They are executed, so only a reward process asks with any.

    Raises:
        ValueError: nothing of that name; the message lists the known ones.
    """
    if name in names():
        function = importlib.import_module(f"{__name__}.{name}").score
        assert callable(function)
        return function
    for path in files:
        function = getattr(load_file(path), name, None)
        if callable(function) and not name.startswith("_"):
            return function
    where = f" and none in {', '.join(files)}" if files else ""
    raise ValueError(f"no reward named {name[:40]}{where}; known: {', '.join(names())}")


@functools.cache
def load_file(path: str) -> ModuleType:
    """Execute a user's Python file, or a job's copy of it, and return what it defines.

    Raises:
        ValueError: it is no Python file. What the file itself raises is passed on.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, source(path))
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    module.__file__ = path  # of the original, beside which a file may look for others
    spec.loader.exec_module(module)
    return module


def source(path: str) -> Path:
    """Return where a user's Python file is read: a job's copy of it, where it has one."""
    folder = os.environ.get(FROZEN)
    if folder and (copy := copy_in(folder, path)).is_file():
        return copy
    return Path(path)


def copy_in(folder: str | Path, path: str) -> Path:
    """Return where a directory of copies has a user's file: under its whole path, as another may have its name."""
    return Path(folder, *Path(os.path.abspath(path)).parts[1:])
