# Sourced by jobs of Slurm (utils/slurm.sh and the launch/slurm.sh of the steps): ranks are started
# by srun, and a job that was warned and has saved goes back into the queue.
#
#   requeued COMMAND …     runs it; on SIGUSR1 (#SBATCH --signal=B:USR1@120) it is asked to save

ROOT="$SLURM_SUBMIT_DIR"
export LAUNCH="${LAUNCH:-srun}"

requeued() {
    local code warned=0 command=""
    trap 'warned=1; [ -z "$command" ] || kill -USR1 "$command"' USR1
    "$@" &
    command=$!
    # Warned before its process was known: asked once more, when it surely runs.
    [ "$warned" = 0 ] || { sleep 1 && kill -USR1 "$command"; }
    wait "$command"
    code=$?
    while kill -0 "$command" 2>/dev/null; do # a signal ended the waiting and not the command
        wait "$command"
        code=$?
    done
    # 138: it had not yet begun to listen, and had nothing to save. A job that was cancelled ends
    # with 75 as well, and stays cancelled: only the warning means that it shall go on.
    if [ "$warned" = 1 ] && [[ $code == 75 || $code == 138 ]]; then
        echo "job $SLURM_JOB_ID was warned, has saved, and goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
