#!/usr/bin/env bash
# ZeRO-3 with optimizer states and weights in CPU memory: slow, for models that do not fit.
. "$(dirname "$0")/../../utils/launch.sh"
launch_step --zero_stage 3 --offload all --dtype bf16 --gradient_checkpointing --prompts_per_rollout 128 --global_batch_size 64 \
    --micro_batch_size 1 --generation_tokens 8192 --learning_rate 1e-6 --critic_learning_rate 9e-6 --max_prompt_length 1024 --max_response_length 1024 "$@"
