#!/usr/bin/env bash
# One training run on two nodes of eight GPUs under SLURM:
#
#   sbatch recipes/clusters/slurm.sh --config recipes/quickstart.yaml
#
# Options of sbatch on the command line replace those below: `sbatch --nodes=4 recipes/clusters/slurm.sh ...`.
# Lightning reads the number of nodes and the rank of each task from SLURM's environment. All further arguments go to
# `lightning-peft fit`.
#
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --signal=SIGTERM@120
# SLURM sends SIGTERM two minutes before the time limit: the step ends, and a ModelCheckpoint with
# save_on_exception=True saves the run, which --ckpt_path last continues.
set -euo pipefail

exec srun "${PYTHON:-python}" -m lightning_peft fit "$@" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp
