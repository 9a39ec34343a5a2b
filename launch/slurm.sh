# Functions of the batch script that `vlmr1 submit` writes (launch/train.sbatch.j2), which sources this file. Its run's
# directory is $RUN_DIR, its code and config are in $SNAPSHOT, its attempt's logs in $VLMR1_LOG_DIR.
# shellcheck shell=bash

unset RANK WORLD_SIZE LOCAL_RANK VLMR1_INIT_METHOD # whoever submitted may have been a rank, too

say() { echo "vlmr1: $*"; }

# ask WORDS…: scontrol WORDS…, and again where that fails, once a controller that was away answers.
ask() {
    local tries=0
    until scontrol "$@"; do
        ((++tries < 5)) || return
        say "scontrol $1 failed; again when SLURM answers" >&2
        sleep 5
        timeout 600 bash -c 'until scontrol ping; do sleep 5; done' >/dev/null
    done
}

# fact NAME: what SLURM has under that name about this job; nothing where it has forgotten it.
fact() { ask show job -o "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }

# end_time: of the job, in seconds since 1970, where it has one.
end_time() {
    local end
    end=$(fact EndTime)
    [[ $end != [0-9]* ]] || date -d "$end" +%s
}

# code DIRECTORY: the exit code in the outcome of an attempt, if it has one.
code() { sed -n 's/.*"code":\([0-9]*\).*/\1/p' "$1/outcome.json" 2>/dev/null; }

# address NODE: its name, or what SLURM has where that does not resolve.
address() {
    if getent hosts "$1" >/dev/null; then
        echo "$1"
    else
        ask show node -o "$1" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/'
    fi
}

# Whether an earlier attempt ran this very snapshot: this is a requeued job, or a later one of a chain.
goes_on() { [ "$(cat "$RUN_DIR/logs/latest/snapshot" 2>/dev/null)" = "$SNAPSHOT" ]; }

# Ends the job where an earlier one of the chain has finished the run or given it up.
end_if_over() {
    local latest=$RUN_DIR/logs/latest code
    code=$(code "$latest")
    if goes_on && [[ $code =~ ^(0|2|17)$ ]]; then
        say "nothing to do after $(readlink "$latest"): $(cat "$latest/outcome.json")"
        exit "$code"
    fi
}

# new_attempt LOGS: makes and prints the directory of this attempt, LOGS/attempt_K; LOGS/latest is a link to it.
new_attempt() {
    local logs=$1 last path
    last=$(find "$logs" -maxdepth 1 -name 'attempt_*' | sed -n 's/.*attempt_\([0-9][0-9]*\)$/\1/p' | sort -n | tail -n 1)
    path=$logs/attempt_$((${last:+10#$last + 1} + 0))
    mkdir "$path" && ln -sfn "${path##*/}" "$logs/latest" && echo "$SNAPSHOT" >"$path/snapshot" && echo "$path"
}

# Kills what is left five seconds after a rank has crashed. SLURM sends SIGTERM, on which ranks save, and KILL only after
# KillWait, half a minute or more, with every other signal kept back meanwhile: so a step of our own does it.
end_the_rest() {
    until grep ': tasks\?[ :]' "$VLMR1_LOG_DIR/srun.log" 2>/dev/null | grep -qvE 'code (2|17|85)$'; do sleep 1; done
    sleep 5
    # shellcheck disable=SC2016,SC2046 # each node's own shell expands it; names of nodes
    on_nodes $(scontrol show hostnames "$SLURM_JOB_NODELIST") -- bash -c '
        ours=$(grep -lz "^VLMR1_RANKS=$SLURM_JOB_ID$" /proc/[0-9]*/environ 2>/dev/null)
        grep -lz "^SLURM_STEP_ID=" $ours | cut -d / -f 3 | xargs -r kill -KILL'
}

# on_nodes NODE… -- COMMAND…: runs it once on each node, beside the ranks, for five seconds at most. Without --mem=0 it
# would wait for memory of its own, of which the ranks have all.
on_nodes() {
    local nodes=()
    while [ "$1" != -- ]; do
        nodes+=("$1") && shift
    done
    timeout --kill-after=1 5 srun --overlap --mem=0 --gres=none --nodes=${#nodes[@]} --ntasks=${#nodes[@]} --ntasks-per-node=1 \
        --cpus-per-task=1 --nodelist="$(IFS=, && echo "${nodes[*]}")" "${@:2}" &>/dev/null
}

# conclude STATUS: decides by outcome.json what follows srun, whose status says too little: 143 once one rank has left.
conclude() {
    local code
    # shellcheck disable=SC2046 # numbers
    kill $(jobs -p) 2>/dev/null
    code=$(code "$VLMR1_LOG_DIR")
    cat "$VLMR1_LOG_DIR/srun.log"
    [ -z "$code" ] || say "$(cat "$VLMR1_LOG_DIR/outcome.json")"
    [[ $code =~ ^(0|2|17)$ ]] && exit "$code"
    [ "$(fact JobState)" = RUNNING ] || exit "${code:-$1}" # cancelled, or SLURM requeues it by itself
    [ "$code" != 85 ] || requeue
    fail "$1" "$code"
}

# Gives the job back to the queue; without the nodes that it found bad, which the run remembers.
requeue() {
    local bad former tries=0
    bad=$(grep -xE '[A-Za-z0-9_.-]+' "$VLMR1_LOG_DIR/bad_nodes" 2>/dev/null | sort -u | paste -sd ,)
    if [ -z "$bad" ]; then
        trap 'exit 85' TERM # which a requeued job gets, and one that is cancelled while this waits for SLURM
        ask requeue "$SLURM_JOB_ID"
        exit 85
    fi
    say "without $bad from now on"
    tr , '\n' <<<"$bad" >>"$RUN_DIR/bad_nodes"
    former=$(fact ExcNodeList | sed 's/(null)//')
    trap '' TERM # which comes at once when the job is requeued, to scontrol, too
    ask requeuehold "$SLURM_JOB_ID" # what is excluded can be changed only while a job is pending
    until scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$bad${former:+,$former}" || ((++tries == 10)); do sleep 1; done
    ask release "$SLURM_JOB_ID"
    exit 85
}

# fail STATUS CODE: names the rank that was the first to go, and waits for SLURM where it was a node.
fail() {
    local who lost=""
    who=$(first_to_go)
    say "${who:=srun ended with $1, and no rank has said why}; logs in $VLMR1_LOG_DIR"
    # shellcheck disable=SC2046 # names of nodes
    on_nodes $(scontrol show hostnames "$SLURM_JOB_NODELIST") -- true || lost=$(lost_nodes)
    if [ -n "$lost" ]; then
        say "no answer from $lost: SLURM requeues this job as soon as it sees that too"
        sleep 900 || exit 70 # by the end that SLURM makes of it
    fi
    if [ -z "$2" ]; then
        printf '{"reason":"%s","code":70,"step":null}\n' "${who//[\"\\]/}" >"$VLMR1_LOG_DIR/outcome.json"
    fi
    exit "${2:-70}"
}

# Prints "rank 3 on n2 was killed (Killed)" or "rank 3 on n2 left with exit code 70", if srun has said so.
first_to_go() {
    sed -nE 's/^srun: error: ([^:]+): tasks? ?([^:]+): Exited (with .*)/rank \2 on \1 left \3/p; t
        s/^srun: error: ([^:]+): tasks? ?([^:]+): (.*)/rank \2 on \1 was killed (\3)/p' "$VLMR1_LOG_DIR/srun.log" |
        head -n 1
}

# Prints the nodes of the job that do not start a task any more.
lost_nodes() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        (on_nodes "$node" -- true || echo "$node") &
    done
    wait
}
