#!/usr/bin/env bash
# ZeRO-3 with optimizer states and weights in CPU memory: slow, for models that do not fit.
. "$(dirname "$0")/../../utils/launch.sh"
launch_step --zero_stage 3 --offload all --dtype bf16 --gradient_checkpointing --global_batch_size 64 --micro_batch_size 1 --max_length 2048 "$@"
