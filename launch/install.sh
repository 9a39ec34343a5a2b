# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh.

# vlmr1_install EXTRA[,EXTRA]: installs this checkout with the extras into the active virtual environment, or else into
# .venv at the top of the checkout, which is made if missing, and activates it. Quick when nothing has changed.
vlmr1_install() {
    local extras=$1 root constraints python stamp state started
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return
    constraints=$root/constraints-cpu.txt
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
            python=$(vlmr1_find_python) || return
            echo "[install] $("$python" --version): making .venv" >&2
            "$python" -m venv --clear "$root/.venv" || return
        fi
        # shellcheck disable=SC1091
        . "$root/.venv/bin/activate"
    fi
    stamp=$VIRTUAL_ENV/.vlmr1-${extras//,/-}
    state=$(cat "$root/setup.cfg" "$root/pyproject.toml" "$constraints" <(echo "$root") | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
        echo "[install] $VIRTUAL_ENV is up to date" >&2
        return 0
    fi
    echo "[install] megatron-vlmr1[$extras] into $VIRTUAL_ENV (a minute or two, 1.5 GB)" >&2
    started=$SECONDS
    PIP_DISABLE_PIP_VERSION_CHECK=1 python -m pip install -q -c "$constraints" -e "${root}[$extras]" || return
    echo "$state" >"$stamp"
    echo "[install] done in $((SECONDS - started)) s" >&2
}

# Prints the first Python >= 3.11 that runs and can make virtual environments.
vlmr1_find_python() {
    local python
    for python in python3.11 python3.12 python3.13 python3; do
        if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return 0
        fi
    done
    echo "[install] no Python >= 3.11 with venv found" >&2
    return 1
}
