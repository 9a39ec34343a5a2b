"""`python -m megatron_vlmr1.cli` is `vlmr1`."""

from __future__ import annotations

import sys

from megatron_vlmr1.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
