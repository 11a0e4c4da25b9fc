#!/usr/bin/env bash
# Start a vLLM server for `--rollout_engine vllm` of step 3 (docs/rollouts_vllm.md), one line a node.
#
#     bash scripts/serve_rollouts.sh output/actor 8000 --dtype bfloat16 --tensor-parallel-size 2
#     HOST=0.0.0.0 bash scripts/serve_rollouts.sh /shared/actor      # for training on other machines
#
# PYTHON is the interpreter of the environment that has vLLM (default: python). All other flags are
# vLLM's. The server takes weights from whoever reaches it: keep it inside your own network.

set -euo pipefail
model=${1:?give the folder of the actor, and if need be a port}
port=${2:-8000}
shift $(($# < 2 ? $# : 2))
# Endpoints that pause, load weights and adapters; and no usage statistics to anybody.
export VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_NO_USAGE_STATS=1
exec "${PYTHON:-python}" -m vllm.entrypoints.openai.api_server --model "$model" --port "$port" \
    --host "${HOST:-127.0.0.1}" --logprobs-mode processed_logprobs "$@"
