#!/usr/bin/env bash
# Installs this checkout and runs its tests; arguments go to pytest. With CI=true, as root, on a machine with apt, it
# installs SLURM too, and runs tests/slurm after the others, which would disturb their seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/install.sh
. launch/install.sh
vlmr1_install test

# Installs SLURM and shellcheck where they are missing; prints why it cannot.
install_slurm() {
    local packages=(slurm-wlm munge shellcheck)
    if command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v shellcheck >/dev/null; then
        return 0
    elif [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "${packages[*]} cannot be installed: not root, or no apt-get"
        return 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    timeout 120 apt-get update -qq >/dev/null 2>&1 || true
    if ! timeout 300 apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1; then
        echo "apt-get install ${packages[*]} failed"
        return 1
    fi
}

# Runs pytest; `result` is 5, as pytest says where no test is selected, until some are, and then 0 unless any fails.
run() {
    local status=0
    echo "[tests] $*" >&2
    python -m pytest "$@" || status=$?
    if [ "$status" -eq 2 ]; then
        exit 2 # interrupted
    elif [ "$status" -ne 5 ] && { [ "$status" -ne 0 ] || [ "$result" -eq 5 ]; }; then
        result=$status
    fi
}

export OMP_NUM_THREADS=1
directories=()
for directory in unit distributed faults; do  # quick ones first
    if compgen -G "tests/$directory/test_*.py" >/dev/null; then
        directories+=("tests/$directory")
    fi
done
PATH=$PATH:/usr/sbin
skipped="CI is not true"
if [ "${CI:-}" = true ]; then
    skipped=$(install_slurm) || true
fi
result=5
run tests/gpu "$@"  # in a session of their own: GPUs are hidden from the others
run -n 2 "${directories[@]}" "$@"
if [ -z "$skipped" ]; then
    run tests/slurm "$@"
else
    echo "[tests] skipped tests/slurm: $skipped; \`python -m pytest tests/slurm\` runs it where SLURM is installed" >&2
fi
exit "$result"
