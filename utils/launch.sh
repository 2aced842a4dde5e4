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
    local flags=${LAUNCH:-}
    if [ -z "$flags" ]; then
        # The port is a free one, so that two runs can share a machine.
        flags="--num_accelerators $(ranks_here) --master_port $(free_port)"
    elif gives_visible_devices "$flags" && [[ ! " $flags" =~ \ --num_(gpus|accelerators) ]]; then
        flags+=" --num_accelerators $(ranks_here)"
    fi
    echo "$flags"
}

# All GPUs, or two processes on a CPU: they use two cores better than two threads do. MAX_RANKS (a
# recipe's) limits both.
ranks_here() {
    "$PYTHON" - "${MAX_RANKS:-0}" <<'PY'
import os, sys
limit, gpus = int(sys.argv[1]), 0
if os.environ.get("DS_ACCELERATOR") != "cpu":
    import torch  # takes a second
    gpus = torch.cuda.device_count()
ranks = gpus or min(2, os.cpu_count() or 1)
print(min(ranks, limit or ranks))
PY
}

free_port() {
    "$PYTHON" - <<'PY'
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])
PY
}

# Must ranks be given CUDA_VISIBLE_DEVICES by us? Not on other machines, nor where the launcher's
# flags $1 name devices themselves, of which DeepSpeed then says that they count and not the variable.
gives_visible_devices() {
    [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ ! -e /job/hostfile ] &&
        [[ ! " $1" =~ \ (--(hostfile|include|exclude)|-[Hie]) ]]
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
    local program="$ROOT/$1" folder launcher tee code traps asked=0 flags word hidden=() given=()
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
    # DeepSpeed's launcher drops the variable where it is told how many GPUs to take, gives its ranks
    # the numbers 0, 1, … for it, and knows no UUIDs. So it does not see it, and ranks get it as it is.
    if gives_visible_devices "$flags"; then
        flags+=" --no_python --no_local_rank" hidden=(env -u CUDA_VISIBLE_DEVICES)
        given=(env "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES" "$PYTHON" -u)
    fi
    exec 9> >(exec tee -ia "$folder/log.txt")
    tee=$!
    # In the background, as bash hears no signal while it runs something in the foreground.
    # shellcheck disable=SC2086  # flags of the launcher are words
    "${hidden[@]}" "$PYTHON" -m deepspeed.launcher.runner --log_level warning $flags \
        "${given[@]}" "$program" "$@" >&9 2>&1 &
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
