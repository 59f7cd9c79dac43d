#!/usr/bin/env bash
# Engines of TensorRT and TensorRT-RTX on a machine with an NVIDIA GPU: see --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/tensorrt_check.sh [--runtime NAME] [--env DIR] [--seconds N] [--only REGEX] [OUTPUT]

Exports, builds, runs and validates small decoders on a machine with an NVIDIA GPU, a CUDA build of torch, and TensorRT
or TensorRT-RTX, in less than 15 minutes:

  install     this package with the extras of the product and `kernel`, `hf` and `dev` in a virtual environment, if
              $PYTHON lacks something; the machine's torch and TensorRT stay as they are
  plugin      rmsnorm plugin build, at most 2 minutes; without nvcc, cmake or TensorRT's headers the plugin in Python
              is checked instead
  tests       pytest -m tensorrt tests, at most 2 minutes
  check       python -m benchmarks.tensorrt_check, in the time that is left; rows that were not run are listed

OUTPUT (default: tensorrt-check-out) gets machine.txt, a log of each step, steps.txt with their exit codes and seconds,
the results as check.json and check.md, and failures.tar.gz with what is needed to repair failed rows, without weights.
A step that fails does not stop the next ones. The table is printed last.

  --runtime NAME  tensorrt, rtx, or both (default: those that are installed and support the GPU); a named one is
                  installed if it is missing
  --env DIR       the virtual environment (default: .venv-tensorrt in the checkout); one that is there is used again
  --seconds N     begin no row of the check after this (default: 480, or what is left)
  --only REGEX    rows of the check, such as qwen3/float16
  PYTHON          variable: the interpreter with torch (default: python3)

exit code: 0 every step succeeded, 1 a step failed, 2 usage, 4 no NVIDIA GPU, no CUDA build of torch, or no TensorRT
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
environment=$root/.venv-tensorrt
out=tensorrt-check-out
rows_seconds=480
runtime=
only=
named=0
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --runtime | --env | --seconds | --only)
            if (($# < 2)); then
                echo "tensorrt_check.sh: expected a value after $1" >&2
                exit 2
            fi
            case $1 in
                --runtime) runtime=$2 ;;
                --env) environment=$2 ;;
                --seconds) rows_seconds=$2 ;;
                --only) only=$2 ;;
            esac
            shift
            ;;
        -*) echo "tensorrt_check.sh: unknown option $1; see --help" >&2; exit 2 ;;
        *)
            if ((named)); then
                echo "tensorrt_check.sh: expected one output folder, got $out and $1" >&2
                exit 2
            fi
            out=$1
            named=1
            ;;
    esac
    shift
done
if ! [[ $rows_seconds =~ ^[1-9][0-9]*$ ]] || ((rows_seconds > 480)); then
    echo "tensorrt_check.sh: --seconds: expected 1 to 480, got $rows_seconds" >&2
    exit 2
fi
case $runtime in
    '' | tensorrt | rtx | both) ;;
    *) echo "tensorrt_check.sh: --runtime: expected tensorrt, rtx or both, got $runtime" >&2; exit 2 ;;
esac

# shellcheck source=scripts/common.sh
source "$root/scripts/common.sh"
# Nothing is installed or written before it is known that there is a GPU that torch can use, and a TensorRT.
require_gpu tensorrt_check.sh

# has PYTHON MODULE: whether a module can be found; it is not imported.
has() {
    "$1" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$2') is None)" 2>/dev/null
}

# The extras of the products: those that are named, else those that this interpreter or an earlier environment has.
extras=()
for candidate in "$python" "$environment/bin/python"; do
    if [[ -n $runtime || ${#extras[@]} -gt 0 ]] || ! command -v "$candidate" >/dev/null; then
        continue
    fi
    if has "$candidate" tensorrt; then extras+=(tensorrt); fi
    if has "$candidate" tensorrt_rtx; then extras+=(rtx); fi
done
case $runtime in
    tensorrt | rtx) extras=("$runtime") ;;
    both) extras=(tensorrt rtx) ;;
esac
# supports RUNTIME CAPABILITY: whether a product runs on GPUs like 8.9; the package need not be installed.
supports() {
    "$python" -c 'import sys, types
package = types.ModuleType("rmsnorm_deploy")
package.__path__ = [sys.argv[1]]
sys.modules["rmsnorm_deploy"] = package
from rmsnorm_deploy.runtime.engines.api import FLAVORS
known = FLAVORS[sys.argv[2]].architectures
sys.exit(bool(known) and int(sys.argv[3].replace(".", "")) not in known)' "$root" "$1" "$2"
}

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || capability=
if [[ $capability =~ ^[0-9]+\.[0-9]+$ ]]; then
    for index in "${!extras[@]}"; do
        if ! supports "${extras[index]}" "$capability"; then
            echo "tensorrt_check.sh: ${extras[index]} does not support GPUs of compute capability $capability." >&2
            unset "extras[index]"
        fi
    done
    extras=("${extras[@]}")
fi
if ((${#extras[@]} == 0)) && [[ -n $runtime ]]; then
    echo "Nothing was installed." >&2
    exit 4
fi
if ((${#extras[@]} == 0)); then
    echo "tensorrt_check.sh requires TensorRT or TensorRT-RTX for Python, and $python has neither." >&2
    echo "Name one to install it: --runtime tensorrt or --runtime rtx. Nothing was installed." >&2
    exit 4
fi

open_output "products: ${extras[*]}"

# complete PYTHON: whether it has all that the steps need.
complete() {
    local product
    for product in "${extras[@]}"; do
        case $product in
            tensorrt) has "$1" tensorrt || return 1 ;;
            rtx) has "$1" tensorrt_rtx || return 1 ;;
        esac
    done
    "$1" -c 'import cuda.bindings.driver, hypothesis, onnx_ir, onnxruntime, onnxscript, pydantic, pytest, rich
import safetensors, torch, transformers
from rmsnorm_deploy.plugins.kernel.compiler import nvrtc_version
nvrtc_version()' >/dev/null 2>&1
}

constrain
if complete "$python"; then
    note install 0 0 "$python has everything"
else
    # A product that is there may be installed without pip, so that its extra would install it again.
    wanted=kernel,cpu,hf,dev
    for product in "${extras[@]}"; do
        case $product in
            tensorrt) has "$python" tensorrt || wanted+=,tensorrt ;;
            rtx) has "$python" tensorrt_rtx || wanted+=,rtx ;;
        esac
    done
    install_into_environment 240 "$wanted"
fi
describe_torch

# One library serves both products. Exit code 4 says that a tool for the build is missing.
if [[ -n ${RMSNORM_DEPLOY_PLUGIN:-} ]]; then
    note plugin 0 0 "not run: RMSNORM_DEPLOY_PLUGIN names $RMSNORM_DEPLOY_PLUGIN"
else
    run_step plugin 90 "$python" -c 'from rmsnorm_deploy.cli import main; main()' plugin build -o "$out/plugin"
    if ((code == 4)); then
        note plugin 0 "$took" "not built, so that the plugin in Python is checked; see plugin.log"
    else
        note plugin "$code" "$took"
    fi
    if ((code == 0)); then
        export RMSNORM_DEPLOY_PLUGIN=$out/plugin/librmsnorm_deploy.so
    fi
fi

step tests 120 "$python" -m pytest -m tensorrt tests -q --durations=5
# The last row that is begun, and its end, still fit into 15 minutes.
left=$((780 - SECONDS))
if ((rows_seconds > left)); then rows_seconds=$left; fi
arguments=(--seconds "$rows_seconds" --out "$out" --deep 'qwen3/float16/plugin')
if ((code != 0)); then arguments+=(--attach "$out/tests.log"); fi
if [[ -n $only ]]; then arguments+=(--only "$only"); fi
if ((${#extras[@]} == 1)); then arguments+=(--runtime "${extras[0]}"); fi

rm -f "$out/check.md" "$out/check.json"
step check $((rows_seconds + 90)) "$python" -m benchmarks.tensorrt_check "${arguments[@]}" --row-seconds 80 \
    --json "$out/check.json" --markdown "$out/check.md"
check_code=$code

show_steps
if [[ -f $out/failures.tar.gz ]]; then echo "What is needed to repair what failed: $out/failures.tar.gz"; fi
echo
if [[ -s $out/check.md ]]; then
    cat "$out/check.md"
else
    echo "The check ran no row; see check.log."
fi
# 4: the product that is installed does not support this GPU.
if ((check_code == 4)); then exit 4; fi
exit "$failed"
