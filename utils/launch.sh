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
set_up_accelerator

launch_flags() {
    if [ -n "${LAUNCH:-}" ]; then
        echo "$LAUNCH"
        return
    fi
    # All GPUs, or two processes on a CPU: they use two cores better than two threads do. MAX_RANKS
    # (a recipe's) limits both. The port is a free one, so that two runs can share a machine.
    "$PYTHON" - "${MAX_RANKS:-0}" <<'PY'
import os, socket, sys
limit, gpus = int(sys.argv[1]), 0
if os.environ.get("DS_ACCELERATOR") != "cpu":
    import torch  # takes a second
    gpus = torch.cuda.device_count()
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

# Ask the ranks of launcher $1 to save and stop. Not by way of the launcher: it would ask one rank
# after the other, kill each after 30 s and lose the exit code 75. On many machines only it can.
ask_ranks_to_stop() {
    echo "asked to stop: waiting for the end of the step, and a checkpoint" >&2
    "$PYTHON" - "$1" "${LAUNCH:-}" <<'PY'
import signal, sys
import psutil
launcher = psutil.Process(int(sys.argv[1]))
ranks = [rank for spawner in launcher.children() for rank in spawner.children()]
if "--hostfile" in sys.argv[2] or not ranks:
    launcher.terminate()
for rank in ranks:
    rank.send_signal(signal.SIGUSR1)
PY
}

SHELL_CHARACTERS=$'[][;&|<>$`\\\\"\'(){}*?!#~\n]'

launch() {
    local program="$ROOT/$1" folder launcher tee code traps asked=0 flags word
    shift
    folder=$(output_of "$@")
    mkdir -p "$folder"
    flags=$(launch_flags)
    # To other machines DeepSpeed's launcher hands the words through a shell, unquoted.
    if [[ " $flags" == *" --hostfile"* || " $flags" == *" -H"* || -e /job/hostfile ]]; then
        for word in "$program" "$@"; do
            # shellcheck disable=SC2053  # a pattern
            if [[ $word == *$SHELL_CHARACTERS* ]]; then
                echo "launch: $word holds characters that a shell of another machine would obey;" \
                    "put the setting into a file and name it with --config" >&2
                return 2
            fi
        done
    fi
    exec 9> >(exec tee -ia "$folder/log.txt")
    tee=$!
    # In the background, as bash hears no signal while it runs something in the foreground.
    # shellcheck disable=SC2086  # flags of the launcher are words
    "$PYTHON" -m deepspeed.launcher.runner --log_level warning $flags "$program" "$@" >&9 2>&1 &
    launcher=$!
    traps=$(trap -p TERM USR1 INT)
    trap 'asked=1; ask_ranks_to_stop $launcher' TERM USR1
    trap 'echo "interrupted: waiting for the ranks to end" >&2' INT
    wait "$launcher"
    code=$?
    while kill -0 "$launcher" 2>/dev/null; do # a signal ended the waiting and not the launcher
        wait "$launcher"
        code=$?
    done
    trap - TERM USR1 INT
    eval "$traps"
    exec 9>&-
    wait "$tee"
    # Ranks that were still importing torch died of SIGUSR1, with nothing to save.
    [ "$asked" = 1 ] && [ "$code" = 246 ] && code=75
    return "$code"
}
