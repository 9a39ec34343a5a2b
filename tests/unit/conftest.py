"""What tests of single processes share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def mesh():
    """This process as the only rank, in a process group of its own for each file."""
    from tests.distributed import ranks  # which imports torch; not every session needs it

    with ranks.alone() as mesh:
        yield mesh
