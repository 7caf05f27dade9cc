#!/bin/bash
# Trains on two machines with eight GPUs each:
#
#     sbatch recipes/accelerate_configs/slurm.sh gpm_trl.cli.gpm --config recipes/llama-3.1-8b-instruct/gpm.yaml \
#         --per_device_train_batch_size 2 --resume_from_checkpoint true
#
# Twice the GPUs make twice the global batch, unless `per_device_train_batch_size` is halved. SLURM starts the job again
# after a failed machine: then it goes on from the last whole checkpoint, in an `output_dir` that all machines have.
#SBATCH --job-name=gpm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --requeue
set -euo pipefail

mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS=${HOSTS[0]}

# One launcher a machine, which starts its eight processes; `SLURM_NODEID` is known on the machine alone.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file recipes/accelerate_configs/zero3_multinode.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((8 * SLURM_NNODES))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" -m "$@"' launcher "$@"
