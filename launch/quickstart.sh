#!/usr/bin/env bash
# The whole method on this machine, without a GPU: installs, then GRPO of the shipped tiny VLM on 2 ranks.
# Arguments go to tools/quickstart.py, such as: bash launch/quickstart.sh --run-dir runs/seed1 seed=1
set -euo pipefail
started=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/install.sh
. launch/install.sh
vlmr1_install demo
export CUDA_VISIBLE_DEVICES=""  # two ranks on the CPU, also where there is a GPU
exec python tools/quickstart.py --started "$started" "$@"
