#!/usr/bin/env bash
# Evaluate a checkpoint with Slurm, one task for each GPU:
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]
# In the environment: GPUS in all (8), GPUS_PER_NODE (8, or GPUS if that is less),
# CPUS_PER_TASK (5), SRUN_ARGS (more options of srun).
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3 checkpoint=$4
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# shellcheck disable=SC2086 # SRUN_ARGS holds several words
exec srun --partition="$partition" --job-name="$job_name" \
    --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/test.py" "$config" "$checkpoint" \
    --launcher slurm "${@:5}"
