#!/usr/bin/env bash
# The same command on every machine: examples/cluster/multi_node.sh NODES THIS_NODE FIRST_ADDRESS run.yaml [key=value ...]
# THIS_NODE counts from 0; port 29500 of FIRST_ADDRESS must be open to the others.
set -euo pipefail
nodes=$1 node=$2 first=$3
shift 3
exec python -m torch.distributed.run --nnodes "$nodes" --node-rank "$node" --nproc-per-node "${RANKS_PER_NODE:-gpu}" \
    --master-addr "$first" --master-port 29500 -m merak_like.cli train "$@"
