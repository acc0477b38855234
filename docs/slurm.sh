#!/usr/bin/env bash
# One run of the trainer on several nodes under SLURM, which stops before the time limit and queues itself again:
#
#   sbatch docs/slurm.sh --dataset imagenet_lt --arch resnext50 --data DIR
#
#SBATCH --job-name=rcl_fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# One job, one folder, which all nodes must see. Queued again, a job keeps its number.
folder=runs/slurm-$SLURM_JOB_ID
run=("$@" --output "$folder")
if compgen -G "$folder/*.pt" > /dev/null; then
    run=(--resume "$folder")
fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    train/run.py "${run[@]}" &
job=$!
# USR1 comes two minutes before the limit, TERM with scancel or preemption. srun passes TERM on to each torchrun, and
# that to its processes, which then have 30 seconds to save themselves.
trap 'kill -TERM "$job"' USR1 TERM
while kill -0 "$job" 2> /dev/null; do
    wait "$job" # also ends when a signal comes
done

# torchrun's exit status doesn't tell a stop from a failure; the run's own file does.
status=$(sed -n 's/.*"status": "\(.*\)".*/\1/p' "$folder/status.json")
echo "the run is $status"
case $status in
    preempted) scontrol requeue "$SLURM_JOB_ID" ;;
    finished) exit 0 ;;
    *) exit 1 ;;
esac
