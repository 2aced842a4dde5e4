#!/usr/bin/env bash
# Many nodes, ZeRO-3. HOSTS is DeepSpeed's hostfile: lines of `host slots=8`.
. "$(dirname "$0")/../../utils/launch.sh"
export LAUNCH="${LAUNCH:---hostfile ${HOSTS:-hosts}}"
launch_step --zero_stage 3 --dtype bf16 --gradient_checkpointing --global_batch_size 256 --micro_batch_size 2 --max_length 2048 "$@"
