#!/usr/bin/env bash
# Kill runs at random moments, resume them, and compare the end, bit for bit, with runs that were
# never killed: for each step, 1 rank and 2 ranks with ZeRO 0, 2 and 3, LoRA off and on.
#
#     bash scripts/soak.sh [flags of tests/soak.py, e.g. --kills 20 --steps 3 --ranks 2 --zero 3]
#     bash scripts/soak.sh --move     # go on with other ranks and ZeRO stages instead
#
# 20 kills of each case on one rank take ten minutes on two cores, 6 of each on two ranks twenty.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
prepare_environment requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python tests/soak.py "$@"
