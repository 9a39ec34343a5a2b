"""The program `vlmr1`: one module per verb, one exit code per kind of ending.

A verb's module has ``add_parser(subparsers)``, which adds its parser and sets ``run=run`` as a default, and
``run(args) -> int``. It keeps heavy imports inside `run`, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_vlmr1 import __version__, errors
from megatron_vlmr1.cli.common import configure_logging
from megatron_vlmr1.runtime.ranks import identity

VERBS = (
    "train",
    "submit",
    "evaluate",
    "generate",
    "convert",
    "shards",
    "rewards",
    "report",
    "plan",
    "scaling",
    "doctor",
    "drill",
)

_DESCRIPTION = "R1-style reinforcement learning for vision-language models on megatron-core."
_EPILOG = """\
example, on the data that the quickstart made:
  vlmr1 train configs/quickstart.yaml --nproc 2 run_dir=runs/short train.steps=20

exit codes: 0 done; 1 a check found differences or damage; 2 wrong input; 17 stopped itself, requeueing would not
help; 85 checkpointed on a signal or time limit, please requeue; anything else is a crash.
"""

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vlmr1` with `argv` (the process's own by default) and return its exit code.

    Raises:
        SystemExit: from argparse, for ``--help``, ``--version`` and bad arguments (code 2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        configure_logging()
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _stdout_is_closed():
            return _crash()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it leaves
        return 128 + 13  # as a program that dies of SIGPIPE
    except errors.RunStopped as stop:
        me = identity()  # all ranks stop for one reason: one of them says it
        at = f"step {stop.step}, " if stop.step is not None else ""
        return stop.code if me and me.rank else _end(stop.code, f"stopped: {stop} ({at}exit code {stop.code})")
    except ValueError as error:
        logger.debug("where it came from", exc_info=True)
        return _end(errors.BAD_INPUT, f"error: {error}")
    except (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if error.filename is None:
            return _crash()
        logger.debug("where it came from", exc_info=True)
        return _end(errors.BAD_INPUT, f"error: {os.fsdecode(error.filename)}: {error.strerror}")
    except KeyboardInterrupt:
        return _end(130, "interrupted")
    except Exception:
        return _crash()


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error, no abbreviations, and examples left as they were written."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print `message` as one line and leave with exit code 2."""
        line = " ".join(message.split())
        self.exit(errors.BAD_INPUT, f"vlmr1: error: {line} (see {self.prog} --help)\n")


def _run(words: list[str]) -> int:
    parser = Parser(prog="vlmr1", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"vlmr1 {__version__}")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    # Only the verb that is asked for is imported; all of them for the help page and for a word that is none.
    for verb in words[:1] if words[:1] and words[0] in VERBS else VERBS:
        importlib.import_module(f"{__package__}.{verb}").add_parser(subparsers)
    args, rest = parser.parse_known_args(words)
    # argparse gives up on positionals after an option (`CONFIG --nproc 2 a.b=c`): overrides are picked up here.
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    args.words = words
    return int(args.run(args))


def _end(code: int, message: str) -> int:
    print(f"vlmr1: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _crash() -> int:
    logger.critical("vlmr1 crashed; this is a bug or a failing machine", exc_info=True)
    return errors.CRASHED


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
