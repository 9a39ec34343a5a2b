#!/usr/bin/env bash
# Training on this one machine, without SLURM: a rank for each GPU, or on a machine without GPUs one copy of the model.
#   bash launch/local.sh CONFIG [KEY=VALUE …] [--nproc N and the other options of `vlmr1 train`]
# Ctrl-C saves and ends it; the same command goes on. It is `vlmr1 train --nproc` from the active environment, or .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
nproc=()
if [ "$gpus" -gt 0 ] && [[ " $* " != *" --nproc"* ]]; then
    nproc=(--nproc "$gpus")
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m megatron_vlmr1.cli train "$@" "${nproc[@]}"
