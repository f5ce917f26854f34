#!/usr/bin/env bash
# titan beside PyTorch on this machine: whole training steps of the same cases (benches/cases.json), in turn, and one
# table of their medians. titan's bf16 stands beside the best of PyTorch's ways, its f32 beside PyTorch's best f32.
#
#   PYTHON=venv/bin/python scripts/bench_compare.sh [--cases "A B"] [--rounds 3] [--steps 3] [--threads N] [--ways "..."]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
cases="A B" rounds=3 steps=3 threads=$(nproc) ways="f32-eager f32-compile bf16-eager bf16-compile"
while [ $# -gt 0 ]; do
    case $1 in
        --cases | --rounds | --steps | --threads | --ways) declare "${1#--}=${2:?$1 needs a value}" && shift 2 ;;
        *) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
    esac
done
"$python" -c "import torch" 2>/dev/null || {
    echo "error: $python cannot import torch; install PyTorch (pip install torch) or name another interpreter in PYTHON" >&2
    exit 2
}
# torch.compile takes minutes; later rounds find what the first compiled.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/target/torchinductor}

titan() { cargo bench --quiet --bench train_step -- --json --steps "$steps" --threads "$threads" "$@"; }
pytorch() { "$python" scripts/bench_pytorch.py "$@"; }
say() { echo "$(date +%T) $*" >&2; }

results=$(mktemp)
trap 'rm -f "$results"' EXIT
declare -A ways_of
cargo bench --quiet --no-run --bench train_step
for round in $(seq "$rounds"); do
    for case in $cases; do
        for way in ${ways_of[$case]:-$ways}; do
            dtype=$([[ $way == f32* ]] && echo float32 || echo bfloat16)
            say "round $round, case $case, titan in $dtype"
            titan --case "$case" --param-dtype "$dtype" >>"$results"
            say "round $round, case $case, PyTorch $way"
            pytorch --case "$case" --way "$way" --steps "$steps" --threads "$threads" >>"$results"
        done
        # The slower ways have lost after one round.
        ways_of[$case]=$(pytorch --case "$case" --fastest "$results")
    done
done
echo "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), $(date +%F)"
pytorch --table "$results"
