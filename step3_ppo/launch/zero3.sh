#!/usr/bin/env bash
# All GPUs of this node, ZeRO-3: weights sharded too; step 3 gathers them once a rollout.
. "$(dirname "$0")/../../utils/launch.sh"
launch_step --zero_stage 3 --dtype bf16 --gradient_checkpointing --prompts_per_rollout 256 --global_batch_size 128 --micro_batch_size 4 \
    --generation_tokens 32768 --learning_rate 1e-6 --critic_learning_rate 9e-6 --max_prompt_length 1024 --max_response_length 1024 "$@"
