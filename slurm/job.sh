# shellcheck shell=bash
# What the batch files share: the ranks' meeting point, the signals, and whether the job goes back into the queue.
# Sourced on the job's first node, in the folder that sbatch was called in.

set -uo pipefail

RESTARTS=${RESTARTS:-3} # a job that failed goes back into the queue until Slurm has restarted it so many times
STOP_AGAIN=${STOP_AGAIN:-30} # seconds until ranks that were told to stop, and still run, are told once more

refuse() {
    echo "error: $*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_JOB_NUM_NODES:-} && -n ${SLURM_JOB_NODELIST:-} ]] ||
    refuse "this is no Slurm job (SLURM_JOB_ID, SLURM_JOB_NUM_NODES, SLURM_JOB_NODELIST): submit the file with sbatch."

# A task of an array has to be named so: the number of the last one is the number of the whole array, too.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}
restart=${SLURM_RESTART_COUNT:-0}

say() { echo "== $(date +%FT%T) job $job, start $((restart + 1)): $*"; }

# To be read in this order: where we are, what runs here, who meets where.
[[ $# -gt 0 ]] || refuse "no launcher: give one, as in sbatch --nodes 1 slurm/train.sbatch launchers/cifar_mergenet.py."
if [[ -n ${SETUP:-} ]]; then
    set +u # what others have written may use unset variables
    # shellcheck disable=SC1090
    source "$SETUP" || refuse "SETUP=$SETUP cannot be read, or its last command failed."
    set -u
elif [[ -d .venv/bin ]]; then
    PATH=$PWD/.venv/bin:$PATH
fi
read -ra container <<<"${CONTAINER:-}" # words in front of every python, such as: apptainer exec --nv image.sif

# Ranks: as many as tasks were asked for, else one per GPU.
per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
if [[ -z ${SLURM_NTASKS_PER_NODE:-} && ${SLURM_NTASKS:-0} -gt $SLURM_JOB_NUM_NODES ]]; then
    per_node=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    [[ $SLURM_NTASKS -eq $((per_node * SLURM_JOB_NUM_NODES)) ]] ||
        refuse "$SLURM_NTASKS tasks do not divide over $SLURM_JOB_NUM_NODES nodes: give --ntasks-per-node."
fi
world=$((SLURM_JOB_NUM_NODES * per_node))
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[[ ${#hosts[@]} -gt 0 ]] || refuse "scontrol does not tell this job's hosts."
export MASTER_ADDR=${hosts[0]}
# Below the ephemeral ports. Another one for each start: what the last has left behind may hold its port for a minute.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID + restart) % 10000))
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over by itself

launch=("$@")
# It goes on where it was, also if its first start was to begin anew, or from another run's checkpoint.
[[ $restart -eq 0 ]] || launch+=(--resume auto)

# The runs of this command that have no result yet, a line each, with the step of their newest checkpoint. The launcher
# itself says so. The line that counts them shows that it has answered and did not train.
unfinished() {
    local said
    said=$(RANK=0 WORLD_SIZE=$world "${container[@]}" python "${launch[@]}" "$@" --unfinished) || return
    if ! grep -q '^unfinished runs: [0-9]' <<<"$said"; then
        echo "error: ${launch[*]} does not say which of its runs are unfinished: it has to call hetero_kt's main()." >&2
        return 2
    fi
    sed -n 's/^unfinished: //p' <<<"$said"
}

told=""      # USR1: save and go on later. TERM: somebody ends this job, who knows whether it comes back.
reminder=""
tell() {
    scancel --quiet --signal=USR1 "$job"
    while sleep "$STOP_AGAIN"; do scancel --quiet --signal=USR1 "$job"; done # one that comes before they listen is lost
}
trap 'say "USR1: save, then back into the queue"; told=USR1; if [[ -z $reminder ]]; then tell & reminder=$!; disown; fi' USR1
trap 'say "TERM: save, and leave"; told=TERM; scancel --quiet --signal=TERM "$job"' TERM

# Run "$@", the job's step, and decide what becomes of the job. Does not return.
step() {
    local before after status=0 running progress=no
    before=$(unfinished) || exit 2 # a misspelt option costs no start of the ranks, and no requeue
    if [[ -z $before ]]; then
        say "every run is finished: nothing to do"
        exit 0
    fi
    say "$world ranks on ${hosts[*]}, meeting at $MASTER_ADDR:$MASTER_PORT"
    if [[ -z $told ]]; then
        # In the background: bash runs a trap only between commands, and `wait` ends for one.
        "$@" &
        running=$!
        while true; do
            wait "$running"
            status=$?
            kill -0 "$running" 2>/dev/null || break
        done
    fi
    [[ -z $reminder ]] || kill "$reminder" 2>/dev/null
    if ! after=$(unfinished --resume auto); then # the first look has noted what else this start was asked for
        say "the step ended with status $status, and what it has left cannot be read"
        exit 1
    fi
    [[ $after == "$before" ]] || progress=yes
    if [[ -z $after ]]; then
        say "finished, with status $status"
        exit "$status"
    elif [[ $told == TERM ]]; then
        say "ended by TERM, with status $status"
        exit "$status"
    elif [[ $told == USR1 || ($status -eq 0 && $progress == yes) ]]; then
        say "stopped with status $status, back into the queue:"$'\n'"$after"
        again
    elif [[ $status -eq 2 ]]; then # the launcher's complaint about its input: the next start would only repeat it
        say "refused, with status 2"
        exit 2
    elif [[ $restart -lt $RESTARTS ]]; then
        say "failed with status $status, back into the queue (restart $((restart + 1)) of at most $RESTARTS):"$'\n'"$after"
        again
    fi
    say "failed with status $status after $restart restarts: not again"
    exit $((status ? status : 1))
}

again() {
    trap - TERM USR1 # Slurm ends this shell by TERM when it requeues the job
    if ! scontrol requeue "$job"; then
        say "Slurm does not requeue this job: submit it again, and it goes on where it was"
        exit 1
    fi
    sleep 600
}
