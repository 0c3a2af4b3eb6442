#!/bin/sh
# A study under Slurm, one GPU for each share of its cells. Cells that wait for a learning rate, or for blocks that are
# still to be trained, are known once these are there: so the array runs twice, and a last call writes the table.
#
#   first=$(sbatch --parsable --array=1-8 examples/slurm_study.sh baselines study.yaml)
#   second=$(sbatch --parsable --array=1-8 --dependency="afterany:$first" examples/slurm_study.sh baselines study.yaml)
#   sbatch --array=1 --dependency="afterany:$second" examples/slurm_study.sh baselines study.yaml
#
# A finished cell is never computed again, and one that was cut short goes on: a job that failed is simply sent again.
#SBATCH --job-name=deepen-study
#SBATCH --gpus=1 --cpus-per-task=8
#SBATCH --time=24:00:00
set -eu
exec deepen study "$1" "$2" --cell "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
