"""The scripts choose the right environment: run with stand-ins that only write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config.schema import HardwareConfig, RunConfig
from orchestrator.runs import run_directory
from tests.lab.runs import small_overrides

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    """The scripts in a checkout with two environments whose programs write their command lines to `calls`."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt", "constraints-xla.txt", "constraints-tpu-compiler.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for venv in (".venv", ".venv-xla", ".venv-tpu-native", ".venv-tpu-compiler", ".venv-docs"):
        folder = tmp_path / venv / "bin"
        folder.mkdir(parents=True)
        for name in ("python", "ruff", "mypy", "mkdocs"):
            # `python -c` hashes the requirements: no call to write down.
            text = f'#!/bin/sh\n[ "$1" = -c ] && exec cksum\necho {venv}/{name} "$@" >>{tmp_path}/calls\n'
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
    return tmp_path


def call(checkout: Path, script: str, *words: str) -> list[str]:
    """Run a script to its good end; the calls it made, installations by pip as `<venv> installs <what>`."""
    (checkout / "calls").write_text("")
    ours = {key: value for key, value in os.environ.items() if not key.startswith("ORCHESTRATOR_")}
    command = ["bash", str(checkout / "scripts" / script), *words]
    result = subprocess.run(command, capture_output=True, text=True, env=ours)
    assert result.returncode == 0, result.stderr
    lines = []
    for line in (checkout / "calls").read_text().splitlines():
        program, *rest = line.split()
        if rest[:3] == ["-m", "pip", "install"]:
            keys = [key for key in ("--editable", "--constraint", "--requirement") if key in rest]
            named = [Path(rest[rest.index(key) + 1]).name.removeprefix(checkout.name) for key in keys]
            line = f"{program} installs {' '.join(named)}"
        lines.append(line)
    return lines


LIGHT = [".venv/python installs  constraints.txt", ".venv/python -m orchestrator train"]
REHEARSAL = [".venv-xla/python installs [xla,test] constraints-xla.txt", ".venv-xla/python -m orchestrator train"]
TPU = [".venv-xla/python installs [tpu,test] constraints-xla.txt", ".venv-xla/python -m orchestrator train"]
NATIVE = [".venv-tpu-native/python installs [tpu-native] constraints.txt"]
NATIVE += [".venv-tpu-native/python -m orchestrator train"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", LIGHT),
        ("hardware=cpu hardware.devices=4", LIGHT),
        ("hardware=tpu hardware.simulate=4 layout.fsdp=2", REHEARSAL),
        ("hardware.simulate=2 hardware=trainium", LIGHT),
        ("hardware=trainium", LIGHT),
        ("hardware=trainium hardware.runtime=torch_xla hardware.simulate=2", REHEARSAL),
        ("hardware=tpu hardware.runtime=torch_tpu hardware.simulate=4", LIGHT),
        ("hardware=tpu hardware.runtime=torch_tpu", NATIVE),
        ("hardware=tpu hardware.runtime=torch_xla", TPU),
        ("hardware.target=tpu hardware.simulate=4", REHEARSAL),
        ("hardware=tpu", TPU),
        ("hardware=tpu hardware.simulate=null", TPU),
    ],
)
def test_train_takes_the_environment_of_the_hardware(checkout, words, expected):
    install, train = expected
    if expected is not NATIVE:
        # Where it is, it is the usual one on a chip.
        shutil.rmtree(checkout / ".venv-tpu-native")
    assert call(checkout, "train", *words.split()) == [install, f"{train} {words}".strip()]


@pytest.fixture
def runs(checkout):
    """A run on a simulated TPU, and later one on a CPU, each with a checkpoint. The time stamps say which is newer."""
    for age, (name, hardware) in enumerate(
        {"cpu": HardwareConfig(target="cpu"), "tpu": HardwareConfig(target="tpu", simulate=2)}.items()
    ):
        run = checkout / "runs" / name / "20261124-100000"
        checkpoint = run / "checkpoints" / "step-00000010"
        checkpoint.mkdir(parents=True)
        for folder in (run, checkpoint):
            run_directory.write_config(folder, RunConfig(hardware=hardware))
            os.utime(folder / "config.yaml", (1e9 - age, 1e9 - age))
    return checkout / "runs"


@pytest.mark.parametrize("place", ["tpu/20261124-100000", "tpu/20261124-100000/checkpoints/step-00000010"])
def test_a_resumed_run_keeps_its_environment(checkout, runs, place):
    words = [f"resume={runs / place}", "train.max_steps=20"]
    assert call(checkout, "train", *words) == [REHEARSAL[0], f"{REHEARSAL[1]} {' '.join(words)}"]
    # What the command line says wins over what the run has.
    assert call(checkout, "train", *words, "hardware=cpu")[-1].startswith(LIGHT[1])
    assert call(checkout, "train", *words, "hardware.simulate=null")[0] == NATIVE[0]
    shutil.rmtree(checkout / ".venv-tpu-native")
    assert call(checkout, "train", *words, "hardware.simulate=null")[0] == TPU[0]


def test_the_latest_run_is_the_one_that_was_worked_on_last(checkout, runs):
    words = ["resume=latest", f"runs_dir={runs}"]
    assert call(checkout, "train", *words)[-1].startswith(LIGHT[1])
    (runs / "tpu" / "20261124-100000" / "metrics.jsonl").touch()
    assert call(checkout, "train", *words) == [REHEARSAL[0], f"{REHEARSAL[1]} {' '.join(words)}"]


@pytest.mark.parametrize("where", ["latest", "nowhere"])
def test_what_cannot_be_found_is_left_to_the_product_to_say(checkout, where):
    words = [f"resume={where}", "runs_dir=none"]
    assert call(checkout, "train", *words) == [LIGHT[0], f"{LIGHT[1]} {' '.join(words)}"]


@pytest.mark.parametrize("extras", ["", "dev", "xla", "tpu", "tpu-compiler", "docs"])
def test_setup_installs_only_what_has_changed(checkout, extras):
    words = [extras] if extras else []
    assert len(call(checkout, "setup", *words)) == 1
    assert call(checkout, "setup", *words) == []
    other = {"xla": "constraints-xla.txt", "tpu": "constraints-xla.txt", "tpu-compiler": "constraints-tpu-compiler.txt"}
    changed = other.get(extras, "constraints.txt")
    with open(checkout / changed, "a") as file:
        file.write("# changed\n")
    assert len(call(checkout, "setup", *words)) == 1


def test_the_compiler_has_an_environment_without_the_product(checkout):
    (line,) = call(checkout, "setup", "tpu-compiler")
    assert line == ".venv-tpu-compiler/python installs constraints-tpu-compiler.txt"


def test_the_documentation_is_built_in_an_environment_without_the_product(checkout):
    assert call(checkout, "docs") == [
        ".venv-docs/python installs constraints.txt requirements.txt",
        ".venv-docs/mkdocs build --clean",
    ]
    assert call(checkout, "docs", "--run", "data")[-1] == ".venv/python -m scripts.docs_run data"


def test_test_runs_the_second_suite_only_when_asked(checkout):
    light = [line for line in call(checkout, "test", "-x") if "pytest" in line]
    side = "--numprocesses 2 --dist loadfile"
    assert light == [f".venv/python -m pytest {side} -x"]
    both = [line for line in call(checkout, "test", "--all", "-x") if "pytest" in line]
    assert both == [f".venv/python -m pytest {side} -x", f".venv-xla/python -m pytest {side} tests/xla -x"]


def test_bench_runs_each_in_its_environment(checkout):
    both = [line for line in call(checkout, "bench") if "benchmarks" in line]
    assert both == [
        ".venv/python scripts/benchmarks/step.py",
        ".venv/python scripts/benchmarks/accumulation.py",
        ".venv-xla/python scripts/benchmarks/xla_step.py",
        ".venv/python scripts/benchmarks/checkpoint.py",
        ".venv/python scripts/benchmarks/plan.py",
        ".venv/python scripts/benchmarks/plan_product.py",
    ]
    assert [line for line in call(checkout, "bench", "step") if "benchmarks" in line] == both[:1]


def test_setup_says_which_python_is_missing(checkout):
    shutil.rmtree(checkout / ".venv-xla")
    programs = checkout / "programs"
    programs.mkdir()
    for name in ("python3.13", "python3", "python"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    command = [shutil.which("bash"), str(checkout / "scripts/setup"), "xla"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(programs)})
    assert result.returncode == 2
    assert "no Python 3.11 or 3.12 was found" in result.stderr
    assert "PYTHON=/path/to/python3.12" in result.stderr
    assert not (checkout / ".venv-xla").exists()


@pytest.mark.parametrize("name", ["fit_planner", "validate_planner", "validate_planner_product"])
def test_the_planners_scripts_need_no_accelerator(checkout, name):
    assert call(checkout, name, "--write")[-1] == f".venv/python -m scripts.{name} --write"


def test_the_benchmarks_train_as_the_product_does(tmp_path):
    """They build and close a run by themselves: what they leave out of it is said there, and nothing has moved away."""
    overrides = small_overrides(tmp_path, "train.max_steps=2", "checkpoint.every_steps=null")
    code = (
        "import sys, lightning.pytorch as lightning; from common import fit\n"
        "from orchestrator.config.compose import compose\n"
        "fit(compose(sys.argv[1:]).config, lambda config, data: lightning.Callback()); print('trained')"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts' / 'benchmarks'}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *overrides], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert (done.returncode, "trained" in done.stdout) == (0, True), done.stderr
