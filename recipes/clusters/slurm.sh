#!/usr/bin/env bash
# A study on the nodes of a Slurm allocation; what follows the file are its arguments:
#
#     sbatch recipes/clusters/slurm.sh study my-question.yaml --out /shared/runs
#
# One command starts Ray on every node and ends it with the study. A job that ran out of time or was
# preempted resumes when it is given again, which --requeue does by itself.
#SBATCH --job-name=forgetless
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus="$SLURM_CPUS_PER_TASK" -- forgetless "$@" --on ray --address auto
