#!/usr/bin/env bash
# A Ray cluster for the time of one Slurm job, and a script of autodet on it:
#
#     sbatch cluster/slurm/job.sh experiments/upgrade_detector.py --data DIR --output RUN --preset gpu --workers 4
#
# Submit it from a clone that all nodes see, with a virtual environment in .venv. Sizes are those below, or sbatch's own
# options; --workers is the number of GPUs. Preempted, out of time, or requeued for a lost node, the job goes on with the
# same run.
#SBATCH --job-name=autodet
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

MAX_RESTARTS=20 # a bound on what a run can cost
PORT=6379       # nodes are the job's own, so no other Ray uses it

if (($# == 0)); then
    echo "usage: sbatch $0 experiments/SCRIPT.py OPTION…" >&2
    exit 2
fi
export PATH="$PWD/.venv/bin:$PATH"

# The token lies in a file that only its owner can read, in a folder of this job that all nodes see. Environments and
# command lines, which others may list, hold the file's name alone.
private="$(umask 077 && mktemp -d "$HOME/.autodet-$SLURM_JOB_ID.XXXXXX")"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$private/token")
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$private/token"

cleanup() {
    ray stop >/dev/null 2>&1 || true
    rm -rf "$private"
}
trap cleanup EXIT

# This shell runs on the first node, which becomes the head. Other networks than the first: set HEAD_ADDRESS.
head="${HEAD_ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}"
size=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
ray start --head --node-ip-address="$head" --port="$PORT" --dashboard-host=127.0.0.1 "${size[@]}"

workers=$((SLURM_JOB_NUM_NODES - 1))
if ((workers > 0)); then
    srun --nodes="$workers" --ntasks="$workers" --ntasks-per-node=1 --relative=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
        ray start --address="$head:$PORT" --block "${size[@]}" &
fi

# In the background, because a shell that waits can be told by a signal. The driver records what is finished and ends
# with code 130; started again, it goes on from there.
python "$@" --address auto --or-resume &
driver=$!
stopped=false
trap 'stopped=true; kill -TERM "$driver" 2>/dev/null || true' TERM
code=0
wait "$driver" || code=$?
if [[ $stopped == true ]]; then # it was the signal that ended the waiting, not the driver
    code=0
    wait "$driver" || code=$?
fi

# Whoever cancels a job sends the same signal; it is no longer running then, and shall not come back.
state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)"
if [[ $stopped == true && $code -ne 0 && $state == RUNNING ]] && ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
    echo "Out of time: the job goes back to the queue."
    cleanup
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
