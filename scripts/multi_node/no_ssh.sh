#!/usr/bin/env bash
# Start a step on several machines by starting it on each of them, without ssh and pdsh.
#
#     bash scripts/multi_node/no_ssh.sh HOSTFILE ADDRESS NUMBER [flags of deepspeed] \
#         path/to/main.py [flags of the step]
#
# Run the same command on every machine except for NUMBER, its place in HOSTFILE counted from 0.
# HOSTFILE has one line per machine, with its number of ranks ("node-a slots=8"). ADDRESS is the
# address of the first machine; its port 29500 (--master_port) must be open to the others.
# See docs/launching.md.

set -euo pipefail
[[ $# -ge 4 && $1 != -* ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit $(($# != 1)); }
bootstrap=$(dirname "${BASH_SOURCE[0]}")/../../alpaca_rlhf/training_model/my_deepspeed.py
exec python "$bootstrap" --hostfile "$1" --no_ssh --master_addr "$2" --node_rank "$3" "${@:4}"
