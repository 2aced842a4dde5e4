# Sourced by run_all.sh and the launch/ scripts of the steps.
#
#   launch step1_sft/main.py --output_dir FOLDER [--flag value …]
#
# runs a program with DeepSpeed's launcher: its output is shown and kept in FOLDER/log.txt, its exit
# code returned. $LAUNCH holds flags of the launcher itself, e.g. LAUNCH="--num_gpus 4",
# LAUNCH="--hostfile hosts"; by default it takes every GPU of this machine, or two processes on a
# CPU. LAUNCH="srun [flags]", in a job of Slurm, starts one task a rank instead.

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

# Must ranks be given CUDA_VISIBLE_DEVICES by us? Not on other machines or by Slurm, nor where the launcher's
# flags $1 name devices themselves, of which DeepSpeed then says that they count and not the variable.
gives_visible_devices() {
    [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ ! -e /job/hostfile ] &&
        [[ ! " $1" =~ \ (srun|--(hostfile|include|exclude)|-[Hie]) ]]
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

# How many ranks the launcher flags "$1" start; nothing where only the launcher knows.
ranks_of() {
    local file
    case $1 in
    srun | srun\ *) echo "${SLURM_NTASKS:-}" ;;
    *--include* | *--exclude* | *-i\ * | *-e\ * | *--num_nodes*) ;;
    *--num_accelerators\ * | *--num_gpus\ *)
        [[ $1 == *-H* || $1 == *--hostfile* ]] ||
            echo "$1" | grep -oE -- '--num_(accelerators|gpus) [0-9]+' | grep -oE '[0-9]+$'
        ;;
    *)
        file=$(echo "$1" | grep -oE -- '(--hostfile|-H)[ =]+[^ ]+' | sed -E 's/^[^ =]+[ =]+//')
        [ ! -f "$file" ] || sed -nE 's/^[^#[:space:]]+[[:space:]]+slots=([0-9]+).*/\1/p' "$file" |
            awk '{ n += $1 } END { print n }'
        ;;
    esac
}

# Ask the ranks of launcher $1 to save and stop. Not by way of DeepSpeed's launcher: it would ask
# one rank after the other, kill each after 30 s and lose the exit code 75.
ask_ranks_to_stop() {
    echo "asked to stop: waiting for the end of the step, and a checkpoint" >&2
    "$PYTHON" - "$1" <<'PY'
import os, re, shlex, signal, subprocess, sys
import psutil
launcher = psutil.Process(int(sys.argv[1]))
spawner = next(iter(launcher.children()), None)
words = spawner.cmdline() if spawner else []
if launcher.name() == "srun":
    launcher.send_signal(signal.SIGUSR1)  # which it hands to every task
elif any(os.path.basename(word) == "pdsh" for word in words[:2]):
    # On every machine, by the same way: the children of the launcher that has this run's address.
    there = [re.escape(w) for w in words if w.startswith(("--master_addr=", "--master_port="))]
    pattern = "^[^ ]+ -u -m deepspeed[.]launcher[.]launch .*" + " ".join(there) + " "
    pattern = pattern.replace("\\-", "-")
    command = f'pkill -USR1 -P "$(pgrep -d, -f {shlex.quote(pattern)})"'
    end = words.index("-w") + 2
    asked = subprocess.run([*words[:end], command], env=spawner.environ(), timeout=60)
    if asked.returncode:
        print("launch: not every machine could be asked (see above)", file=sys.stderr)
elif ranks := spawner.children() if spawner else []:
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
else:
    launcher.terminate()
PY
}

# What other machines get of our environment beside PYTHON* and NCCL*, which DeepSpeed's launcher
# hands over by itself, in the form it reads.
environment_for_machines() {
    local name file
    for file in "$HOME/.deepspeed_env" .deepspeed_env; do
        [ ! -f "$file" ] || grep = "$file"
    done
    for name in DS_ACCELERATOR OMP_NUM_THREADS GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME \
        HF_HOME HF_HUB_OFFLINE HF_DATASETS_OFFLINE TORCH_EXTENSIONS_DIR; do
        [ -z "${!name:-}" ] || echo "$name=${!name}"
    done
}

# Runs program "$2" … as ranks: one task of Slurm each, whose numbers become those of torchrun.
# The first node's address is the one that Slurm itself has for it.
srun_ranks() {
    local first address
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol show node "$first" | grep -oE 'NodeAddr=[^ ]+' | cut -d= -f2)
    export MASTER_ADDR="$address" MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
    # A rank that ends by an error ends the others by itself; Slurm would be in the way of those
    # that end with 75. It ends what is left after a minute.
    # shellcheck disable=SC2016,SC2086  # for the tasks to expand; flags of srun are words
    exec srun --kill-on-bad-exit=0 --wait=60 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
        ${1#srun} bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
            export LOCAL_WORLD_SIZE=$(((SLURM_NTASKS + SLURM_NNODES - 1) / SLURM_NNODES)); exec "$@"' \
        rank "$PYTHON" -u "${@:2}"
}

SHELL_CHARACTERS=$'[][;&|<>$`\\\\"\'(){}*?!#~\n]'

launch() {
    local program="$ROOT/$1" folder launcher tee code traps asked=0 flags word exported="" hidden=() given=()
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
        exported=$(mktemp)
        environment_for_machines >"$exported"
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
    if [ "${flags%% *}" = srun ]; then
        srun_ranks "$flags" "$program" "$@" >&9 2>&1 &
    else
        # ssh waits for a machine that is lost without end, unless told to ask it.
        # shellcheck disable=SC2086  # flags of the launcher are words
        DS_ENV_FILE="${DS_ENV_FILE:-$exported}" \
            PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=5 -o ServerAliveCountMax=4" \
            "${hidden[@]}" "$PYTHON" -m deepspeed.launcher.runner --log_level warning $flags \
            "${given[@]}" "$program" "$@" >&9 2>&1 &
    fi
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
    [ -z "$exported" ] || rm -f "$exported"
    # Ranks that were still importing torch died of SIGUSR1, with nothing to save.
    [ "$asked" = 1 ] && [[ $code == 246 || $code == 138 ]] && code=75
    return "$code"
}
