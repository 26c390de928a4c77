"""What is shipped: the wheel works without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator import __version__
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.sharding.layout import Layout
from tests.lab.runs import TINY, small_overrides

ROOT = Path(__file__).resolve().parents[1]


EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, installed by pip where nothing else of the project is."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", str(folder / "site")]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return folder / "site"


@pytest.fixture
def run(installed, tmp_path):
    """Run Python in an empty folder, with the installed wheel and `path` to import from; returns the process."""
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(*arguments: str, path: str = ""):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(installed), path]))}
        words = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 500}
        return subprocess.run([sys.executable, *arguments], **words)

    run.folder = folder
    return run


def test_the_wheel_brings_every_file_of_the_configuration(installed):
    ours = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    theirs = {str(path.relative_to(installed / "orchestrator/conf")) for path in installed.rglob("conf/**/*.yaml")}
    assert ours == theirs != set()
    assert (installed / "orchestrator/chips/chips.yaml").is_file()
    assert (installed / "orchestrator/report/report.css").is_file()
    assert (installed / "orchestrator/py.typed").is_file()


def test_the_wheel_composes_a_run(installed, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import orchestrator; assert orchestrator.__file__.startswith(sys.path[0]), orchestrator.__file__\n"
        "from orchestrator.cli import main; sys.exit(main(['train', 'model=llama_20m', '--cfg', 'job']))"
    )
    # -I: neither the working directory nor an editable install's path comes first.
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "llama_20m" in result.stdout


def test_the_wheel_is_what_is_imported(installed, run):
    done = run("-c", "import orchestrator; print(orchestrator.__file__)")
    assert done.stdout.startswith(str(installed)), done


def _small(tmp_path: Path, *words: str) -> list[str]:
    small = small_overrides(tmp_path, *TINY, "train.max_steps=2", "checkpoint.handover.enabled=false", *words)
    return [word for word in small if not word.startswith("runs_dir=")]


def test_the_example_of_a_program_trains_from_an_empty_folder(run, tmp_path):
    example = str(EXAMPLES / "train_from_python.py")
    done = run(example, *_small(tmp_path))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-1000:] + done.stderr[-3000:]
    first, row, measured, *_, report = done.stdout.splitlines()
    assert first.split() == ["step", "loss", "validation"]
    assert measured.startswith(f"measured again: {row.split()[2]} nats per token on ")
    assert report.endswith("report.html")
    refused = run(example, "optim.lrr=1")
    assert (refused.returncode, refused.stderr.splitlines()[0]) == (1, "error: 1 problem in the configuration:")


def test_the_example_of_a_model_trains_from_an_empty_folder(run, tmp_path):
    folder = EXAMPLES / "own_model"
    own = ("model=sigmoid", "model.dim=32", "model.layers=1", "model.heads=4", "model.mlp_dim=48")
    layout = ("hardware.devices=4", "layout.fsdp=2", "layout.tensor=2")
    words = _small(tmp_path, *own, *layout)
    done = run("-m", "orchestrator", "train", "--config-dir", str(folder / "conf"), *words, path=str(folder))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    (record,) = run.folder.glob("runs/*/*/run.json")
    assert json.loads(record.read_text())["legs"][0]["layout"] == Layout(fsdp=2, tensor=2).as_dict()
    assert [path.name for path in run.folder.glob("runs/*/*/checkpoints/*")] == ["step-00000002"]


def test_the_example_of_an_optimizer_and_a_callback_trains_from_an_empty_folder(run, tmp_path):
    folder = EXAMPLES / "own_optimizer_and_callback"
    words = _small(
        tmp_path,
        "optim._target_=own_parts.optimizers.Lion",
        "optim.lr=3e-4",
        "callbacks=[{_target_: own_parts.callbacks.CountTokens, directory: counts, every: 1}]",
        "hardware.devices=2",
        "layout.fsdp=2",
    )
    done = run("-m", "orchestrator", "train", *words, path=str(folder))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert {path.name for path in (run.folder / "counts").iterdir()} == {"rank0.txt", "rank1.txt"}
    (saved,) = run.folder.glob("runs/*/*/checkpoints/*")
    assert any(name.startswith("optimizer.exp_avg.") for name in Checkpoint(saved).manifest.tensors)


def test_the_example_of_a_trainer_runs_and_resumes_from_an_empty_folder(run):
    example = str(EXAMPLES / "lightning_trainer" / "train.py")
    for epochs, more in ((1, ()), (2, ("--resume", "last"))):
        done = run(example, "--epochs", str(epochs), *more)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        assert "val_loss" in done.stdout
    (last,) = run.folder.glob("runs/lightning_trainer/checkpoints/last*")
    assert Checkpoint(last.resolve()).step == 8


@pytest.mark.parametrize("recipe", [path.stem for path in (ROOT / "recipes/experiment").glob("*.yaml")])
def test_every_recipe_composes(recipe):
    from orchestrator.config.compose import compose

    # A sweep numbers its jobs.
    words = [f"experiment={recipe}", "hydra.job.num=0"] if recipe.startswith("sweep_") else [f"experiment={recipe}"]
    assert compose(words, config_dir=str(ROOT / "recipes")).config.name == recipe


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_the_container_gets_what_the_wheel_is_made_of():
    """`COPY . .` copies what `.dockerignore` lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert allowed == {"orchestrator", "conf", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in allowed)
