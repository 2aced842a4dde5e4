#!/usr/bin/env bash
# All GPUs of this node, ZeRO-3: weights sharded too.
. "$(dirname "$0")/../../utils/launch.sh"
launch_step --zero_stage 3 --dtype bf16 --gradient_checkpointing --global_batch_size 64 --micro_batch_size 2 --max_length 2048 "$@"
