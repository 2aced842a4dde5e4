#!/usr/bin/env bash
# Many nodes, ZeRO-3. HOSTS is DeepSpeed's hostfile: lines of `host slots=8`.
# MODEL, DATA (names apart by spaces) and OUTPUT from the environment; further flags go to main.py.
. "$(dirname "$0")/../../utils/launch.sh"
[ -n "${LAUNCH:-}" ] || [ -f "${HOSTS:-hosts}" ] || { echo "no hostfile ${HOSTS:-hosts}; set HOSTS" >&2; exit 2; }
LAUNCH="${LAUNCH:---hostfile ${HOSTS:-hosts}}"
launch step1_sft/main.py --model_name_or_path "${MODEL:-Qwen/Qwen2.5-7B}" \
    --sft_data ${DATA:-HuggingFaceH4/ultrafeedback_binarized} \
    --output_dir "${OUTPUT:-output/step1_sft}" \
    --zero_stage 3 --dtype bf16 --gradient_checkpointing --global_batch_size 512 --micro_batch_size 4 \
    --max_length 2048 "$@"
