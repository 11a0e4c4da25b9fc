#!/usr/bin/env bash
# Start a step on several machines with Open MPI's mpirun.
#
#     [INTERFACE=eth0] bash scripts/multi_node/openmpi.sh HOSTFILE [flags of deepspeed] \
#         path/to/main.py [flags of the step]
#
# HOSTFILE has one line per machine, with its number of ranks ("node-a slots=8"); INTERFACE is the
# network between them. It needs Open MPI on every machine, this folder and this Python at the same
# path, and a way for mpirun to reach them (ssh, or the cluster's scheduler). See docs/launching.md.

set -euo pipefail
[[ $# -ge 2 && $1 != -* ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit $(($# != 1)); }
bootstrap=$(dirname "${BASH_SOURCE[0]}")/../../alpaca_rlhf/training_model/my_deepspeed.py
exec python "$bootstrap" --launcher openmpi \
    --launcher_args "--mca btl_tcp_if_include ${INTERFACE:-eth0}" --hostfile "$@"
