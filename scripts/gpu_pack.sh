#!/usr/bin/env bash
# Everything that scripts/gpu_check.sh and scripts/gpu_bench.sh run, in one file for a machine with a GPU but without cargo:
# the program, test executables and benches with the `cuda` feature, and what they read.
#
#   scripts/gpu_pack.sh FOLDER [--programs]        writes FOLDER/titan-gpu.tar.xz
#
# --programs leaves out the files, for a machine that has a clone of the repository with these scripts.
#
# There: scripts/gpu_check.sh FOLDER, scripts/gpu_bench.sh FOLDER. Building needs what `cargo build --features cuda` does.
# CUDA_COMPUTE_CAP: that of the other machine's card (90: H100), so that its driver need not compile the kernels.
set -euo pipefail

programs_only=''
[ "${2:-}" != --programs ] || programs_only=1
[ $# = "$((1 + ${programs_only:-0}))" ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
content=$(mktemp -d)
trap 'rm -rf "$content"' EXIT
mkdir "$content/bin"

tests=(golden launches end_to_end)
benches=(train_step gpu_ops)
target_flags=(--bin titan --lib)
for name in "${tests[@]}"; do target_flags+=(--test "$name"); done
for name in "${benches[@]}"; do target_flags+=(--bench "$name"); done

# One line for each executable: kind and name of its target, and where it is. The program is built as itself, not as a test.
built() {
    cargo "$@" --release --features cuda --message-format json |
        sed -n 's/.*"target":{"kind":\["\([a-z]*\)"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\1 \2 \3/p'
}
while read -r kind name path; do
    case $kind in
        lib) name=lib_tests ;;
        bin) name=titan ;;
    esac
    echo "$name: $path" >&2
    strip -o "$content/bin/$name" "$path"
done < <(
    built build --bin titan
    built test --no-run "${target_flags[@]:2}"
)
for name in titan lib_tests "${tests[@]}" "${benches[@]}"; do
    [ -x "$content/bin/$name" ] || { echo "error: $name was not built" >&2; exit 1; }
done

git log -1 --format='%h %cs %s' >"$content/COMMIT" 2>/dev/null || true
if [ -z "$programs_only" ]; then
    # In the repository's layout, which tests find by CARGO_MANIFEST_DIR.
    cp -r configs assets scripts "$content"
    mkdir -p "$content/benches" "$content/tests"
    cp benches/cases.json "$content/benches"
    cp -r tests/golden "$content/tests"
fi

# The programs share most of what they are: a dictionary that reaches back over several of them finds it again.
programs=()
for name in titan lib_tests "${tests[@]}" "${benches[@]}"; do programs+=("bin/$name"); done
tar -C "$content" -c "${programs[@]}" $(cd "$content" && ls -d COMMIT configs assets scripts benches tests 2>/dev/null) |
    xz -T1 --x86 --lzma2=preset=2,dict=256MiB >"$out/titan-gpu.tar.xz"
ls -l "$out/titan-gpu.tar.xz" >&2
