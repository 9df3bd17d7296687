#!/bin/bash
# Pre-train under SLURM, on all GPUs of some nodes: sbatch --nodes 2 examples/slurm.sh --classifier ... --output_dir ...
# The arguments are those of examples/pretrain.py. Two minutes before its time is up, the job writes a checkpoint and
# queues itself again; a job that fails or is finished does not.
#SBATCH --gpus-per-node=8 --ntasks-per-node=1 --cpus-per-task=64 --time=24:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append

MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN

# SLURM_NODEID differs from node to node, so the shell of each task reads it.
# shellcheck disable=SC2016
srun bash -c 'exec accelerate launch --config_file examples/accelerate/ddp.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" --main_process_port 29500 \
    examples/pretrain.py "$@"' launch "$@" &
run=$!

stopped=no
# scancel signals the tasks and not this shell. TERM, since USR1 would end the launcher and not the training.
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
wait "$run"
status=$?
while kill -0 "$run" 2> /dev/null; do # the signal has ended the first wait, not the tasks
    wait "$run"
    status=$?
done
if [ "$stopped" = yes ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
