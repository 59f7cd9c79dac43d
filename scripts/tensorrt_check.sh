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

# Nothing is installed or written before it is known that there is a GPU that torch can use, and a TensorRT.
gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null) || gpus=
if [[ -z $gpus || $gpus == *"No devices"* ]]; then
    echo "tensorrt_check.sh requires an NVIDIA GPU: nvidia-smi is not on PATH or found none. Nothing was installed." >&2
    exit 4
fi
torch=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null) || torch=
if [[ -n $torch ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "tensorrt_check.sh requires the CUDA build of torch, and a GPU that it can use; $python has torch $torch." >&2
    echo "Nothing was installed." >&2
    exit 4
fi

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

mkdir -p "$out"
out=$(cd "$out" && pwd)
[[ $environment == /* ]] || environment=$PWD/$environment
cd "$root"
: >"$out/steps.txt"
failed=0
code=0

# step NAME SECONDS COMMAND...: run with a time limit; the output goes to the terminal and to NAME.log. Sets `code`.
step() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    code=0
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log" || code=$?
    took=$((SECONDS - began))
}

# note NAME CODE SECONDS [TEXT]: one line of steps.txt.
note() {
    printf '%-10s exit code %s, %s s%s\n' "$1" "$2" "$3" "${4:+: $4}" | tee -a "$out/steps.txt"
    if [[ $2 != 0 ]]; then failed=1; fi
}

{
    echo "$gpus"
    echo "$python: $("$python" --version 2>&1), torch ${torch:-not installed}, products: ${extras[*]}"
    uname -srm
} | tee "$out/machine.txt"

# Where the checkout is not installed, its packages are found through the links that type checkers follow.
if [[ -d .typecheck/rmsnorm_deploy ]]; then
    export PYTHONPATH=$root/.typecheck:$root${PYTHONPATH:+:$PYTHONPATH}
fi

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

# The environment sees the machine's torch and TensorRT; the constraints keep pip from installing others over them.
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
        note venv "$code" "$took"
    fi
    if [[ -x $environment/bin/python ]]; then
        python=$environment/bin/python
        # A product that is there may be installed without pip, so that its extra would install it again.
        wanted=kernel,cpu,hf,dev
        for product in "${extras[@]}"; do
            case $product in
                tensorrt) has "$python" tensorrt || wanted+=,tensorrt ;;
                rtx) has "$python" tensorrt_rtx || wanted+=,rtx ;;
            esac
        done
        step install 240 "$python" -m pip install --quiet --disable-pip-version-check -c "$out/constraints.txt" \
            -e "${root}[$wanted]"
        note install "$code" "$took"
    else
        note install 1 0 "not run: there is no virtual environment"
    fi
fi

"$python" -c 'import torch
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")' 2>&1 |
    tee -a "$out/machine.txt" || true

# One library serves both products. Exit code 4 says that a tool for the build is missing.
if [[ -n ${RMSNORM_DEPLOY_PLUGIN:-} ]]; then
    note plugin 0 0 "not run: RMSNORM_DEPLOY_PLUGIN names $RMSNORM_DEPLOY_PLUGIN"
else
    step plugin 90 "$python" -c 'from rmsnorm_deploy.cli import main; main()' plugin build -o "$out/plugin"
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
note tests "$code" "$took"
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
note check "$code" "$took"
check_code=$code

echo
echo "== steps, in $SECONDS s; files are in $out"
cat "$out/steps.txt"
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
