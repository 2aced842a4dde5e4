#!/usr/bin/env bash
# Many nodes, ZeRO-3. HOSTS is DeepSpeed's hostfile: lines of `host slots=8`.
. "$(dirname "$0")/../../utils/launch.sh"
export LAUNCH="${LAUNCH:---hostfile ${HOSTS:-hosts}}" MODEL="${MODEL:-Qwen/Qwen2.5-7B}"
launch_step --zero_stage 3 --dtype bf16 --gradient_checkpointing --global_batch_size 512 --micro_batch_size 4 --max_length 2048 "$@"
