#!/usr/bin/env bash
# Installs this checkout and runs its tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh
vlmr1_install test

export OMP_NUM_THREADS=1
directories=()
for directory in unit distributed faults slurm gpu; do  # quick ones first
    if compgen -G "tests/$directory/test_*.py" >/dev/null; then
        directories+=("tests/$directory")
    fi
done
echo "[tests] ${directories[*]}" >&2
exec python -m pytest -n 2 "${directories[@]}" "$@"
