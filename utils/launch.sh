# Sourced by the launch/ scripts of the steps: makes the environment ready and starts programs by
# utils/launch.py, which see.
#
#   launch step1_sft/main.py --output_dir FOLDER [--flag value …]
#   launch_step [--flag value …]     main.py of the step whose script this is
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/utils/environment.sh"
set_up_environment
set_up_accelerator

# In the place of this shell, so that signals reach it.
launch() { exec "$PYTHON" "$ROOT/utils/launch.py" "$@"; }

# MODEL, DATA (names apart by spaces), OUTPUT and, in step 3, REWARD come from the environment.
launch_step() {
    local step given data=${DATA:-HuggingFaceH4/ultrafeedback_binarized}
    step=$(basename "$(dirname "$(dirname "$(realpath "$0")")")")
    case $step in
        step1_sft) given=(--model_name_or_path "${MODEL:-Qwen/Qwen2.5-0.5B}" --sft_data) ;;
        step2_reward | step3_preference) given=(--model_name_or_path "${MODEL:-output/step1_sft}" --preference_data) ;;
        step3_ppo) given=(--model_name_or_path "${MODEL:-output/step1_sft}"
            --reward_model "${REWARD:-output/step2_reward}" --prompt_data) ;;
    esac
    # shellcheck disable=SC2086  # names of data sets are words
    launch "$step/main.py" "${given[@]}" $data --output_dir "${OUTPUT:-output/$step}" "$@"
}
