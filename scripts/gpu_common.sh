# What gpu_check.sh and gpu_bench.sh share: where the program and its tests are, and CUDA's libraries.

# The folder that has bin/ and the files it reads: FOLDER itself, or what FOLDER/titan-gpu.tar.xz holds. Files that are not
# there come from the repository of this script.
unpack() { # folder
    local folder=${1:-.} unpacked
    folder=$(cd "$folder" && pwd) || return 1
    if [ -x "$folder/bin/titan" ]; then
        echo "$folder"
        return
    fi
    unpacked=${TMPDIR:-/tmp}/titan-gpu.$(cksum <"$folder/titan-gpu.tar.xz" | tr ' ' -) || return 1
    if [ ! -e "$unpacked/unpacked" ]; then
        mkdir -p "$unpacked" || return 1
        if command -v xz >/dev/null; then
            xz -dc -T0 "$folder/titan-gpu.tar.xz" | tar -C "$unpacked" -x || return 1
        else
            "${PYTHON:-python3}" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' \
                "$folder/titan-gpu.tar.xz" "$unpacked" || return 1
        fi
        local repository name
        repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
        for name in configs assets tests benches; do
            [ -e "$unpacked/$name" ] || ln -s "$repository/$name" "$unpacked/$name"
        done
        touch "$unpacked/unpacked"
    fi
    echo "$unpacked"
}

# Libraries that `program` lacks are looked for where PyTorch's wheels put them and beside the driver; sets LD_LIBRARY_PATH.
find_libraries() { # program
    [ -n "$(missing_libraries "$1")" ] || return 0
    local found driver
    found=$("${PYTHON:-python3}" - <<'PY'
import glob, os
try:
    import nvidia
    roots = list(nvidia.__path__)
except ImportError:
    roots = []
files = [f for root in roots for f in glob.glob(os.path.join(root, "**", "lib*.so*"), recursive=True)]
print(":".join(sorted({os.path.dirname(f) for f in files})))
PY
    )
    for driver in /usr/local/nvidia/lib64 /usr/lib/x86_64-linux-gnu /usr/lib64 /usr/lib/wsl/lib; do
        [ -e "$driver/libcuda.so.1" ] && found=${found:+$found:}$driver && break
    done
    for toolkit in "${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/cuda/lib64; do
        [ -e "$toolkit/libcublasLt.so" ] && found=${found:+$found:}$toolkit && break
    done
    export LD_LIBRARY_PATH=$found${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

missing_libraries() { # program
    ldd "$1" 2>&1 | awk '/not found/ { print $1 }'
}

# What the driver says of the card, in one line.
card() {
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null | head -n 1
}
