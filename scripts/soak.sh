#!/usr/bin/env bash
# Kill runs at random moments, resume them, and compare the result, bit for bit, with runs that were
# never killed: each step with 1 rank, and with 2 ranks at ZeRO 0, 2 and 3, without and with LoRA.
#
#     bash scripts/soak.sh [flags of tests/soak.py, e.g. --kills 20 --steps 3 --ranks 2 --zero 3]
#     bash scripts/soak.sh --move     # resume with another world size and ZeRO stage instead
#
# On two cores, 20 kills of each case take ten minutes with one rank, 6 kills twenty with two ranks.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
prepare_environment requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python tests/soak.py "$@"
