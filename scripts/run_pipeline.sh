#!/usr/bin/env bash
# Run all three steps one after the other, then print a table and write report.html.
#
#     bash scripts/run_pipeline.sh [--config-dir configs/tiny] [--output-dir output/tiny]
#                                  [--fresh] [--num_gpus N] [-- flags for all three steps]
#
#   --config-dir DIR   folder with step1.yaml, step2.yaml and step3.yaml
#   --output-dir DIR   folder for actor/ (step 1), critic/ (step 2) and final/ (step 3)
#   --fresh            start over instead of reusing finished steps
#   --num_gpus N       number of ranks, as for my_deepspeed.py
#   -- FLAGS           appended to the command line of each step, so all three must accept them,
#                      e.g. --seed 2; flags of a single step belong in its YAML file
#
# A second run reuses every finished step whose configuration and flags are unchanged, resumes an
# interrupted step from its last checkpoint, and runs again what has changed and every step after
# it. It does not notice changes of the code: use --fresh after those. A step that fails ends the
# pipeline with its exit code.

set -euo pipefail

fail() { echo "run_pipeline: $1" >&2; exit "${2:-2}"; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
training=$root/alpaca_rlhf/training_model
config_dir=$root/configs/tiny
output_dir=$root/output/tiny
fresh=false
launcher_flags=()
extra_flags=()

while (($#)); do
    case $1 in
        --config-dir | --output-dir | --num_gpus)
            [[ -n ${2:-} ]] || fail "$1 needs a value"
            ;;&
        --config-dir) config_dir=$2; shift 2 ;;
        --output-dir) output_dir=$2; shift 2 ;;
        --num_gpus) launcher_flags=(--num_gpus "$2"); shift 2 ;;
        --fresh) fresh=true; shift ;;
        --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        --) shift; extra_flags=("$@"); break ;;
        *) fail "unknown option $1; flags of the steps go after --; see --help" ;;
    esac
done
for number in 1 2 3; do
    [[ -r $config_dir/step$number.yaml ]] || fail "cannot read $config_dir/step$number.yaml"
done
mkdir -p "$output_dir" || fail "cannot make the folder $output_dir"
output_dir=$(cd "$output_dir" && pwd)

source "$root/scripts/environment.sh"
prepare_environment requirements.txt

# Raise it when a new version of a step gives other results for the same configuration and flags:
# outputs of older versions are then not reused.
format=3

# .stepN.state says that OUTPUT was written by this script: "running HASH", then "done HASH". HASH
# covers the format, the configuration, the flags and the HASH of the step before.
previous_hash="format $format"
reuse=true

# run_step NUMBER NAME FOLDER-OF-MAIN OUTPUT [flags]
run_step() {
    local title="step $1 ($2)" main=$training/$3/main.py output=$output_dir/$4
    local config=$config_dir/step$1.yaml state=$output_dir/.step$1.state
    shift 4
    local flags=(--output_dir "$output" "$@") again=() hash before="" status=0 started=$SECONDS
    hash=$({ printf '%s\0' "$previous_hash" "${launcher_flags[@]}" "${flags[@]}" \
        "${extra_flags[@]}"; cat "$config"; } | sha256sum)
    previous_hash=$hash

    if $fresh && [[ -f $state ]]; then
        echo fresh >"$state"
    fi
    if $reuse && is_finished && [[ $(cat "$state" 2>/dev/null) == "done $hash" ]]; then
        echo "== $title: reused, finished before: $output"
        return
    fi
    reuse=false
    # Only output of this script is overwritten; the step itself refuses any other folder.
    if [[ -f $state ]]; then
        before=$(<"$state")
        again=(--overwrite_output_dir)
        if [[ $before == "running $hash" ]]; then
            again+=(--resume_from_checkpoint latest)
        fi
    fi
    if [[ -f $state || -z $(ls -A "$output" 2>/dev/null) ]]; then
        echo "running $hash" >"$state"
    fi
    echo "== $title"
    python "$training/my_deepspeed.py" "${launcher_flags[@]}" "$main" --config "$config" \
        "${flags[@]}" "${again[@]}" "${extra_flags[@]}" || status=$?
    if ((status == 2)) && [[ -n $before ]]; then
        echo "$before" >"$state"  # refused before it wrote anything: the old output is valid
    fi
    if ((status)); then
        fail "$title failed with exit code $status" "$status"
    fi
    is_finished || fail "$title ended without writing $output/results.json" 1
    echo "done $hash" >"$state"
    echo "== $title: $((SECONDS - started)) seconds"
}

# An export is renamed into place when it is complete, so these two files mean a complete one.
is_finished() { [[ -f $output/training_arguments.json && -f $output/results.json ]]; }

run_step 1 "supervised fine-tuning" step1_supervised_finetuning actor
run_step 2 "reward model" step2_reward_model_finetuning critic
run_step 3 "PPO" step3_rlhf_finetuning final \
    --actor_model_name_or_path "$output_dir/actor" --critic_model_name_or_path "$output_dir/critic"
python -m alpaca_rlhf.evaluation.report "$output_dir"
