#!/usr/bin/env bash
# One training run on several nodes, started by torchrun. Run this script on every node, with the same HOST:
#
#   NODES=2 PROCESSES=8 HOST=node0:29500 recipes/clusters/torchrun.sh --config recipes/quickstart.yaml
#
# NODES       number of nodes
# PROCESSES   number of processes, that is of GPUs, on each node
# HOST        name and free port of one of the nodes, where the processes meet
#
# All further arguments go to `lightning-peft fit`. The processes meet within 15 minutes, or torchrun gives up.
set -euo pipefail

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
  --rdzv-backend c10d --rdzv-endpoint "$HOST" --rdzv-id "${RUN:-lightning_peft}" \
  -m lightning_peft fit "$@" \
  --trainer.num_nodes "$NODES" --trainer.devices "$PROCESSES" --trainer.strategy ddp
