#!/usr/bin/env bash
# Builds libraries with the names of CUDA's, on which a build with the `cuda` feature runs its kernels on the CPU, to test
# them where no GPU is:
#
#   eval "$(scripts/emulated_gpu.sh)"              build if needed, then set LD_LIBRARY_PATH
#   cargo test --release --features cuda --lib ops::
#
#   scripts/emulated_gpu.sh FOLDER                 build into FOLDER; default: target/emulated_gpu
#   scripts/emulated_gpu.sh --races [FOLDER]       find accesses that nothing orders, and reads of device or shared memory that
#                                                  nothing has written; slower. Default: target/emulated_gpu_races
#   scripts/emulated_gpu.sh --self-test ...        also hold the emulated GPU to plain computations
#
# Standard output holds `export` lines and nothing else. What changed is compiled again. TITAN_EMULATED_ORDER says which
# thread goes on where several can: forward (the default), backward, random or random:SEED; results that differ between orders
# come from threads that do not wait for each other. TITAN_EMULATED_CAPABILITY=86: a GPU of compute capability 8.6, with as much
# shared memory; the default is 90. TITAN_EMULATED_GPUS=0: there is no GPU after all.
#
# A kernel that does what a GPU would not allow, or not answer for, ends the process and says where it was.
#
# Needs g++ and awk, and cargo for the lists of functions in cudarc's sources. CXX: another compiler.
set -euo pipefail

# Library, the name that CUDA 13 gives it, cudarc's list of its functions, and our sources.
LIBRARIES='
cuda     libcuda.so.1      driver   machine memory races driver
cublasLt libcublasLt.so.13 cublaslt cublaslt
cublas   libcublas.so.13   cublas   cublas
curand   libcurand.so.10   curand   curand
nvrtc    libnvrtc.so.13    nvrtc
'

root=$(cd "$(dirname "$0")/.." && pwd)
emulator=$root/tests/emulated_gpu
self_test='' name=emulated_gpu races=()
while :; do
    case "${1:-}" in
    --self-test) self_test=yes ;;
    --races) name=emulated_gpu_races races=(-fsanitize=thread --param tsan-instrument-func-entry-exit=0) ;;
    *) break ;;
    esac
    shift
done
folder=${1:-${CARGO_TARGET_DIR:-$root/target}/$name}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
# One at a time.
exec 9>"$folder/.lock"
flock 9
CXX=${CXX:-g++}

die() { printf 'emulated_gpu: %s\n' "$*" >&2; exit 1; }

# Kernels read numbers as other types, as nvcc allows. Misaligned addresses and indices outside of arrays trap, and calls
# return to where they come from, so that faults have places.
flags=(-std=c++17 -O2 -g1 -fPIC -march=native -fno-strict-aliasing -fno-gnu-unique -ftls-model=initial-exec -I "$emulator")
kernel_flags=(-x c++ -DTITAN_EMULATE -I "$root/src/ops" -fvisibility=hidden -fno-exceptions -fno-optimize-sibling-calls
    -Wno-unknown-pragmas -fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error "${races[@]}")

version=$(grep -A1 '^name = "cudarc"' "$root/Cargo.lock" | sed -n 's/^version = "\(.*\)"/\1/p')
find_cudarc() { cudarc=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-"$version"/src 2>/dev/null | tail -n 1); }
find_cudarc
if [ -z "$cudarc" ]; then
    cargo fetch --locked --manifest-path "$root/Cargo.toml" >&2
    find_cudarc
    [ -n "$cudarc" ] || die "cargo has fetched cudarc $version, but its sources are not in the registry's folder"
fi

# Commands that must run, one a line: as many at once as there are cores.
compile=''
is_newer() { # output, sources...
    local output=$1 source
    shift
    [ -e "$output" ] || return 0
    for source in "$@"; do if [ "$source" -nt "$output" ]; then return 0; fi; done
    return 1
}
add() { compile+="$(printf '%q ' "$@")"$'\n'; }
run_all() {
    printf '%s' "$compile" | tr '\n' '\0' | xargs -0 -r -n 1 -P "$(getconf _NPROCESSORS_ONLN)" bash -c >&2 ||
        die "the emulated GPU does not compile"
    compile=''
}

# Each function of a library, returning 34, which is an error to all of them; ours come before these.
while read -r library soname list sources; do
    [ -n "$library" ] || continue
    stubs=$folder/$library.stubs.c
    if is_newer "$stubs" "$0" "$cudarc/$list/sys/mod.rs"; then
        awk '
            !/^pub unsafe fn [A-Za-z0-9_]+\(/ { next }
            { name = $4; sub(/\(.*/, "", name) }
            name ~ /^(culib|is_culib_present)$/ || seen[name]++ { next }
            { print "__attribute__((weak)) " (/-> \*const ::core::ffi::c_char/ ? "const char *" name "(void) { return \"not emulated\"; }" : "int " name "(void) { return 34; }") }
        ' "$cudarc/$list/sys/mod.rs" >"$stubs"
        [ -s "$stubs" ] || die "no functions in $cudarc/$list"
    fi
    if is_newer "${stubs%.c}.o" "$stubs"; then add "$CXX" -x c -w -fno-builtin -fPIC -O1 -c "$stubs" -o "${stubs%.c}.o"; fi
    for source in $sources; do
        object=$folder/$source.o
        if is_newer "$object" "$0" "$emulator/$source.cpp" "$emulator"/*.h; then
            add "$CXX" "${flags[@]}" -O3 -c "$emulator/$source.cpp" -o "$object"
        fi
    done
done <<<"$LIBRARIES"

# Each op's kernels are a library of their own: what it calls its functions, and where its static shared memory is, is
# nobody else's matter.
ops=()
for source in "$emulator/candle.cu" "$root"/src/ops/*/kernel.cu "$root"/src/ops/*/hopper.cu; do
    [ -e "$source" ] || continue
    op=$(basename "${source%/kernel.cu}" .cu)
    [ "$op" != hopper ] || op=$(basename "$(dirname "$source")")_hopper
    ops+=("$op")
    object=$folder/op.$op.o
    if is_newer "$object" "$0" "$source" "$emulator/emulate.h" "$root"/src/ops/*.cuh "$(dirname "$source")"/*.cuh; then
        add "$CXX" "${flags[@]}" "${kernel_flags[@]}" -c "$source" -o "$object"
    fi
done

if [ "$self_test" ]; then
    if is_newer "$folder/self_test.kernels.o" "$0" "$emulator/self_test.cu" "$emulator/emulate.h" "$root"/src/ops/*.cuh; then
        add "$CXX" "${flags[@]}" "${kernel_flags[@]}" -c "$emulator/self_test.cu" -o "$folder/self_test.kernels.o"
    fi
    if is_newer "$folder/self_test.o" "$0" "$emulator/self_test.cpp" "$emulator"/*.h; then
        add "$CXX" "${flags[@]}" -c "$emulator/self_test.cpp" -o "$folder/self_test.o"
    fi
fi
run_all

needed=()
for op in "${ops[@]}"; do
    library=$folder/libtitan_op_$op.so
    if is_newer "$library" "$folder/op.$op.o"; then
        add "$CXX" -shared -Wl,-soname,"$(basename "$library")" -o "$library" "$folder/op.$op.o"
    fi
    needed+=("$library")
done
run_all

while read -r library soname list sources; do
    [ -n "$library" ] || continue
    objects=("$folder/$library.stubs.o")
    for source in $sources; do objects+=("$folder/$source.o"); done
    links=()
    case $library in
    cuda) links=(-Wl,--no-as-needed "${needed[@]}" -ldl -lpthread) ;;
    cublasLt) links=("$folder/libcuda.so.1") ;;
    cublas) links=("$folder/libcublasLt.so.13" "$folder/libcuda.so.1") ;;
    esac
    # The list of ops may have changed, if nothing else has.
    if [ "$library" = cuda ] || is_newer "$folder/$soname" "${objects[@]}"; then
        "$CXX" -shared -Wl,-soname,"$soname" -Wl,-rpath,'$ORIGIN' -o "$folder/$soname.new" "${objects[@]}" "${links[@]}" >&2
        mv "$folder/$soname.new" "$folder/$soname"
        ln -sf "$soname" "$folder/lib$library.so"
    fi
done <<<"$LIBRARIES"

if [ "$self_test" ]; then
    "$CXX" -shared -o "$folder/libself_test.so" "$folder/self_test.kernels.o" >&2
    "$CXX" -o "$folder/self_test" "$folder/self_test.o" -Wl,--no-as-needed "$folder/libself_test.so" \
        "$folder/libcublasLt.so.13" "$folder/libcuda.so.1" -Wl,-rpath,'$ORIGIN' >&2
    "$folder/self_test" >&2
fi

printf 'export LD_LIBRARY_PATH=%q${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}\n' "$folder"
