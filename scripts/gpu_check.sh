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

# shellcheck source=scripts/common.sh
source "$root/scripts/common.sh"
# Nothing is installed or written before it is known that there is a GPU that torch can use.
require_gpu gpu_check.sh
open_output ""

# complete PYTHON: whether it has all that the steps need.
complete() {
    "$1" -c 'import cuda.bindings.driver, hypothesis, onnx_ir, onnxscript, pydantic, pytest, rich, safetensors, xdist
import torch
from rmsnorm_deploy.plugins.kernel.compiler import nvrtc_version
nvrtc_version()' >/dev/null 2>&1
}

constrain
if complete "$python"; then
    note install 0 0 "$python has everything"
else
    install_into_environment 100 kernel,dev
fi
describe_torch

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

show_steps
echo
if [[ -s $out/kernel.md ]]; then
    sed -n '/^## Ours/,$p' "$out/kernel.md"
else
    echo "The benchmark measured no row; see benchmark.log."
fi
exit "$failed"
