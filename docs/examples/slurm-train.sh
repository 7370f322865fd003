#!/bin/bash
# Train on several nodes: sbatch slurm-train.sh OUTPUT [SETTINGS OF dimr-fast train …]
#SBATCH --job-name=dimr-train
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Ten minutes before the time is over the run gets a signal, saves and ends.
#SBATCH --signal=TERM@600
# After the failure of a node the job is queued again, and goes on from its checkpoint: by Slurm, or
# at the end of this script, if the run has noticed the failure before Slurm did.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

output=${1:?usage: sbatch slurm-train.sh OUTPUT [SETTINGS …]}
shift
if [ -e "$output/checkpoint.safetensors" ]; then
    set -- "$@" --resume
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Time to save after the signal. torchrun of torch 2.11 does not have the option.
grace=()
if [[ $(torchrun --help) == *--shutdown-timeout* ]]; then
    grace=(--shutdown-timeout 540)
fi
status=0
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 "${grace[@]}" \
    --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m dimr_fast.training --output "$output" "$@" || status=$?
# Also after the signal above: the job goes on when it gets time again.
if [ "$status" -ne 0 ] && [ -e "$output/checkpoint.safetensors" ] &&
    [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
