"""`scripts/tensorrt_check.sh` without a GPU, and with programs that stand for nvidia-smi and python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.interface.gpu_scripts import SCRIPTS, WITHOUT_GPU, GpuScript, calls, steps

# Answers as the script's calls expect it, and writes each call into $CALLS.
PYTHON = r"""#!/usr/bin/env bash
echo "$(basename "$(dirname "$0")") $*" >>"$CALLS"
case "$*" in
    *find_spec*"'tensorrt'"*) [[ $PRODUCTS == *full* || $0 == */env/bin/python ]] ;;
    *find_spec*tensorrt_rtx*) [[ $PRODUCTS == *rtx* || $0 == */env/bin/python ]] ;;
    *FLAVORS*" rtx 9.0") exit 1 ;;
    *FLAVORS*) exit 0 ;;
    *nvrtc_version*) [[ $HAS == all || $0 == */env/bin/python ]] ;;
    *is_available*) exit "${NO_CUDA:-0}" ;;
    *get_device_name*) echo "torch 2.11.0+cu130, CUDA 13.0, GPU of a test" ;;
    *torch.__version__*) if [[ -n ${NO_TORCH:-} ]]; then exit 1; fi; echo 2.11.0+cu130 ;;
    --version) echo Python 3.12.0 ;;
    *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
    *"-m pip"*) exit "${PIP:-0}" ;;
    *"plugin build"*) exit "${PLUGIN:-0}" ;;
    *"-m pytest"*) echo "3 passed"; exit "${PYTEST:-0}" ;;
    *benchmarks.tensorrt_check*)
        echo "library ${RMSNORM_DEPLOY_PLUGIN:-none}" >>"$CALLS"
        while (($#)); do
            if [[ $1 == --markdown && -z ${NO_ROWS:-} ]]; then printf 'GPU of a test\n\n| row |\n' >"$2"; fi
            if [[ $1 == --out && ${CHECK:-0} == 1 ]]; then echo >"$2/failures.tar.gz"; fi
            shift
        done
        exit "${CHECK:-0}"
        ;;
esac
"""
NVIDIA_SMI = """#!/usr/bin/env bash
if [[ $* == *compute_cap* ]]; then echo "${CAPABILITY:-8.9}"; else echo 'GPU of a test, 580.1, 24 GiB'; fi
"""


run = GpuScript("tensorrt_check.sh", PYTHON, {"nvidia-smi": NVIDIA_SMI}, {"PRODUCTS": "full"})


def test_help(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: scripts/tensorrt_check.sh ")
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what"], "unknown option --what"),
        (["--env"], "expected a value after --env"),
        (["a", "b"], "expected one output folder, got a and b"),
        (["--seconds", "481"], "expected 1 to 480, got 481"),
        (["--runtime", "ort"], "expected tensorrt, rtx or both, got ort"),
    ],
)
def test_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("nvidia_smi", WITHOUT_GPU)
def test_without_a_gpu_nothing_is_installed(tmp_path: Path, nvidia_smi: str) -> None:
    run.check_nothing_is_written_without_a_gpu(tmp_path, nvidia_smi)


def test_on_this_machine_there_is_no_gpu(tmp_path: Path) -> None:
    run.check_this_machine_has_no_gpu(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {"NO_CUDA": "1"}, "requires the CUDA build of torch"),
        ([], {"PRODUCTS": "none"}, "Name one to install it: --runtime tensorrt or --runtime rtx."),
        (["--runtime", "rtx"], {"CAPABILITY": "9.0"}, "rtx does not support GPUs of compute capability 9.0."),
        ([], {"PRODUCTS": "rtx", "CAPABILITY": "9.0"}, "rtx does not support GPUs of compute capability 9.0."),
    ],
)
def test_without_what_it_needs_nothing_is_installed(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    done = run(tmp_path, *arguments, "out", **variables)
    assert done.returncode == 4
    assert done.stdout == ""
    assert message in done.stderr
    assert "Nothing was installed." in done.stderr
    assert not (tmp_path / "out").exists()
    assert not any("pip" in call or "venv" in call for call in calls(tmp_path))


def test_the_architectures_are_read_without_the_package(tmp_path: Path) -> None:
    """The script's own program, with this interpreter and nothing on its path."""
    text = run.path.read_text(encoding="utf-8")
    (source,) = re.findall(r"\"\$python\" -c '(import sys, types\n.*?)' \"\$root\"", text, flags=re.DOTALL)
    codes = {
        (runtime, capability): subprocess.run(
            [sys.executable, "-I", "-c", source, str(SCRIPTS.parent), runtime, capability], cwd=tmp_path, check=False
        ).returncode
        for runtime, capability in (("rtx", "8.9"), ("rtx", "9.0"), ("tensorrt", "9.0"), ("rtx", "12.0"))
    }
    assert codes == {("rtx", "8.9"): 0, ("rtx", "9.0"): 1, ("tensorrt", "9.0"): 0, ("rtx", "12.0"): 0}


def test_every_step_succeeds_and_the_table_is_printed_last(tmp_path: Path) -> None:
    done = run(tmp_path, "--env", str(tmp_path / "env"), "--seconds", "100", "--only", "llama", "out")
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == {"venv": 0, "install": 0, "plugin": 0, "tests": 0, "check": 0}
    assert done.stdout.endswith("\n\nGPU of a test\n\n| row |\n")
    out = tmp_path / "out"
    assert (out / "tests.log").read_text(encoding="utf-8") == "3 passed\n"
    machine = (out / "machine.txt").read_text(encoding="utf-8")
    assert machine.startswith("GPU of a test, 580.1, 24 GiB\n")
    assert "products: tensorrt\n" in machine
    made = calls(tmp_path)
    (venv,) = [call for call in made if "-m venv" in call]
    assert venv == f"fake -m venv --system-site-packages {tmp_path / 'env'}"
    (pip,) = [call for call in made if "-m pip" in call]
    assert f"-c {out / 'constraints.txt'} -e {SCRIPTS.parent}[kernel,cpu,hf,dev]" in pip
    assert (out / "constraints.txt").read_text(encoding="utf-8") == "torch==2.11.0+cu130\n"
    (tested,) = [call for call in made if "-m pytest" in call]
    assert tested.startswith("bin -m pytest -m tensorrt tests -q ")
    (checked,) = [call for call in made if "-m benchmarks.tensorrt_check" in call]
    assert checked.startswith(f"bin -m benchmarks.tensorrt_check --seconds 100 --out {out} --deep qwen3/float16/plugin")
    assert "--only llama --runtime tensorrt --row-seconds 80 --json" in checked
    assert "--attach" not in checked
    assert f"library {out}/plugin/librmsnorm_deploy.so" in made


def test_a_product_that_is_named_is_installed(tmp_path: Path) -> None:
    done = run(tmp_path, "--env", "env", "--runtime", "both", "out", PRODUCTS="none", CAPABILITY="8.9")
    assert done.returncode == 0, done.stderr
    assert "products: tensorrt rtx\n" in (tmp_path / "out" / "machine.txt").read_text(encoding="utf-8")
    (checked,) = [call for call in calls(tmp_path) if "-m benchmarks.tensorrt_check" in call]
    assert "--runtime" not in checked


@pytest.mark.parametrize(
    ("variable", "step", "code"),
    [("PIP", "install", "1"), ("PLUGIN", "plugin", "1"), ("PYTEST", "tests", "5"), ("CHECK", "check", "1")],
)
def test_a_step_that_fails_does_not_stop_the_others(tmp_path: Path, variable: str, step: str, code: str) -> None:
    done = run(tmp_path, "--env", "env", "out", **{variable: code})
    assert done.returncode == 1
    expected = dict.fromkeys(("venv", "install", "plugin", "tests", "check"), 0)
    assert steps(tmp_path) == {**expected, step: int(code)}
    assert done.stdout.endswith("| row |\n")
    (checked,) = [call for call in calls(tmp_path) if "-m benchmarks.tensorrt_check" in call]
    assert (f"--attach {tmp_path}/out/tests.log" in checked) == (step == "tests")
    assert (f"failed: {tmp_path}/out/failures.tar.gz\n" in done.stdout) == (step == "check")


def test_without_the_tools_for_the_library_the_plugin_in_python_is_checked(tmp_path: Path) -> None:
    done = run(tmp_path, "--env", "env", "out", PLUGIN="4")
    assert done.returncode == 0
    assert steps(tmp_path)["plugin"] == 0
    assert "plugin     exit code 0" in done.stdout
    assert "not built, so that the plugin in Python is checked" in done.stdout
    assert "library none" in calls(tmp_path)


def test_a_library_that_is_named_is_used(tmp_path: Path) -> None:
    done = run(tmp_path, "--env", "env", "out", RMSNORM_DEPLOY_PLUGIN="/own/library.so")
    assert done.returncode == 0
    assert "library /own/library.so" in calls(tmp_path)
    assert not any("plugin build" in call for call in calls(tmp_path))


def test_an_interpreter_that_has_everything_is_used_as_it_is(tmp_path: Path) -> None:
    done = run(tmp_path, "--env", "env", "out", HAS="all")
    assert done.returncode == 0
    assert not (tmp_path / "env").exists()
    assert not any("pip" in call or "venv" in call for call in calls(tmp_path))


def test_a_check_with_nothing_to_run_on_keeps_its_exit_code(tmp_path: Path) -> None:
    done = run(tmp_path, "--env", "env", "out", NO_ROWS="1", CHECK="4")
    assert done.returncode == 4
    assert done.stdout.endswith("The check ran no row; see check.log.\n")


def test_the_steps_take_less_than_fifteen_minutes() -> None:
    """The limits of all steps, with the ten seconds after which a step is killed; the check has what they leave."""
    found = run.limits()
    assert list(found) == ["venv", "install", "plugin", "tests", "check"]
    assert found["check"] == "$((rows_seconds + 90))"
    text = run.path.read_text(encoding="utf-8")
    (until,) = re.findall(r"^left=\$\(\((\d+) - SECONDS\)\)$", text, flags=re.MULTILINE)
    assert int(until) + 90 + 10 < 15 * 60
    before = [int(limit) + 10 for limit in found.values() if limit.isdigit()]
    assert int(until) - sum(before) > 240


def test_shellcheck() -> None:
    run.check_shell()
