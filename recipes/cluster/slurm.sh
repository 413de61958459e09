#!/bin/bash
# Trains on N machines under Slurm, and is queued again when the time limit comes first.
# From the checkout, on a disk that all machines see, with the right python first in PATH:
#
#   sbatch --nodes=4 recipes/cluster/slurm.sh recipes/pirl_jigsaw.yaml \
#       data.root=/shared/imagenet/train train.out=/shared/runs/pirl
#
# Written from Slurm's manual and tried with stand-ins for its commands only, not on a cluster.

#SBATCH --job-name=fastssl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one torchrun a machine; it starts a process a GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64      # all cores: they decode, cores / GPUs loader threads a process
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append      # the log of a run goes on, too
#SBATCH --output=%x-%j.log
# 300 s before the time limit, to this script alone. USR1 and not TERM: scancel sends TERM, and a
# job that its owner cancels must not come back.
#SBATCH --signal=B:USR1@300

set -euo pipefail

if [[ $# -eq 0 || ! -f fastssl/train.py ]]; then
    echo "error: in the checkout: sbatch recipes/cluster/slurm.sh RECIPE [a.b=value ...]" >&2
    exit 2
fi

# After a TERM torchrun kills what is left 30 s later, which can be in the middle of a checkpoint.
export PET_SHUTDOWN_TIMEOUT=240 # less than the 300 s above

# Else torch 2.15's restarted processes look for each other where the former ones were.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${machines%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one machine must not meet

out_of_time=
# TERM goes to the steps, that is to torchrun and train.py, not to srun, which would kill its tasks.
trap 'out_of_time=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1

# A process that is killed (out of memory, a broken GPU) has torchrun start all of them again, from
# the last checkpoint, twice in a job; a machine that is lost ends the job, which Slurm queues again.
# The first machine may write the checkpoint while the others have ended: they must not take it with
# them at once (kill-on-bad-exit is on at some sites), nor leave it to wait for ever if one broke.
# In the background, since bash heeds a trap during `wait` but not while a command runs.
srun --kill-on-bad-exit=0 --wait=240 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$first:$port" \
    --rdzv_id="$SLURM_JOB_ID" \
    --max_restarts=2 \
    fastssl/train.py "$@" &
code=0
wait $! || code=$?
if [[ -n $out_of_time && $code -gt 128 ]]; then # the signal ended the wait, not the training
    code=0
    wait $! || code=$?
fi

# torchrun makes a 1 of train.py's 75 (stopped after a checkpoint), so the signal is what tells a
# stopped run from a failed one. That one would fail again and is not queued.
if [[ -n $out_of_time && $code -ne 0 ]]; then
    echo "out of time: job $SLURM_JOB_ID is queued again and goes on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
