#!/bin/bash
# Several nodes of a SLURM cluster, torchrun on each; one model on every GPU (DDP):
#     sbatch --nodes=4 training/accelerate/slurm.sh --config configuration/large.yaml --data.path DIR --training.output_dir DIR
# The same command goes on from the newest checkpoint. Two minutes before the limit the run saves and ends.
#SBATCH --job-name=pose-tokenizer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$head:${MASTER_PORT:-29500}" \
    training/train.py "$@"
