#!/usr/bin/env bash
# Tests and benchmark of the CUDA kernel on a machine with an NVIDIA GPU: see --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/gpu_check.sh [--env DIR] [--seconds N] [OUTPUT]

Checks the CUDA kernel on a machine with an NVIDIA GPU and a CUDA build of torch, in less than 15 minutes:

  install     this package with the extras `kernel` and `dev` in a virtual environment, if $PYTHON lacks something;
              the machine's torch stays as it is
  tests       pytest -m gpu tests/plugins, at most 3 minutes
  sanitizer   compute-sanitizer on results of a few rows, if it is on PATH
  benchmark   python -m benchmarks.kernel, less than 8 minutes

OUTPUT (default: gpu-check-out) gets machine.txt, a log of each step, steps.txt with their exit codes and seconds, and
the figures as kernel.json and kernel.md. A step that fails does not stop the next ones. The tables of the benchmark and
its losses are printed last.

  --env DIR      the virtual environment (default: .venv-gpu in the checkout); one that is there is used again
  --seconds N    time of the benchmark's rows (default: 420)
  PYTHON         variable: the interpreter with torch (default: python3)

exit code: 0 every step succeeded, 1 a step failed, 2 usage, 4 no NVIDIA GPU or no CUDA build of torch
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
environment=$root/.venv-gpu
out=gpu-check-out
rows_seconds=420
named=0
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --env | --seconds)
            if (($# < 2)); then
                echo "gpu_check.sh: expected a value after $1" >&2
                exit 2
            fi
            if [[ $1 == --env ]]; then environment=$2; else rows_seconds=$2; fi
            shift
            ;;
        -*) echo "gpu_check.sh: unknown option $1; see --help" >&2; exit 2 ;;
        *)
            if ((named)); then
                echo "gpu_check.sh: expected one output folder, got $out and $1" >&2
                exit 2
            fi
            out=$1
            named=1
            ;;
    esac
    shift
done
if ! [[ $rows_seconds =~ ^[1-9][0-9]*$ ]] || ((rows_seconds > 420)); then
    echo "gpu_check.sh: --seconds: expected 1 to 420, got $rows_seconds" >&2
    exit 2
fi

# Nothing is installed or written before it is known that there is a GPU that torch can use.
gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null) || gpus=
if [[ -z $gpus || $gpus == *"No devices"* ]]; then
    echo "gpu_check.sh requires an NVIDIA GPU: nvidia-smi is not on PATH or found none. Nothing was installed." >&2
    exit 4
fi
torch=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null) || torch=
if [[ -n $torch ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh requires the CUDA build of torch, and a GPU that it can use; $python has torch $torch." >&2
    echo "Nothing was installed." >&2
    exit 4
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
[[ $environment == /* ]] || environment=$PWD/$environment
cd "$root"
: >"$out/steps.txt"
failed=0

# step NAME SECONDS COMMAND...: run with a time limit; the output goes to the terminal and to NAME.log.
step() {
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log" || code=$?
    note "$name" "$code" $((SECONDS - began))
}

# note NAME CODE SECONDS [TEXT]: one line of steps.txt.
note() {
    printf '%-10s exit code %s, %s s%s\n' "$1" "$2" "$3" "${4:+: $4}" | tee -a "$out/steps.txt"
    if [[ $2 != 0 ]]; then failed=1; fi
}

{
    echo "$gpus"
    echo "$python: $("$python" --version 2>&1), torch ${torch:-not installed}"
    uname -srm
} | tee "$out/machine.txt"

# Where the checkout is not installed, its packages are found through the links that type checkers follow.
if [[ -d .typecheck/rmsnorm_deploy ]]; then
    export PYTHONPATH=$root/.typecheck:$root${PYTHONPATH:+:$PYTHONPATH}
fi

# complete PYTHON: whether it has all that the steps need.
complete() {
    "$1" -c 'import cuda.bindings.driver, hypothesis, onnx_ir, onnxscript, pydantic, pytest, rich, safetensors, xdist
import torch
from rmsnorm_deploy.plugins.kernel.compiler import nvrtc_version
nvrtc_version()' >/dev/null 2>&1
}

# The environment sees the machine's torch, and the constraint keeps pip from installing another one over it.
options=()
: >"$out/constraints.txt"
if [[ -n $torch ]]; then
    options=(--system-site-packages)
    echo "torch==$torch" >"$out/constraints.txt"
fi
if complete "$python"; then
    note install 0 0 "$python has everything"
else
    if [[ ! -x $environment/bin/python ]]; then
        step venv 20 "$python" -m venv "${options[@]}" "$environment"
    fi
    if [[ -x $environment/bin/python ]]; then
        python=$environment/bin/python
        step install 100 "$python" -m pip install --quiet --disable-pip-version-check -c "$out/constraints.txt" \
            -e "${root}[kernel,dev]"
    else
        note install 1 0 "not run: there is no virtual environment"
    fi
fi

"$python" -c 'import torch
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")' 2>&1 |
    tee -a "$out/machine.txt" || true

# NVRTC compiles one kernel at a time in a process, and the tests compile more than a thousand.
step tests 180 "$python" -m pytest -m gpu -n auto --maxprocesses 16 tests/plugins -q --durations=5

if command -v compute-sanitizer >/dev/null; then
    step sanitizer 60 compute-sanitizer --error-exitcode 86 "$python" -m benchmarks.kernel --check --seconds 45
else
    note sanitizer 0 0 "not run: compute-sanitizer is not on PATH"
fi

rm -f "$out/kernel.md" "$out/kernel.json"
step benchmark $((rows_seconds + 45)) "$python" -m benchmarks.kernel --seconds "$rows_seconds" \
    --json "$out/kernel.json" --markdown "$out/kernel.md"

echo
echo "== steps, in $SECONDS s; files are in $out"
cat "$out/steps.txt"
echo
if [[ -s $out/kernel.md ]]; then
    sed -n '/^## Ours/,$p' "$out/kernel.md"
else
    echo "The benchmark measured no row; see benchmark.log."
fi
exit "$failed"
