"""Faults put into this process by wrapping the functions that they are to happen in; the program knows nothing."""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from megatron_vlmr1.drill.faults import POINTS, Fault

FIRED = "VLMR1_DRILL_FIRED"  # the file that faults are written down in, just before they happen
_RUN = "megatron_vlmr1.train.run:Run.__init__"
_FILE_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "vlmr1.fsync"}
_RANK_COMMAND = "megatron_vlmr1.launch.local:rank_command"

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def wrap(dotted: str, around: Around) -> None:
    """Put `around(original, args, kwargs)` in the place of the function ``module:name`` or ``module:Class.name``."""
    owner_name, _, name = dotted.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(original, args, kwargs)

    setattr(owner, name, call)


def pass_on(module: str, words: Sequence[str]) -> None:
    """Let the launcher start its ranks as the program `module` of this room, with `words` in front of their own."""

    def entry(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        command: list[str] = original(*args, **kwargs)
        at = command.index("megatron_vlmr1.cli")
        return [*command[:at], module, *words, *command[at + 1 :]]

    wrap(_RANK_COMMAND, entry)


def install(faults: Sequence[Fault]) -> None:
    """Arm this rank's `faults`; each happens once, at its point's first call in its step."""
    if faults:
        clock = _Clock()
        for name in {fault.point for fault in faults}:
            _arm(name, [fault for fault in faults if fault.point == name], clock)


class _Clock:
    """The number of steps that the run of this process has done."""

    def __init__(self) -> None:
        self._run: Any = None
        wrap(_RUN, self._remember)

    @property
    def step(self) -> int | None:
        """None before the first step."""
        return None if self._run is None else int(self._run.step)

    def _remember(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        original(*args, **kwargs)
        self._run = args[0]


def _arm(name: str, waiting: list[Fault], clock: _Clock) -> None:
    point = POINTS[name]
    inside = threading.local()
    if point.within:

        def enter(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inside.now = True
            try:
                return original(*args, **kwargs)
            finally:
                inside.now = False

        wrap(point.within, enter)

    def around(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        due = [fault for fault in waiting if fault.step == clock.step]
        if not due or (point.within and not getattr(inside, "now", False)):
            return original(*args, **kwargs)
        waiting.remove(due[0])
        _write_down(due[0])
        return _perform(due[0].action, original, args, kwargs)

    wrap(point.function, around)


def _write_down(fault: Fault) -> None:
    row = {**asdict(fault), "pid": os.getpid(), "unix_s": time.time()}
    with Path(os.environ[FIRED]).open("ab", buffering=0) as out:
        out.write(json.dumps(row).encode() + b"\n")


def _perform(action: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, _, argument = action.partition(":")
    if name in _BEFORE:
        _BEFORE[name](argument)
        return original(*args, **kwargs)
    if name == "flip":
        _flip_bit(args[0].actor.policy.ddp[0].buffers[0].param_data)
    elif name == "flip-master":
        groups = args[0].optimizer.chained_optimizers[0].shard_fp32_from_float16_groups
        _flip_bit(next(shard for group in groups for shard in group if shard is not None))
    elif name == "kill-at":
        _kill_at_operation(int(argument))
    result = original(*args, **kwargs)
    if name == "nan" and isinstance(result, tuple):  # log-probs and entropy
        return result[0] * float("nan"), *result[1:]
    if name == "nan":
        args[0][-1].buffers[-1].grad_data[-1] = float("nan")
    return result


def _flip_bit(tensor: Any) -> None:
    """Flip the lowest bit of the first number."""
    import torch

    first = tensor.detach().view(-1)[:1]
    integers = first.view(torch.int16 if first.element_size() == 2 else torch.int32)
    integers ^= 1


def _kill_at_operation(count: int) -> None:
    """Kill this process as it begins its `count`-th operation on files from now on: what Python is told of, and fsync.

    What native code opens and writes by itself falls between two of them.
    """
    done = itertools.count(1)

    def operation(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in _FILE_EVENTS) and next(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sys.audit("vlmr1.fsync", *args)
        original(*args, **kwargs)

    wrap("os:fsync", fsync)
    sys.addaudithook(operation)


def _kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(_: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _signal(number: str) -> None:
    os.kill(os.getpid(), int(number))


def _hang(_: str) -> None:
    ctypes.CDLL(None).pause()  # in C, where no Python signal handler runs


def _raise(_: str) -> NoReturn:
    raise RuntimeError("raised by the drill")


def _os_error(name: str) -> NoReturn:
    number = getattr(errno, name)
    raise OSError(number, os.strerror(number))


def _remount(argument: str) -> None:
    options, _, directory = argument.partition("@")
    subprocess.run(["mount", "-o", f"remount,{options}", directory], check=True)  # noqa: S603, S607


def _chmod(argument: str) -> None:
    mode, _, directory = argument.partition("@")
    Path(directory).chmod(int(mode, 8))


_BEFORE: dict[str, Callable[[str], None]] = {
    "kill": _kill,
    "stop": _stop,
    "signal": _signal,
    "hang": _hang,
    "raise": _raise,
    "oserror": _os_error,
    "remount": _remount,
    "chmod": _chmod,
}
