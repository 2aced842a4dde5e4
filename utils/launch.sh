# Sourced by run_all.sh and the launch/ scripts of the steps.
#
#   launch step1_sft/main.py --output_dir FOLDER [--flag value …]
#
# runs a program with DeepSpeed's launcher: its output is shown and kept in FOLDER/log.txt, its exit
# code returned. $LAUNCH holds flags of the launcher itself, e.g. LAUNCH="--num_gpus 4",
# LAUNCH="--hostfile hosts"; by default it takes every GPU of this machine, or two processes on a
# CPU with two cores or more.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/utils/environment.sh"
set_up_environment

launch_flags() {
    if [ -n "${LAUNCH:-}" ]; then
        echo "$LAUNCH"
    elif [ "${DS_ACCELERATOR:-}" = cpu ] || ! python -c 'import torch; exit(not torch.cuda.is_available())'; then
        # Two processes use two cores better than one process with two threads.
        local cores ranks
        cores=$(nproc)
        ranks=$((cores > 1 ? 2 : 1))
        echo "--num_accelerators $ranks"
    fi
}

# The value of --output_dir among the arguments (of --output_file its folder).
output_of() {
    local previous=""
    for word in "$@"; do
        [ "$previous" = --output_dir ] && echo "$word" && return
        [ "$previous" = --output_file ] && dirname "$word" && return
        previous=$word
    done
    echo .
}

launch() {
    local program="$ROOT/$1" folder
    shift
    folder=$(output_of "$@")
    mkdir -p "$folder"
    # shellcheck disable=SC2046  # flags of the launcher are words
    python -m deepspeed.launcher.runner $(launch_flags) "$program" "$@" 2>&1 | tee -a "$folder/log.txt"
    return "${PIPESTATUS[0]}"
}
