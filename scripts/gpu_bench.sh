#!/usr/bin/env bash
# Whole training steps of titan and of PyTorch on this machine's GPU, in turn: the cases of benches/cases.json that are meant
# for one, and one table. Needs no cargo, and PyTorch only for its half.
#
#   scripts/gpu_bench.sh FOLDER [--cases "debug 1B ..."] [--titan-only] [--ways bf16-eager,bf16-compile] [--steps 20]
#                               [--rounds 1] [--results FILE] [--limit SECONDS] [--case-limit SECONDS]
#
# FOLDER holds what scripts/gpu_pack.sh made. Results, a line of JSON each, are appended to FILE; the table is made of all
# that it holds. After `limit` seconds nothing new is begun. PYTHON: an interpreter that has PyTorch.
#
# TITAN_DEVICE=cpu: a rehearsal on the CPU, without PyTorch.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/gpu_common.sh"

# The ones that say most come first, as time may be short.
cases="colab debug 124M 1B moe" ways=bf16-eager,bf16-compile steps='' rounds=1 results=gpu_bench.jsonl limit=520 case_limit=150
folder='' titan_only=''
while [ $# -gt 0 ]; do
    case $1 in
        --titan-only) titan_only=1 && shift ;;
        --cases | --ways | --steps | --rounds | --results | --limit | --case-limit)
            name=${1#--}
            declare "${name//-/_}=${2:?$1 needs a value}" && shift 2
            ;;
        -*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
        *) folder=$1 && shift ;;
    esac
done
DIR=$(unpack "$folder") || { echo "error: no titan-gpu.tar.xz in ${folder:-.}: scripts/gpu_pack.sh makes it" >&2; exit 2; }
python=${PYTHON:-python3}
# Steps whose launches are made one by one, and those that are recorded once.
titan_ways='launched recorded'
if [ "${TITAN_DEVICE:-}" = cpu ]; then titan_only=1 titan_ways=launched; fi
find_libraries "$DIR/bin/train_step"
# What is compiled once, by the driver or by PyTorch, is found by later processes.
caches=${TMPDIR:-/tmp}/titan-gpu-caches
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$caches/driver} CUDA_CACHE_MAXSIZE=${CUDA_CACHE_MAXSIZE:-4294967295}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
export RUST_BACKTRACE=0
touch "$results" || exit 2
begin=$SECONDS
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

say() { echo "$(date +%T) $*" >&2; }

# Runs a program that prints lines of JSON, which are shown in short and appended to the results. What fails is a line, too.
measure() { # program, case, command...
    local program=$1 case=$2 left line n=0 status
    shift 2
    left=$((limit - (SECONDS - begin)))
    if [ "$left" -lt 10 ]; then
        say "$program $case: not run, no time is left"
        return
    fi
    while read -r line; do
        if [[ $line != '{'* ]]; then
            [[ $line != 'exit '* ]] || status=${line#exit }
            continue
        fi
        n=$((n + 1))
        echo "$line" >>"$results"
        say "$(sed 's/[{}"]//g' <<<"$line" | tr ',' '\n' | grep -E '^ ?(program|case|way|tps|step_s|error|first_loss|last_loss|warm_up_s):' |
            sed -E 's/^ ?//; s/([0-9]\.[0-9]{4})[0-9]*/\1/' | paste -sd ' ')"
    done < <(
        timeout -k 5 "$((case_limit < left ? case_limit : left))" "$@" 2>"$errors"
        echo "exit $?"
    )
    [ "${status:-1}" != 0 ] || return 0
    local why
    case ${status:-} in
        124 | 137) why="takes more than $((case_limit < left ? case_limit : left)) s" ;;
        *) why=$(grep -h -A 1 'panicked\|^error\|Error' "$errors" | grep -v 'panicked\|^-*$' | head -n 1 | tr -d '"\\' | cut -c 1-200) ;;
    esac
    say "$program $case: ${why:-exit ${status:-?}}"
    tail -n 5 "$errors" | cut -c 1-300 >&2
    echo "{\"program\":\"$program\",\"case\":\"$case\",\"way\":\"$n lines before\",\"error\":\"${why:-exit ${status:-?}}\"}" >>"$results"
}

say "$(card || uname -n); $(cat "$DIR/COMMIT" 2>/dev/null)"
for round in $(seq "$rounds"); do
    for case in $cases; do
        for way in $titan_ways; do
            measure titan "$case" "$DIR/bin/train_step" --bench --json --case "$case" --param-dtype bfloat16 \
                ${steps:+--steps "$steps"} $([ "$way" = launched ] || echo "--$way")
        done
        [ -n "$titan_only" ] ||
            measure PyTorch "$case" "$python" "$here/bench_pytorch.py" --device cuda --case "$case" --way "$ways" ${steps:+--steps "$steps"}
    done
done
say "$((SECONDS - begin)) s"
echo
echo "$(card || uname -n), $(date +%F)"
"$python" "$here/gpu_table.py" "$results" || cat "$results"
