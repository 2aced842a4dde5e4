#!/usr/bin/env bash
# One GPU.
. "$(dirname "$0")/../../utils/launch.sh"
export LAUNCH="${LAUNCH:---num_gpus 1}"
launch_step --zero_stage 0 --dtype bf16 --global_batch_size 64 --micro_batch_size 4 "$@"
