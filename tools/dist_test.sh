#!/usr/bin/env bash
# Evaluate a checkpoint with one process for each GPU of a machine:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]
# On several machines, run it on each, with NNODES, its own NODE_RANK, and MASTER_ADDR
# and PORT of the first one in the environment.
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [options of test.py]" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nproc_per_node="$gpus" \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"
