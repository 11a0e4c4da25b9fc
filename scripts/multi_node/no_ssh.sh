#!/usr/bin/env bash
# Start a step on many machines by starting it on each: no ssh, no pdsh.
#
#     bash scripts/multi_node/no_ssh.sh HOSTFILE ADDRESS NUMBER [flags of deepspeed] \
#         path/to/main.py [flags of the step]
#
# The same command on every machine but for NUMBER, its place in HOSTFILE counted from 0. HOSTFILE
# has a line a machine, with how many ranks it gets ("node-a slots=8"); ADDRESS is where the others
# reach the first one, whose port 29500 (--master_port) must be open to them. See docs/launching.md.

set -euo pipefail
[[ $# -ge 4 && $1 != -* ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit $(($# != 1)); }
bootstrap=$(dirname "${BASH_SOURCE[0]}")/../../alpaca_rlhf/training_model/my_deepspeed.py
exec python "$bootstrap" --hostfile "$1" --no_ssh --master_addr "$2" --node_rank "$3" "${@:4}"
