#!/bin/bash
# One run on two machines of eight GPUs, under Slurm: it ends itself before its time is up, and queues itself again.
#
#   sbatch examples/slurm.sh recipe.yaml
#
# Five minutes before the end Slurm sends USR1 to this script, which has TERM sent to the training. At the first TERM
# deepen finishes its step, writes a checkpoint and ends with code 130; USR1 itself would end it with none written since
# the last. The job is then put back into the queue, and --resume goes on from there. With --resume a run that has not
# begun begins, and one that is finished does nothing. A step must end, and a checkpoint be written, within the
# launcher's patience: torchrun kills its processes 30 seconds after TERM. What that cuts off goes on from the last
# checkpoint of `train.checkpoint_every`.
#
# The recipe, the base, the texts and the output lie at the same paths on all machines.
#SBATCH --job-name=deepen
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
set -u
recipe=${1:?which recipe?}

queue_again() {
    scancel --signal=TERM "$SLURM_JOB_ID" # goes to the steps, not to this script
    wait
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap queue_again USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
    --rdzv-endpoint "$first:29500" -m deepen run "$recipe" --resume &
wait $!
