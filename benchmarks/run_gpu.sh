#!/usr/bin/env bash
# All that is measured on one NVIDIA GPU, in parts of at most ten minutes: tests first, then speed.
#
#   benchmarks/run_gpu.sh [--smoke] [--wheels DIR] [--results DIR] [--limit SECONDS] [PART...]
#
# Parts: stamp tests kernels latency fullsize training (all, in this order, where none is named). A part that is done
# leaves done/PART in the results folder and is not run again; remove the file to repeat it. One that is cut short by its
# limit goes on at the next call where it can (fullsize keeps every cell). The results folder, build/gpu without
# --results, holds logs, rows and the tuned tables; where $OUT names a folder it is copied there after every part.
# --wheels installs a folder of wheels, without a network, beside the torch and triton of the machine.
# --smoke runs the smallest version of every part, on a CPU, too, and measures nothing that is worth keeping.
set -u -o pipefail

cd "$(dirname "$0")/.." || exit 2
all=(stamp tests kernels latency fullsize training)
parts=() results=build/gpu limit=600 smoke="" wheels=""

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit "$1"
}

while [ $# -gt 0 ]; do
    case "$1" in
        --smoke) smoke=yes ;;
        --wheels | --results | --limit)
            [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
            case "$1" in
                --wheels) wheels=$2 ;;
                --results) results=$2 ;;
                --limit) limit=$2 ;;
            esac
            shift
            ;;
        -h | --help) usage 0 ;;
        *)
            case " ${all[*]} " in
                *" $1 "*) parts+=("$1") ;;
                *) echo "part '$1' is unknown; choose from ${all[*]}" >&2; exit 2 ;;
            esac
            ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")

mkdir -p "$results/done" "$results/rows" || exit 2
results=$(cd "$results" && pwd)
export TDM_BENCH_RESULTS="$results/rows" HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/finetune:$PWD/exporters:$PWD/app${PYTHONPATH:+:$PYTHONPATH}"

python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
if [ -n "$wheels" ]; then
    venv="$results/../gpu-venv"
    if [ ! -f "$venv/ready" ]; then
        "$python" -m venv --system-site-packages "$venv" || exit 2
        "$venv/bin/python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl || exit 2
        touch "$venv/ready"
    fi
    python="$venv/bin/python"
fi

if [ -z "$smoke" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "torch sees no NVIDIA GPU; --smoke runs small versions of all parts without one" >&2
    exit 2
fi

stamp() {
    "$python" -c 'import json; from tdm_serve.machine import commit, stamp; print(json.dumps(stamp() | {"commit": commit()}))' || return 1
    if command -v nvidia-smi > /dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit --format=csv
    fi
}

tests() { # kernels that hang are found first, each in a process that can be killed
    "$python" -m pytest -m gpu tests/tdm_kernels -q -x -p no:cacheprovider
    local code=$?
    [ -n "$smoke" ] && [ "$code" -eq 5 ] && code=0 # nothing to run without a GPU
    return "$code"
}

kernels() {
    if [ -n "$smoke" ]; then
        TRITON_INTERPRET=1 "$python" benchmarks/kernel_speed.py --smoke --only norm_rope
        return
    fi
    "$python" benchmarks/kernel_speed.py --tune --keep --batches 1 4 || return 1
    cp kernels/tdm_kernels/attention/table.json kernels/tdm_kernels/measured.json "$results/"
}

latency() {
    local small=()
    [ -n "$smoke" ] && small=(--device cpu --batch 1 --repeats 1 --warmup 0 --peers diffusers --no-compiled)
    "$python" benchmarks/latency.py --keep "${small[@]}"
}

fullsize() {
    local options=(--fp8 --skip-kept)
    [ -n "$smoke" ] && options=(--model zimage-tdm-r1:tiny --size 64x64 --batch 1 --device cpu --repeats 1 --warmup 0
        --peers diffusers --no-compiled)
    "$python" benchmarks/fullsize.py --keep "${options[@]}"
}

training() {
    local options=(--size sd35-medium --repeats 2)
    [ -n "$smoke" ] && options=(--size sd35-medium:tiny --pictures 4 --group 2 --micro-batch 2 --repeats 1)
    "$python" benchmarks/training.py --keep "${options[@]}"
}

export -f stamp tests kernels latency fullsize training
export python smoke results

failed=0
for part in "${parts[@]}"; do
    if [ -e "$results/done/$part" ]; then
        echo "$part: done before"
        continue
    fi
    started=$SECONDS
    timeout --kill-after=20 "$limit" bash -c "$part" > "$results/$part.log" 2>&1
    code=$?
    took="$((SECONDS - started)) s"
    case "$code" in
        0) touch "$results/done/$part" && echo "$part: done in $took" ;;
        124 | 137) echo "$part: cut short after $took; see $results/$part.log" >&2 ;;
        *) echo "$part: failed with $code after $took; see $results/$part.log" >&2 ;;
    esac
    [ "$code" -eq 0 ] || { failed=1; tail -n 5 "$results/$part.log" >&2; }
    if [ -n "${OUT:-}" ] && [ "$OUT" != "$results" ]; then
        mkdir -p "$OUT" && cp -R "$results/." "$OUT/"
    fi
done
exit "$failed"
