#!/usr/bin/env bash
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
# multi_node.sh as a job of Slurm, from the repository's root:
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 step3_ppo/launch/slurm.sh [flags of main.py]
# Two minutes before its time is over it saves and goes back into the queue.
. "$SLURM_SUBMIT_DIR/utils/requeue.sh" || exit
requeued bash "$ROOT/step3_ppo/launch/multi_node.sh" --resume auto "$@"
