# Sourced by run_all.sh and the launch/ scripts of the steps.
#
#   launch step1_sft/main.py --output_dir FOLDER [--flag value …]
#
# runs a program with DeepSpeed's launcher: its output is shown and kept in FOLDER/log.txt, its exit
# code returned. $LAUNCH holds flags of the launcher itself, e.g. LAUNCH="--num_gpus 4",
# LAUNCH="--hostfile hosts"; by default it takes every GPU of this machine, or two processes on a
# CPU.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/utils/environment.sh"
set_up_environment

launch_flags() {
    if [ -n "${LAUNCH:-}" ]; then
        echo "$LAUNCH"
        return
    fi
    # All GPUs, or two processes on a CPU: they use two cores better than two threads do. MAX_RANKS
    # (a recipe's) limits both. The port is a free one, so that two runs can share a machine.
    "$PYTHON" - "${MAX_RANKS:-0}" <<'PY'
import os, socket, sys
import torch
limit = int(sys.argv[1])
gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
ranks = gpus or min(2, os.cpu_count() or 1)
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
print(f"--num_accelerators {min(ranks, limit or ranks)} --master_port {port}")
PY
}

# The value of --output_dir among the arguments (of --output_file its folder).
output_of() {
    local previous=""
    for word in "$@"; do
        [ "$previous" = --output_dir ] && echo "$word" && return
        [ "$previous" = --output_file ] && dirname "$word" && return
        case $word in --output_dir=*) echo "${word#*=}" && return ;; esac
        previous=$word
    done
    echo .
}

launch() {
    local program="$ROOT/$1" folder
    shift
    folder=$(output_of "$@")
    mkdir -p "$folder"
    # Without a GPU DeepSpeed would warn in every process that it takes the CPU.
    [ -n "${DS_ACCELERATOR:-}" ] || "$PYTHON" -c 'import torch; exit(not torch.cuda.is_available())' ||
        export DS_ACCELERATOR=cpu
    # shellcheck disable=SC2046  # flags of the launcher are words
    "$PYTHON" -m deepspeed.launcher.runner --log_level warning $(launch_flags) "$program" "$@" 2>&1 | tee -a "$folder/log.txt"
    return "${PIPESTATUS[0]}"
}
