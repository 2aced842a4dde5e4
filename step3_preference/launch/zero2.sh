#!/usr/bin/env bash
# All GPUs of this node, ZeRO-2: gradients and optimizer states sharded.
. "$(dirname "$0")/../../utils/launch.sh"
launch_step --zero_stage 2 --dtype bf16 --global_batch_size 64 --micro_batch_size 4 "$@"
