"""What is shipped: the wheel works without the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from orchestrator import __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked where nothing else of the project is."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


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


@pytest.mark.parametrize("recipe", [path.stem for path in (ROOT / "recipes/experiment").glob("*.yaml")])
def test_every_recipe_composes(recipe):
    from orchestrator.config.compose import compose

    assert compose([f"experiment={recipe}"], config_dir=str(ROOT / "recipes")).config.name == recipe


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_the_container_gets_what_the_wheel_is_made_of():
    """`COPY . .` copies what `.dockerignore` lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert allowed == {"orchestrator", "conf", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in allowed)
