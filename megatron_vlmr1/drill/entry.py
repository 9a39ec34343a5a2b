"""`vlmr1` with faults: ``python -m megatron_vlmr1.drill.entry FAULTS -- train CONFIG …``.

FAULTS is JSON, a list of ``{"rank", "step", "point", "action"}``. Alone it starts the ranks as `vlmr1` does; under
srun or torchrun it is one of them.
"""

from __future__ import annotations

import runpy
import sys

from megatron_vlmr1.drill import inject
from megatron_vlmr1.drill.faults import from_text
from megatron_vlmr1.runtime.ranks import identity


def main() -> None:
    """Arm the faults, then be the program."""
    text, _, *words = sys.argv[1:]
    faults = from_text(text)
    me = identity()
    if me is None:
        inject.pass_on("megatron_vlmr1.drill.entry", [text, "--"])
    else:
        inject.install([fault for fault in faults if fault.rank == me.rank])
    sys.argv = ["vlmr1", *words]
    runpy.run_module("megatron_vlmr1.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
