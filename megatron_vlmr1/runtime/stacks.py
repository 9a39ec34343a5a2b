"""Where a process is: its Python stacks, its own or another's on this machine."""

from __future__ import annotations

import ctypes
import faulthandler
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import FrameType

from megatron_vlmr1.telemetry.files import readable_text
from megatron_vlmr1.telemetry.timers import PHASES

_PR_SET_NAME = 15  # linux/prctl.h
_LIBC = ctypes.CDLL(None)
_PY_SPY_S = 5.0
_LIBRARIES = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "<")
# Files of libraries whose functions wait for other ranks.
_COLLECTIVES = ("torch/distributed/", "pipeline_parallel/p2p_communication.py", "parallel/schedule.py")


def write_own(file: Path) -> None:
    """Write the stacks of all threads of this process.

    Raises:
        OSError: the file cannot be written.
    """
    with file.open("w") as stream:
        faulthandler.dump_traceback(stream, all_threads=True)


def of_other(pid: int) -> str:
    """Return what can be known of another process of this machine: its state, as the kernel has it, name and stacks.

    Python stacks come from py-spy where it is installed, which reads the memory of a process that is stopped or holds
    the interpreter's lock; the kernel's own stack needs privileges.
    """
    folder = Path(f"/proc/{pid}")
    status = (line.partition(":") for line in readable_text(folder / "status").splitlines())
    state = next((value.strip() for name, _, value in status if name == "State"), "")
    if not state:
        return "the process is gone\n"
    lines = [f"process state {state}, in the kernel's {readable_text(folder / 'wchan') or '?'}"]
    lines.append(f"name {readable_text(folder / 'comm')}")
    return "\n".join([*lines, readable_text(folder / "stack"), _py_spy(pid)]) + "\n"


def show(name: str) -> None:
    """Name the calling thread: other processes of this machine see it, also when this one is stopped. 15 characters.

    Spaces become hyphens: SLURM's proctrack/linuxproc reads /proc/PID/stat word by word, and sends no signal to a
    process whose name is two.
    """
    _LIBC.prctl(_PR_SET_NAME, name.replace(" ", "-").encode()[:15], 0, 0, 0)


def shown(text: str) -> tuple[int | None, str, str]:
    """Return the step and the phase that `show` named, and the innermost line of ours, from what `of_other` returned.

    What is not in it is None or empty.
    """
    name = re.search(r"^name (\d+|-):(.+)$", text, re.MULTILINE)
    step = int(name[1]) if name and name[1] != "-" else None
    said = name[2].replace("-", " ") if name else ""
    phase = next((phase for phase in PHASES if said and phase.startswith(said)), said)
    main = text.partition('"MainThread"\n')[2].partition("Thread ")[0]
    frames = re.findall(r"^ +(\S+) \((.+)\)$", main, re.MULTILINE)
    ours = [frame for frame in frames if "megatron_vlmr1" in frame[1]] or frames
    return step, phase, f"{ours[0][1]} {ours[0][0]}" if ours else ""


def place(frame: FrameType | None) -> tuple[str, bool]:
    """Return the innermost line outside of libraries as "FILE:LINE FUNCTION", and whether it waits for other ranks."""
    waits = False
    depth = 0
    while frame is not None:
        code = frame.f_code
        waits = waits or (depth < 3 and any(part in code.co_filename for part in _COLLECTIVES))
        if not code.co_filename.startswith(_LIBRARIES):
            parts = Path(code.co_filename).parts[-2:]
            return f"{'/'.join(parts)}:{frame.f_lineno} {code.co_name}", waits
        frame, depth = frame.f_back, depth + 1
    return "", waits


def _py_spy(pid: int) -> str:
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        return "no Python stacks: py-spy is not installed"
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no Python stacks: {error}"
    return done.stdout or f"no Python stacks: {' '.join(done.stderr.split())}"
