#!/usr/bin/env bash
# Prove the program on this machine: prepare the environment, then run every check that a GPU, or
# several, or a CPU can do. At most ten minutes; no model and no data set is downloaded.
#
#     bash scripts/check_gpu.sh [--output FILE] [--only NAME ...] [--list]
#
# docs/gpu.md describes the rows of the table, and where to report a FAIL.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/environment.sh"
prepare_environment requirements.txt

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python "$root/benchmarks/check_gpu.py" "$@"
