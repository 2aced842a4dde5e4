#!/usr/bin/env bash
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
# multi_node.sh as a job of Slurm that goes back into the queue when its time is nearly over:
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 step3_preference/launch/slurm.sh [flags of main.py]
. "$SLURM_SUBMIT_DIR/utils/requeue.sh" && requeued bash "$ROOT/step3_preference/launch/multi_node.sh" --resume auto "$@"
