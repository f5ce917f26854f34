#!/usr/bin/env bash
# Everything that only a GPU can show, in less than 8 minutes, on a machine that needs no cargo:
#
#   scripts/gpu_check.sh FOLDER [--parts "ops golden ..."] [--logs FOLDER] [--limit SECONDS]
#
# FOLDER holds what scripts/gpu_pack.sh made. A part that fails stops no other; the table at the end says what became of
# each, and the logs have the rest. The exit status is 0 if nothing failed.
#
# TITAN_DEVICE=cpu: a rehearsal, in which the CPU stands in for the GPU.
set -uo pipefail
self=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
. "$(dirname "$self")/gpu_common.sh"

# Part, its time limit in seconds, and what it shows.
PARTS='
device        60 the card, the libraries, one step of training
ops          150 op tests of the library: forward and backward against references, bf16 and f32
golden       120 golden files end to end in f32
launches      60 how many kernels a block launches
end_to_end   150 the program: stop and resume bit for bit, losses of PyTorch in f32 and bf16
curve_cpu    150 200 steps of the debug model in bf16 on the CPU
curve_gpu     90 200 steps of the debug model in bf16 on the GPU
curve         10 the two loss curves side by side
f32_cpu       90 60 steps in f32 on the CPU, with checkpoints
f32_gpu       60 60 steps in f32 on the GPU, with checkpoints
cpu_to_gpu    60 a checkpoint of the CPU resumed on the GPU
gpu_to_cpu    60 a checkpoint of the GPU resumed on the CPU
generation    90 the same greedy text from both
repeat        60 two deterministic runs: losses and checkpoints bit for bit
graphs        60 a recorded step: compile.enable gives the losses of a run without
offload       60 training.enable_cpu_offload gives the losses of a run without
memcheck      90 compute-sanitizer: addresses
racecheck     90 compute-sanitizer: shared memory without a barrier
initcheck     90 compute-sanitizer: memory that nothing has written
'
# Lanes of parts that run beside each other, and what needs their results.
LANES=('ops golden launches memcheck' 'curve_cpu f32_cpu racecheck' 'curve_gpu f32_gpu repeat graphs offload end_to_end initcheck')
LAST='curve cpu_to_gpu gpu_to_cpu generation'

# Curves: the mean over all steps of the relative difference of losses, and the relative difference of the means of the
# last 20. As a scale: runs in bf16 and in f32 on one CPU differ by 0.0033 and 0.0044.
CURVE_MEAN=0.01 CURVE_END=0.01
# In f32, runs from the same checkpoint: the largest relative difference of a step.
RESUMED_MOST=0.002
# A recorded step launches the same kernels; the host's optimizer rounds on its own, which bf16 makes larger.
RECORDED_MOST=0.0001 OFFLOADED_MOST=0.01

now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }'; }
seconds_left() { echo $((deadline - $(date +%s))); }

# ---------------------------------------------------------------------------------------------------------------- parts
# Each runs in a shell of its own, prints into its log, says what it found by `detail`, and succeeds, fails, or passes over
# with status 77.

detail() { echo "$*" | tee "$logs/$part.detail"; }
fail() { detail "$*"; exit 1; }
pass_over() { detail "$*"; exit 77; }

on_gpu() { # command...
    TITAN_DEVICE=$gpu "$@"
}
on_cpu() {
    TITAN_DEVICE=cpu "$@"
}

# The job of the curves: the debug model as it is shipped, in batches of 4 rows, with little validation.
job() {
    cat <<TOML
[job]
dump_folder = "./outputs"
[metrics]
log_freq = 1
[model]
name = "llama4"
flavor = "debugmodel"
hf_assets_path = "$DIR/assets/tokenizer"
[optimizer]
name = "AdamW"
lr = 2e-3
[lr_scheduler]
warmup_steps = 20
decay_type = "cosine"
min_lr_factor = 0.1
[training]
dataset = "c4_test"
local_batch_size = 4
seq_len = 256
steps = 200
max_norm = 1.0
mixed_precision_param = "bfloat16"
[data]
shuffle = true
[checkpoint]
enable = false
[activation_checkpoint]
mode = "none"
[validation]
enable = true
dataset = "c4_validation"
local_batch_size = 4
seq_len = 256
freq = 200
steps = 2
[debug]
seed = 0
TOML
}

# Trains in a folder of its own, so that configs and checkpoints of two runs may be compared as bytes.
train() { # folder, arguments...
    mkdir -p "$work/$1"
    job >"$work/$1/job.toml"
    (cd "$work/$1" && shift && "$titan" train --config job.toml "$@")
}

# "step loss" of every logged step, in full precision.
losses() { # folder
    sed -n 's/^{.*"step":\([0-9]*\),.*"loss":\([-0-9.e+]*\),.*$/\1 \2/p' "$work/$1/outputs/metrics.jsonl" | sort -n -u -k1,1
}

# Of the steps that both runs have: "number, mean and largest relative difference, means of the last 20 of each".
compare() { # folder, folder, [first step]
    join <(losses "$1" | sort -k1,1) <(losses "$2" | sort -k1,1) | sort -n | awk -v first="${3:-1}" '
        $1 < first { next }
        {
            d = ($2 - $3) / $3; d = d < 0 ? -d : d
            n++; sum += d; if (d > most) most = d
            a[n] = $2; b[n] = $3
        }
        END {
            if (!n) exit 1
            last = n < 20 ? n : 20
            for (i = n - last + 1; i <= n; i++) { x += a[i]; y += b[i] }
            end = (x - y) / y
            printf "%d %.3g %.3g %.5f %.5f %.3g\n", n, sum / n, most, x / last, y / last, end < 0 ? -end : end
        }'
}
within() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a <= b) }'; }
last_loss() { losses "$1" | tail -n 1 | cut -d ' ' -f 2; }

# Compares two runs step by step.
agree() { # folder, folder, most, [first step]
    local n mean most a b end
    read -r n mean most a b end < <(compare "$1" "$2" "${4:-1}") || fail "no losses to compare"
    detail "$n steps, largest difference $most, mean $mean (limit $3)"
    within "$most" "$3" || exit 1
}

# Tests, each in a process of its own: one that leaves the GPU unusable spoils no other. After `stop_at` (seconds since
# 1970), if set, none is begun.
run_tests() { # executable, command before it, filters...
    local executable=$1 before=$2 names
    shift 2
    [[ $executable == */* ]] || executable=$DIR/bin/$executable
    mkdir -p "$logs/$part"
    names=$("$executable" --list --format terse 2>/dev/null | sed -n 's/: test$//p')
    [ -n "$names" ] || fail "$executable lists no tests"
    [ $# = 0 ] || names=$(for filter in "$@"; do grep -F -- "$filter" <<<"$names"; done | awk '!seen[$0]++')
    [ -z "${without:-}" ] || names=$(grep -v -- "$without" <<<"$names")
    [ -n "$names" ] || pass_over "no such tests"
    wc -l <<<"$names" >"$logs/$part.planned"
    export executable before part logs
    # shellcheck disable=SC2016
    xargs -P "$at_once" -I {} bash -c '
        name=$1 log=$logs/$part/${1//::/.}.log begin=$(date +%s.%N)
        [ "${begin%.*}" -lt "${stop_at:-9999999999}" ] || exit 0
        left=$((part_ends - ${begin%.*} - 3))
        limit=$((left < test_limit ? left : test_limit))
        RAYON_NUM_THREADS=${threads_of_a_test:-2} timeout --foreground -k 1 "$limit" $before \
            "$executable" --exact "$name" --show-output \
            >"$log" 2>&1
        status=$?
        result="exit $status"
        case $status in
            0) result=ok; grep -q "passing over the GPU" "$log" && result=no_gpu ;;
            124 | 137) result=too_long ;;
            # A sanitizer, of a test that launches nothing.
            255) if grep -q "test result: ok" "$log" && ! grep -q "SUMMARY" "$log"; then result=no_gpu; fi ;;
        esac
        echo "$result $name $(awk -v a="$begin" -v b="$(date +%s.%N)" "BEGIN { printf \"%.1f\", b - a }")" | tee -a "$logs/$part.tests"
    ' _ {} <<<"$names"
    ! grep -qv '^ok ' "$logs/$part.tests"
}

part_device() {
    card || true
    nvcc --version 2>/dev/null | tail -n 2
    cat "$DIR/COMMIT" 2>/dev/null
    local missing
    missing=$(missing_libraries "$titan")
    [ -z "$missing" ] || fail "libraries not found: $missing"
    "$titan" --version || fail "the program does not start"
    echo "LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}"
    on_gpu train first --training.steps 1 --validation.no-enable || fail "one step of training fails"
    local found
    found=$(grep -ho 'Device: .*' "$logs/device.log" | tail -n 1)
    case $gpu$found in cuda*'(cuda:'* | cpu*) ;; *) fail "not on the GPU: $found" ;; esac
    detail "${found#Device: }"
}

part_ops() { run_tests lib_tests "" ops::; }
part_golden() { run_tests golden ""; }
part_launches() {
    [ "$gpu" != cpu ] || pass_over "needs a GPU"
    run_tests launches "" || return
    detail "$(grep -h 'block launches' "$logs/$part"/*.log)"
}
part_end_to_end() {
    TITAN_DEVICE=$gpu threads_of_a_test=4 run_tests end_to_end "" stopped_and_killed recomputation_and_checkpoints \
        every_precision a_checkpoint_is_all golden_losses four_hundred_steps
}

part_curve_cpu() {
    RAYON_NUM_THREADS=$half on_cpu train curve_cpu || fail "training fails"
    detail "last loss $(last_loss curve_cpu)"
}
part_curve_gpu() {
    on_gpu train curve_gpu || fail "training fails"
    detail "last loss $(last_loss curve_gpu)"
}
part_curve() {
    local n mean most a b end
    read -r n mean most a b end < <(compare curve_gpu curve_cpu) || fail "no losses to compare"
    detail "$n steps: mean difference $mean (limit $CURVE_MEAN), largest $most; last 20: $a, CPU $b: $end (limit $CURVE_END)"
    join <(losses curve_gpu | sort -k1,1) <(losses curve_cpu | sort -k1,1) | sort -n | awk '$1 <= 5 || $1 % 20 == 0'
    [ "$n" = 200 ] && within "$mean" "$CURVE_MEAN" && within "$end" "$CURVE_END"
}

f32=(--training.mixed_precision_param float32 --training.local_batch_size 2 --training.steps 60 --validation.no-enable
    --checkpoint.enable --checkpoint.interval 30)
part_f32_cpu() {
    RAYON_NUM_THREADS=$half on_cpu train f32_cpu "${f32[@]}" || fail "training fails"
    detail "last loss $(last_loss f32_cpu)"
}
part_f32_gpu() {
    on_gpu train f32_gpu "${f32[@]}" || fail "training fails"
    detail "last loss $(last_loss f32_gpu)"
}
# A run from the middle of another.
resumed() { # from folder, new folder
    mkdir -p "$work/$2/outputs/checkpoint"
    cp -r "$work/$1/outputs/checkpoint/step-30" "$work/$2/outputs/checkpoint/" || fail "$1 left no step-30"
}
part_cpu_to_gpu() {
    resumed f32_cpu cpu_to_gpu
    on_gpu train cpu_to_gpu "${f32[@]}" || fail "training fails"
    agree cpu_to_gpu f32_cpu "$RESUMED_MOST" 31
}
part_gpu_to_cpu() {
    resumed f32_gpu gpu_to_cpu
    on_cpu train gpu_to_cpu "${f32[@]}" || fail "training fails"
    agree gpu_to_cpu f32_gpu "$RESUMED_MOST" 31
}
part_generation() {
    local device arguments=(generate --checkpoint "$work/f32_cpu/outputs/checkpoint/step-60" --temperature 0 --max-new-tokens 100
        --prompt "Once upon a time" --prompt "Tom and his dog went to the")
    for device in cpu gpu; do
        "on_$device" "$titan" "${arguments[@]}" >"$work/text.$device" 2>"$work/text.$device.log" || {
            cat "$work/text.$device.log"
            fail "generation on the $device fails"
        }
    done
    cat "$work/text.cpu"
    cmp "$work/text.cpu" "$work/text.gpu" || {
        cat "$work/text.gpu"
        fail "the texts differ: $(cmp "$work/text.cpu" "$work/text.gpu" 2>&1)"
    }
    detail "$(wc -c <"$work/text.gpu") bytes of text are the same"
}

deterministic=(--debug.deterministic --training.steps 40 --validation.no-enable --checkpoint.enable --checkpoint.interval 40)
part_repeat() {
    on_gpu train repeat_1 "${deterministic[@]}" && on_gpu train repeat_2 "${deterministic[@]}" || fail "training fails"
    local n
    n=$(losses repeat_1 | wc -l)
    [ "$n" = 40 ] || fail "$n steps are logged, not 40"
    cmp <(losses repeat_1) <(losses repeat_2) || fail "losses differ: $(compare repeat_1 repeat_2)"
    diff -r "$work/repeat_1/outputs/checkpoint" "$work/repeat_2/outputs/checkpoint" || fail "losses agree, checkpoints do not"
    detail "$n losses and $(du -sk "$work/repeat_1/outputs/checkpoint" | cut -f 1) KiB of checkpoint agree bit for bit"
}
# Beside the first run of `repeat`, which is there already.
part_graphs() {
    on_gpu train graphs "${deterministic[@]}" --compile.enable || fail "training fails"
    grep -i 'graph\|record' "$logs/$part.log" | head -n 3
    agree graphs repeat_1 "$RECORDED_MOST"
}
part_offload() {
    if ! on_gpu train offload "${deterministic[@]}" --training.enable_cpu_offload; then
        ! grep -q 'enable_cpu_offload' "$logs/$part.log" || pass_over "the key is refused"
        fail "training fails"
    fi
    agree offload repeat_1 "$OFFLOADED_MOST"
}

# Sanitizers slow kernels down by far: as many tests as get done in time, the kernels that are most intricate first.
sanitize() { # tool, arguments...
    local tool=$1 sanitizer
    shift
    for sanitizer in "$(command -v compute-sanitizer)" "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
        /usr/local/cuda*/bin/compute-sanitizer; do
        [ -x "$sanitizer" ] && break
    done
    [ -x "$sanitizer" ] || pass_over "there is no compute-sanitizer"
    [ "$gpu" != cpu ] || pass_over "needs a GPU"
    export stop_at=$((part_ends - 25))
    # By a name of its own, so that what it leaves behind can be told from others' tests.
    ln -sf "$DIR/bin/lib_tests" "$work/${tool}_tests"
    without='::cpu::\|::host::\|::tiles\|::rows::\|thread' run_tests "$work/${tool}_tests" \
        "$sanitizer --tool $tool --error-exitcode 9 --report-api-errors no --print-limit 10 $*" \
        ops::attention ops::moe ops::sort ops::cross_entropy ops::rms_norm ops::embedding ops::adamw ops::
    # What took too long, or was not reached, has not failed.
    ! grep -q '^exit ' "$logs/$part.tests"
    local status=$?
    if grep -rlq 'Device not supported' "$logs/$part"; then pass_over "compute-sanitizer refuses this device"; fi
    return $status
}
part_memcheck() { sanitize memcheck --leak-check no; }
part_racecheck() { sanitize racecheck; }
part_initcheck() { sanitize initcheck; }

# ------------------------------------------------------------------------------------------------------------ the rest

if [ "${1:-}" = --part ]; then
    part=$2
    "part_$part"
    exit
fi

# Runs a part within its limit and what is left of the whole, and writes its row of the table.
run_part() { # name
    local name=$1 limit left begin status result detail=''
    limit=$(awk -v name="$name" '$1 == name { print $2 }' <<<"$PARTS")
    left=$(seconds_left)
    begin=$(now)
    if [ "$left" -lt 3 ]; then
        status=-1 result='not run'
    else
        limit=$((limit < left ? limit : left))
        part_ends=$(($(date +%s) + limit)) timeout -k 5 "$limit" bash "$self" --part "$name" >"$logs/$name.log" 2>&1
        status=$?
        # What a sanitizer ran may outlive it, and would slow down all that comes after.
        case $name in *check) pkill -KILL -f "$work/${name}_tests" ;; esac
        case $status in
            0) result=passed ;;
            77) result='passed over' ;;
            124 | 137) result='too long' ;;
            *) result=FAILED ;;
        esac
    fi
    [ ! -e "$logs/$name.detail" ] || detail=$(tail -n 1 "$logs/$name.detail")
    if [ -z "$detail" ] && [ -e "$logs/$name.planned" ]; then
        detail=$(awk -v planned="$(cat "$logs/$name.planned")" '
            { n[$1 == "ok" ? "ok" : $1 == "too_long" ? "too long" : $1 == "no_gpu" ? "without the GPU" : "failed"]++ }
            END {
                printf "%d of %d tests passed", n["ok"], planned
                for (what in n) if (what != "ok") printf ", %d %s", n[what], what
                if (NR < planned) printf ", %d not reached", planned - NR
            }' "$logs/$name.tests" 2>/dev/null)
    fi
    [ -n "$detail" ] || { [ "$result" = FAILED ] && detail=$(grep -v '^ *$' "$logs/$name.log" | tail -n 1 | cut -c 1-150); }
    # A test that passed without the GPU shows nothing; that is all there is to a rehearsal on the CPU.
    if [ "$result" = FAILED ] && [ "$gpu" = cpu ] && ! grep -qv '^ok \|^no_gpu ' "$logs/$name.tests" 2>/dev/null &&
        [ -e "$logs/$name.tests" ]; then
        result=passed
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$result" "$(since "$begin")" "$detail" >"$logs/$name.row"
    echo "$(date +%T) $(tr '\t' ' ' <"$logs/$name.row")"
}

table() {
    trap - EXIT INT TERM
    local name
    for name in $parts; do
        [ "$(cut -f 2 "$logs/$name.row" 2>/dev/null)" = FAILED ] || continue
        echo
        echo "--- $name: what failed"
        if [ -e "$logs/$name.tests" ]; then
            grep -v '^ok \|^no_gpu ' "$logs/$name.tests" | head -n 12 | while read -r result test seconds; do
                echo "$test: $result after $seconds s"
                grep -h -A 3 'panicked at\|^========= [A-Z][a-z]' "$logs/$name/${test//::/.}.log" | cut -c 1-200 | head -n 5
            done
        else
            grep -v '^ *$' "$logs/$name.log" | tail -n 6 | cut -c 1-200
        fi
    done
    {
        echo
        echo "titan on $(card || uname -n), $(date +%F), $(since "$started") s; $(cat "$DIR/COMMIT" 2>/dev/null)"
        echo
        echo '| part | result | seconds | detail |'
        echo '| --- | --- | --- | --- |'
        for name in $parts; do
            if [ -e "$logs/$name.row" ]; then
                awk -F '\t' '{ printf "| %s | %s | %s | %s |\n", $1, $2, $3, $4 }' "$logs/$name.row"
            else
                echo "| $name | not run | | |"
            fi
        done
    } | tee "$logs/table.md"
    # What is left of a run that was interrupted.
    kill $(jobs -p) 2>/dev/null
    ! grep -q '| FAILED |\|| too long |\|| not run |' "$logs/table.md"
}

folder='' parts='' logs='' limit=450
while [ $# -gt 0 ]; do
    case $1 in
        --parts | --logs | --limit) declare "${1#--}=${2:?$1 needs a value}" && shift 2 ;;
        -*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$self" >&2 && exit 2 ;;
        *) folder=$1 && shift ;;
    esac
done
started=$(now)
deadline=$(($(date +%s) + limit))
all=$(awk 'NF { print $1 }' <<<"$PARTS")
parts=${parts:-$all}
for name in $parts; do
    grep -qx "$name" <<<"$all" || { echo "error: there is no part $name; there are: "$all >&2; exit 2; }
done
DIR=$(unpack "$folder") || { echo "error: no titan-gpu.tar.xz in ${folder:-.}: scripts/gpu_pack.sh makes it" >&2; exit 2; }
titan=$DIR/bin/titan
find_libraries "$titan"
logs=${logs:-$PWD/gpu_check_logs}
rm -rf "$logs" && mkdir -p "$logs" || exit 2
logs=$(cd "$logs" && pwd)
work=$(mktemp -d)
gpu=${TITAN_DEVICE:-cuda:0}
cores=$(nproc)
half=$((cores > 3 ? cores / 2 : 1))
at_once=${AT_ONCE:-$half}
test_limit=${TEST_LIMIT:-100}
# Tests find the repository and the program by what cargo would set.
export CARGO_MANIFEST_DIR=$DIR CARGO_BIN_EXE_titan=$titan
# Kernels that the driver has compiled once are found by every later process.
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$work/compiled} CUDA_CACHE_MAXSIZE=${CUDA_CACHE_MAXSIZE:-4294967295}
export RUST_BACKTRACE=0 NO_COLOR=1
unset TITAN_DEVICE
export DIR titan logs work gpu half at_once test_limit deadline
trap table EXIT
trap 'exit 130' INT TERM

wanted() { grep -qw "$1" <<<"$parts"; }
echo "$(date +%T) in $DIR, logs in $logs, at most $limit s"
run_part device
# A GPU that was found and does not train is worth the other parts.
if [ "$(cut -f 2 "$logs/device.row")" != passed ] && ! grep -q 'Device: .*(cuda:' "$logs/device.log"; then
    tail -n 5 "$logs/device.log"
    echo "nothing else can run without a device"
    exit 1
fi
for lane in "${LANES[@]}"; do
    for name in $lane; do ! wanted "$name" || run_part "$name"; done &
done
wait
for name in $LAST; do ! wanted "$name" || run_part "$name"; done
