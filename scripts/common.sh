# shellcheck shell=bash
# Shared by the checks on a GPU: `source` it after `root`, `python` and `out` are set.

# require_gpu NAME: sets `gpus` and `torch`; ends with 4 if there is no GPU that torch can use. Nothing is written before.
require_gpu() {
    gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null) || gpus=
    if [[ -z $gpus || $gpus == *"No devices"* ]]; then
        echo "$1 requires an NVIDIA GPU: nvidia-smi is not on PATH or found none. Nothing was installed." >&2
        exit 4
    fi
    torch=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null) || torch=
    if [[ -n $torch ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "$1 requires the CUDA build of torch, and a GPU that it can use; $python has torch $torch." >&2
        echo "Nothing was installed." >&2
        exit 4
    fi
}

# open_output TEXT: makes the folder of the results, and describes the machine there.
open_output() {
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    [[ $environment == /* ]] || environment=$PWD/$environment
    cd "$root" || exit 1
    : >"$out/steps.txt"
    failed=0
    {
        echo "$gpus"
        echo "$python: $("$python" --version 2>&1), torch ${torch:-not installed}${1:+, $1}"
        uname -srm
    } | tee "$out/machine.txt"
    # Where the checkout is not installed, its packages are found through the links that type checkers follow.
    if [[ -d .typecheck/rmsnorm_deploy ]]; then
        export PYTHONPATH=$root/.typecheck:$root${PYTHONPATH:+:$PYTHONPATH}
    fi
}

# run_step NAME SECONDS COMMAND...: with a time limit; the output goes to the terminal and to NAME.log. Sets `code`, `took`.
run_step() {
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

# step NAME SECONDS COMMAND...: run_step and note.
step() {
    run_step "$@"
    note "$1" "$code" "$took"
}

# constrain: sets `options` for a virtual environment that sees the machine's torch, and writes what keeps pip from
# installing another one over it.
constrain() {
    options=()
    : >"$out/constraints.txt"
    if [[ -n $torch ]]; then
        options=(--system-site-packages)
        echo "torch==$torch" >"$out/constraints.txt"
    fi
}

# install_into_environment SECONDS EXTRAS: a virtual environment with this package; sets `python` to its interpreter.
install_into_environment() {
    if [[ ! -x $environment/bin/python ]]; then
        step venv 20 "$python" -m venv "${options[@]}" "$environment"
    fi
    if [[ -x $environment/bin/python ]]; then
        python=$environment/bin/python
        step install "$1" "$python" -m pip install --quiet --disable-pip-version-check -c "$out/constraints.txt" \
            -e "${root}[$2]"
    else
        note install 1 0 "not run: there is no virtual environment"
    fi
}

# show_steps: what ran, and how it ended.
show_steps() {
    echo
    echo "== steps, in $SECONDS s; files are in $out"
    cat "$out/steps.txt"
}

# describe_torch: the GPU as torch sees it.
describe_torch() {
    "$python" -c 'import torch
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")' 2>&1 |
        tee -a "$out/machine.txt" || true
}
