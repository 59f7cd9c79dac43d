"""`scripts/gpu_check.sh` without a GPU, and with programs that stand for nvidia-smi, python and compute-sanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.interface.gpu_scripts import SCRIPTS, WITHOUT_GPU, GpuScript, calls, steps

# Answers as the script's calls expect it, and writes each call into $CALLS.
PYTHON = r"""#!/usr/bin/env bash
echo "$(basename "$(dirname "$0")") $*" >>"$CALLS"
case "$*" in
    *nvrtc_version*) [[ $HAS == all || $0 == */env/bin/python ]] ;;
    *is_available*) exit "${NO_CUDA:-0}" ;;
    *get_device_name*) echo "torch 2.11.0+cu130, CUDA 13.0, GPU of a test" ;;
    *torch.__version__*) if [[ -n ${NO_TORCH:-} ]]; then exit 1; fi; echo 2.11.0+cu130 ;;
    --version) echo Python 3.12.0 ;;
    *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
    *"-m pip"*) exit "${PIP:-0}" ;;
    *"-m pytest"*) echo "3 passed"; exit "${PYTEST:-0}" ;;
    *--check*) exit 0 ;;
    *benchmarks.kernel*)
        while (($#)); do
            if [[ $1 == --markdown && -z ${NO_ROWS:-} ]]; then
                printf 'head\n\n## Ours, the best peer, and a copy\n\nrow\n\n## Losses\n\nNone in 1 rows.\n' >"$2"
            fi
            shift
        done
        exit "${BENCHMARK:-0}"
        ;;
esac
"""
NVIDIA_SMI = "#!/usr/bin/env bash\necho 'GPU of a test, 580.1, 81559 MiB'\n"
SANITIZER = '#!/usr/bin/env bash\necho "sanitizer $*" >>"$CALLS"\nexit "${SANITIZER:-0}"\n'


run = GpuScript("gpu_check.sh", PYTHON, {"nvidia-smi": NVIDIA_SMI, "compute-sanitizer": SANITIZER})


def test_help(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: scripts/gpu_check.sh ")
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what"], "unknown option --what"),
        (["--env"], "expected a value after --env"),
        (["a", "b"], "expected one output folder, got a and b"),
        (["--seconds", "421"], "expected 1 to 420, got 421"),
        (["--seconds", "x"], "expected 1 to 420, got x"),
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


def test_without_a_cuda_build_of_torch_nothing_is_installed(tmp_path: Path) -> None:
    done = run(tmp_path, "out", NO_CUDA="1")
    assert done.returncode == 4
    assert "requires the CUDA build of torch" in done.stderr
    assert "has torch 2.11.0+cu130" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not any("pip" in call or "venv" in call for call in calls(tmp_path))


def test_every_step_succeeds_and_the_losses_are_printed_last(tmp_path: Path) -> None:
    done = run(tmp_path, "--env", str(tmp_path / "env"), "--seconds", "100", "out")
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == {"venv": 0, "install": 0, "tests": 0, "sanitizer": 0, "benchmark": 0}
    assert done.stdout.endswith("## Ours, the best peer, and a copy\n\nrow\n\n## Losses\n\nNone in 1 rows.\n")
    assert "head" not in done.stdout
    out = tmp_path / "out"
    assert (out / "tests.log").read_text(encoding="utf-8") == "3 passed\n"
    machine = (out / "machine.txt").read_text(encoding="utf-8")
    assert machine.startswith("GPU of a test, 580.1, 81559 MiB\n")
    assert machine.endswith("torch 2.11.0+cu130, CUDA 13.0, GPU of a test\n")
    made = calls(tmp_path)
    (venv,) = [call for call in made if "-m venv" in call]
    assert venv == f"fake -m venv --system-site-packages {tmp_path / 'env'}"
    (pip,) = [call for call in made if "-m pip" in call]
    assert f"-c {out / 'constraints.txt'} -e {SCRIPTS.parent}[kernel,dev]" in pip
    assert (out / "constraints.txt").read_text(encoding="utf-8") == "torch==2.11.0+cu130\n"
    (tested,) = [call for call in made if "-m pytest" in call]
    assert tested.startswith("bin -m pytest -m gpu ")
    assert "tests/plugins" in tested.split()
    (checked,) = [call for call in made if call.startswith("sanitizer")]
    assert checked.endswith("env/bin/python -m benchmarks.kernel --check --seconds 45")
    (timed,) = [call for call in made if "--json" in call]
    assert timed.startswith("bin -m benchmarks.kernel --seconds 100 --json ")


@pytest.mark.parametrize(
    ("variable", "step", "code"),
    [
        ("PIP", "install", "1"),
        ("PYTEST", "tests", "5"),
        ("SANITIZER", "sanitizer", "86"),
        ("BENCHMARK", "benchmark", "1"),
    ],
)
def test_a_step_that_fails_does_not_stop_the_others(tmp_path: Path, variable: str, step: str, code: str) -> None:
    done = run(tmp_path, "--env", "env", "out", **{variable: code})
    assert done.returncode == 1
    expected = dict.fromkeys(("venv", "install", "tests", "sanitizer", "benchmark"), 0)
    assert steps(tmp_path) == {**expected, step: int(code)}
    assert done.stdout.endswith("None in 1 rows.\n")
    assert (tmp_path / "env" / "bin" / "python").exists()


def test_an_interpreter_that_has_everything_is_used_as_it_is(tmp_path: Path) -> None:
    done = run(tmp_path, "--env", "env", "out", HAS="all")
    assert done.returncode == 0
    assert not (tmp_path / "env").exists()
    assert steps(tmp_path)["install"] == 0
    assert not any("pip" in call or "venv" in call for call in calls(tmp_path))
    assert any(call.startswith("fake -m pytest -m gpu ") for call in calls(tmp_path))


def test_without_torch_the_environment_has_its_own(tmp_path: Path) -> None:
    done = run(tmp_path, "--env", "env", "out", NO_TORCH="1")
    assert done.returncode == 0
    assert f"fake -m venv {tmp_path / 'env'}" in calls(tmp_path)
    assert (tmp_path / "out" / "constraints.txt").read_text(encoding="utf-8") == ""


def test_a_benchmark_without_rows_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kernel.md").write_text("## Ours of an earlier run\n", encoding="utf-8")
    done = run(tmp_path, "--env", "env", "out", NO_ROWS="1", BENCHMARK="124")
    assert done.returncode == 1
    assert done.stdout.endswith("The benchmark measured no row; see benchmark.log.\n")
    assert steps(tmp_path)["benchmark"] == 124


def test_the_steps_take_less_than_fifteen_minutes() -> None:
    """The limits of all steps, with the ten seconds after which a step is killed."""
    limits = run.limits()
    assert limits.pop("benchmark") == "$((rows_seconds + 45))"
    assert set(limits) == {"venv", "install", "tests", "sanitizer"}
    benchmark = 420 + 45
    assert benchmark < 8 * 60
    assert sum(map(int, limits.values())) + benchmark + 10 * 5 < 15 * 60


def test_shellcheck() -> None:
    run.check_shell()
