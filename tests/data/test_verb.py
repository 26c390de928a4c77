from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.cli import data
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import DataConfig
from orchestrator.data.store import TokenStore
from orchestrator.errors import ConfigErrors, DataError, UserError

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for number in range(12):
        (tmp_path / "docs" / f"{number}.txt").write_text(f"document {number} of the example\n" * 20)
    return tmp_path / "docs"


def test_prepare_and_inspect(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["input=docs/1*.txt,docs/2.txt", "output=data/docs", "vocab_size=280", "validation_fraction=0"]
    assert data.main(["prepare", *arguments, "progress=false", "workers=1"]) == 0
    printed = capsys.readouterr().out
    assert "unigram entropy" in printed
    assert "bytes per token" in printed
    assert "python -m orchestrator train data=store data.sources='[{path: data/docs, weight: 1}]'" in printed
    store = TokenStore.open("data/docs")
    assert sum(split.documents for split in store.index.splits.values()) == 4
    assert store.vocab_size == 280
    assert data.main(["inspect", "path=data/docs", "verify=true"]) == 0
    printed = capsys.readouterr().out
    assert "of the example" in printed
    assert store.fingerprint[:16] in printed
    with pytest.raises(UserError, match="document=99"):
        data.main(["inspect", "path=data/docs", "document=99"])


@pytest.mark.parametrize("tokenizer", ["bytes", "first/tokenizer.json", "first"])
def test_tokenizers(docs: Path, tokenizer: str) -> None:
    data.main(["prepare", "input=docs", "output=first", "tokenizer=bytes", "progress=false"])
    data.main(["prepare", "input=docs", "output=second", f"tokenizer={tokenizer}", "progress=false"])
    assert TokenStore.open("first").fingerprint == TokenStore.open("second").fingerprint


def test_an_existing_store_is_kept(docs: Path) -> None:
    arguments = ["prepare", "input=docs", "output=out", "tokenizer=bytes", "progress=false"]
    data.main(arguments)
    with pytest.raises(DataError, match="nothing is overwritten"):
        data.main(arguments)


def test_wrong_words(docs: Path) -> None:
    with pytest.raises(ConfigErrors, match="did you mean 'input'"):
        data.main(["prepare", "inputs=docs", "output=out"])
    with pytest.raises(ConfigErrors, match="'output' is missing"):
        data.main(["prepare", "input=docs"])
    with pytest.raises(UserError, match="did you mean 'inspect'"):
        data.main(["inspct"])
    with pytest.raises(DataError, match="no file of this name, and nothing is downloaded"):
        data.main(["prepare", "input=docs", "output=out", "tokenizer=wordpiece"])


def test_paths_are_quoted_where_the_command_needs_it() -> None:
    assert data._yaml("data/docs") == "data/docs"
    assert data._yaml("my data") == '"my data"'


def test_help_is_quick_at_both_levels() -> None:
    code = (
        "import sys; from orchestrator.cli import data\n"
        "assert [data.main(a) for a in (['--help'], ['prepare', '--help'], ['inspect', '-h'], [])] == [0, 0, 0, 2]\n"
        "heavy = {'numpy', 'grain', 'tokenizers', 'pyarrow', 'torch', 'hydra'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in ("prepare", "inspect", "vocab_size=", "text_field=", "validation_fraction="):
        assert word in done.stdout


def test_the_base_file_documents_every_key() -> None:
    base = yaml.safe_load((CONF / "base.yaml").read_text())
    assert base.keys() == to_dict(DataConfig()).keys()
    assert from_dict(DataConfig, base) == dataclasses.replace(DataConfig(), name="base")
    for line in (CONF / "base.yaml").read_text().splitlines():
        assert "#" in line or line.strip().startswith("- {"), f"no comment: {line}"


@pytest.mark.parametrize("name", ["builtin", "store", "mixture"])
def test_the_files_of_the_group_are_valid(name: str) -> None:
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert content.pop("defaults") == ["base", "_self_"]
    config = from_dict(DataConfig, {**yaml.safe_load((CONF / "base.yaml").read_text()), **content})
    assert config.name == name
    if name == "builtin":
        assert config == DataConfig()
