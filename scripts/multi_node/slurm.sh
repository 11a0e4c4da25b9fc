#!/usr/bin/env bash
#SBATCH --job-name=alpaca-rlhf
#SBATCH --output=%x-%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
# Start a step on the machines of a slurm job, with one task per GPU.
#
#     sbatch [--nodes=N --ntasks-per-node=G --gpus-per-node=G] scripts/multi_node/slurm.sh \
#         [flags of deepspeed] path/to/main.py [flags of the step]
#
# Submit it from the root of the repository with the Python environment active; every machine must
# have both at the same path. See docs/launching.md.

set -euo pipefail
if [[ $# -eq 0 || $1 == --help ]]; then
    sed -n '7,/^$/s/^# \{0,1\}//p' "$0"
    exit $(($# == 0))
fi
if [[ -z ${SLURM_JOB_NODELIST:-} ]]; then
    echo "slurm.sh: not in a slurm job; submit it with sbatch (see --help)" >&2
    exit 2
fi
ranks=${SLURM_NTASKS_PER_NODE:-1}
hostfile=$(mktemp "hostfile-$SLURM_JOB_ID-XXXX")  # in this folder: all machines read it
trap 'rm -f "$hostfile"' EXIT
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$ranks/" >"$hostfile"
# Not the folder of this script: slurm runs a copy of it.
bootstrap=${SLURM_SUBMIT_DIR:-.}/alpaca_rlhf/training_model/my_deepspeed.py
python "$bootstrap" --hostfile "$hostfile" --force_multi --launcher slurm \
    "--launcher_args=--ntasks-per-node=$ranks" "$@"
