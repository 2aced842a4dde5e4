#!/usr/bin/env bash
# Many nodes, ZeRO-3. HOSTS is DeepSpeed's hostfile: lines of `host slots=8`.
. "$(dirname "$0")/../../utils/launch.sh"
export LAUNCH="${LAUNCH:---hostfile ${HOSTS:-hosts}}"
launch_step --zero_stage 3 --dtype bf16 --gradient_checkpointing --prompts_per_rollout 1024 --global_batch_size 512 --micro_batch_size 4 \
    --generation_tokens 32768 --learning_rate 1e-6 --critic_learning_rate 9e-6 --max_prompt_length 1024 --max_response_length 1024 "$@"
