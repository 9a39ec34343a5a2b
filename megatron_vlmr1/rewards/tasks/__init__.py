"""What each task asks, parses, rewards and measures. One file per task, found by its file name."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterable

from megatron_vlmr1.rewards import functions
from megatron_vlmr1.rewards.task import Task


def names() -> list[str]:
    """Return the names of the tasks that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Task:
    """Return a task by name, or from the user's own Python file where `name` ends with ``.py``, which is executed.

    Raises:
        ValueError: no such task or file, or no task in it; one line.
    """
    if name.endswith(".py"):
        return _own(name)
    if name not in names():
        raise ValueError(f"task: no task named {name}; known: {', '.join(names())}; or path/to/your_task.py")
    task = importlib.import_module(f"{__name__}.{name}").TASK
    assert isinstance(task, Task)
    return task


def files(name: str) -> tuple[str, ...]:
    """Return the user's Python files in which the task's reward functions may lie."""
    return (os.path.abspath(name),) if name.endswith(".py") else ()


def check(name: str, recipe: Iterable[str] = ()) -> None:
    """Check that there is such a task, and that each reward of its recipe, or of the given one, is known.

    Raises:
        ValueError: one line.
    """
    task = get(name)
    for part in recipe or task.recipe:
        functions.get(task.reward(part), files(name))


def _own(path: str) -> Task:
    if not functions.source(path).is_file():
        raise ValueError(f"task: {path}: no such file")
    try:
        module = functions.load_file(os.path.abspath(path))
    except Exception as error:  # whatever a user's file may raise
        raise ValueError(f"task: {path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        found = "it has no TASK" if task is None else f"its TASK is a {type(task).__name__}"
        raise ValueError(f"task: {path}: {found}; expected TASK = megatron_vlmr1.rewards.task.Task(…)")
    return task
