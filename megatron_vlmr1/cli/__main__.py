"""`python -m megatron_vlmr1.cli` is `vlmr1`."""

from __future__ import annotations

import atexit
import os
import sys

from megatron_vlmr1.cli.main import main


def leave(code: int) -> None:
    """End this process, as a rank that failed too: its process group is still there.

    The interpreter would take the group's threads down in any order and abort once in a few times, which would hide
    the exit code.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
