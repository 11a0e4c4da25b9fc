#!/usr/bin/env bash
# Start a step on several machines from one of them, over ssh.
#
#     bash scripts/multi_node/pdsh.sh HOSTFILE [flags of deepspeed] path/to/main.py [flags of the step]
#
# HOSTFILE has one line per machine, with its name for ssh and its number of ranks:
#     node-a slots=8
#     node-b slots=8
# It needs pdsh here, ssh from here to every machine without a password or question, and on every
# machine this folder and this Python at the same path. See docs/launching.md.

set -euo pipefail
[[ $# -ge 2 && $1 != -* ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit $(($# != 1)); }
bootstrap=$(dirname "${BASH_SOURCE[0]}")/../../alpaca_rlhf/training_model/my_deepspeed.py
exec python "$bootstrap" --hostfile "$@"
