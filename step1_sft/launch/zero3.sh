#!/usr/bin/env bash
# All GPUs of this node, ZeRO-3: weights sharded too; step 3 gathers them once a rollout.
. "$(dirname "$0")/../../utils/launch.sh"
export MODEL="${MODEL:-Qwen/Qwen2.5-7B}"
launch_step --zero_stage 3 --dtype bf16 --gradient_checkpointing --global_batch_size 128 --micro_batch_size 4 --max_length 2048 "$@"
