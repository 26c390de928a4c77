"""Rehearsal by the real compiler: the staged step, the compiler's process, and what a user sees when they fail."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.config.compose import compose
from orchestrator.errors import ConfigError, MissingExtraError, UserError
from orchestrator.hardware.target_table import resolve
from orchestrator.rehearsal import tpu_compiler
from orchestrator.training.resolved import resolve_run, write_resolved
from tests.lab import cli
from tests.lab.slow import cases

STAGE_SECONDS = 120
TINY = ("model=tiny", "model.vocab_size=512", "train.remat=full", "train.global_batch_tokens=4096")
KINDS = ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1", "2xv5e:2x2"]
SPLIT = ("layout.fsdp=4", "layout.tensor=2")


def _compiler_is_here() -> bool:
    try:
        return tpu_compiler.count_devices("v5e:1x1") == 1
    except MissingExtraError:
        return False


needs_torch_xla = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not in this environment"
)
needs_compiler = pytest.mark.skipif(
    not _compiler_is_here(), reason=f"no {tpu_compiler.DEFAULT_PYTHON} with {tpu_compiler.JAX}"
)


# As `python -m orchestrator.rehearsal.tpu_compiler`, where jax cannot be imported.
_NO_JAX = (
    "import sys; sys.modules['jax'] = None; from orchestrator.rehearsal.tpu_compiler import _main; _main(sys.argv[3:])"
)


@pytest.fixture(autouse=True)
def _the_compilers_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def _stage(folder: Path, *overrides: str, devices: int = 8) -> subprocess.CompletedProcess[str]:
    """Stage as the verb does, in a process of its own."""
    hardware = ("hardware=tpu", f"hardware.simulate={devices}", "hardware.precision=bf16")
    config = compose([*hardware, *TINY, *overrides]).config
    write_resolved(folder, resolve_run(config, resolve(config.hardware), devices, 0))
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "orchestrator.rehearsal.stage", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STAGE_SECONDS)


def _arguments(folder: Path) -> list[str]:
    """The arguments of the program, each with its type and attributes."""
    signature = (folder / "step.mlir").read_text().partition(") -> (")[0]
    return re.findall(r"%arg\d+: (tensor<[^>]*>(?: \{.*?\}(?=, %arg|$))?)", signature)


@needs_torch_xla
class TestStaging:
    def test_every_argument_has_its_partition(self, tmp_path):
        done = _stage(tmp_path, *SPLIT)
        assert done.returncode == 0, done.stderr
        arguments = _arguments(tmp_path)
        assert all("mhlo.sharding" in argument for argument in arguments)
        # Weight, first and second moment of the embedding, rows over tensor and, inside that, fsdp.
        embeddings = [argument for argument in arguments if argument.startswith("tensor<512x128xf32>")]
        assert len(embeddings) >= 3
        assert all('"{devices=[8,1]0,2,4,6,1,3,5,7}", jax.buffer_donor = true' in one for one in embeddings)
        batch = [argument for argument in arguments if argument.startswith("tensor<16x256xi64>")]
        assert len(batch) == 4
        assert all("[4,1,2]" in one and "donor" not in one for one in batch)

    def test_the_parameters_are_placeholders(self, tmp_path):
        """77 GB of weights and moments, on more devices than torch can count, on a machine of 24 GB."""
        start = time.monotonic()
        done = _stage(tmp_path, "model=llama3_405b", "model.layers=2", "layout.fsdp=256", "layout.tensor=1",
                      "train.global_batch_tokens=65536", devices=256)  # fmt: skip
        assert done.returncode == 0, done.stderr
        facts = json.loads((tmp_path / "staged.json").read_text())
        assert facts["parameters"] > 6e9
        assert time.monotonic() - start < 60
        assert ",255" in "".join(_arguments(tmp_path))

    def test_the_last_of_several_micro_batches_adds_to_gradients(self, tmp_path):
        one, several = tmp_path / "one", tmp_path / "several"
        for folder, size in ((one, "auto"), (several, "2")):
            folder.mkdir()
            assert _stage(folder, *SPLIT, f"train.micro_batch_size={size}").returncode == 0
        facts = json.loads((several / "staged.json").read_text())
        assert (facts["micro_batch"], facts["micro_batches"]) == (8, 2)
        parameters = 4 * 9 + 2  # four blocks, the tied embedding and the last norm
        assert facts["arguments"] == json.loads((one / "staged.json").read_text())["arguments"] + parameters

    def test_what_the_strategy_cannot_do_is_said(self, tmp_path):
        done = _stage(tmp_path, *SPLIT, "train.remat=selective")
        assert done.returncode == UserError.exit_code
        assert "set train.remat=full" in done.stderr


@needs_compiler
class TestCompiler:
    def test_devices_are_the_compilers(self):
        devices = {
            "v5e:2x4": 8, "v5e:1x1": 1, "v4:2x2x1": 4, "v5p:2x2x2": 8, "v6e:2x4": 8,
            # Two devices per chip, whichever name it is given.
            "v7x:2x2x1": 8, "tpu7x:2x2x1": 8, "TPU7x:2x2x1": 8,
            "2xv5e:2x4": 16,
        }  # fmt: skip
        assert {topology: tpu_compiler.count_devices(topology) for topology in devices} == devices

    def test_an_unknown_topology_is_a_mistake_of_the_user(self):
        with pytest.raises(ConfigError, match="does not know the topology"):
            tpu_compiler.count_devices("v5e:3x5x7")

    def test_what_it_refuses_is_unknown(self, tmp_path):
        program = tmp_path / "step.mlir"
        program.write_text("this is no program")
        verdict = tpu_compiler.compile_program(program, "v5e:2x4", 120)
        assert verdict.status == "unknown"
        assert "refused" in verdict.reason

    @needs_torch_xla
    def test_the_verb_gives_a_verdict(self, tmp_path):
        done = cli.run("rehearse", "topology=v5e:2x4", *TINY, *SPLIT, "json=true")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["devices"] == 8
        memory = answer["verdict"]["memory_bytes"]
        # Weights and two moments, in eight parts, are given away to the results.
        assert memory["alias"] > 0.99 * 3 * 4 * answer["staged"]["parameters"] / 8
        assert memory["peak"] > memory["alias"]

    @needs_torch_xla
    @pytest.mark.parametrize("kind", cases(KINDS, quick=["v7x:2x2x1", "2xv5e:2x2"]))
    def test_every_kind_of_chip_is_compiled_for(self, kind):
        layout = ("layout.replicate=2",) if kind.startswith("2x") else ()
        done = cli.run("rehearse", f"topology={kind}", *TINY, "model.layers=1", *layout, "json=true")
        assert done.returncode == 0, done.stdout + done.stderr
        answer = json.loads(done.stdout)
        assert answer["devices"] == (8 if kind[:2] in ("v7", "2x") else 4)
        assert answer["verdict"]["memory_bytes"]["peak"] > 0

    def test_each_slice_has_whole_copies(self):
        done = cli.run("rehearse", "topology=2xv5e:2x2", *TINY, "layout.fsdp=8")
        assert done.returncode == 2
        assert "layout.replicate=1 on 2 slices" in done.stderr
        assert "set layout.replicate=2" in done.stderr

    @needs_torch_xla
    def test_the_verb_says_what_does_not_fit(self):
        wide = ("model=llama3_8b", "model.layers=1", "train.seq_len=2048", "train.global_batch_tokens=1048576")
        done = cli.run("rehearse", "topology=v5e:2x4", *wide, *SPLIT)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "does not fit" in done.stdout
        assert "exceeds" in done.stdout


class TestProcess:
    """The process without the compiler in it."""

    @staticmethod
    def _stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
        script = folder / "python"
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        monkeypatch.setenv(tpu_compiler.PYTHON_VARIABLE, str(script))
        return folder / "step.mlir"

    def test_too_long_is_unknown(self, tmp_path, monkeypatch):
        program = self._stand_in(tmp_path, monkeypatch, "sleep 60")
        start = time.monotonic()
        verdict = tpu_compiler.compile_program(program, "v5e:2x4", 0.5)
        assert (verdict.status, verdict.memory_bytes) == ("unknown", None)
        assert "stopped after 0.5 s" in verdict.reason
        assert time.monotonic() - start < 10

    def test_a_crash_is_unknown(self, tmp_path, monkeypatch):
        program = self._stand_in(tmp_path, monkeypatch, "echo all is lost >&2; kill -ABRT $$")
        verdict = tpu_compiler.compile_program(program, "v5e:2x4", 30)
        assert verdict.status == "unknown"
        assert verdict.reason == "the compiler ended by signal SIGABRT: all is lost"

    def test_out_of_memory_is_an_answer(self, tmp_path, monkeypatch):
        answer = json.dumps({"error": "RESOURCE_EXHAUSTED: Ran out of memory on HBM", "compile_seconds": 2.0})
        program = self._stand_in(tmp_path, monkeypatch, f"echo '{answer}' > \"$3\"")
        verdict = tpu_compiler.compile_program(program, "v5e:2x4", 30)
        assert (verdict.status, verdict.compile_seconds) == ("does not fit", 2.0)
        assert "Ran out of memory on HBM" in verdict.reason

    def test_a_missing_environment_says_how_to_make_one(self, monkeypatch):
        monkeypatch.setenv(tpu_compiler.PYTHON_VARIABLE, "/nowhere/python")
        with pytest.raises(MissingExtraError, match="scripts/setup tpu-compiler"):
            tpu_compiler.compiler_python()

    def test_an_environment_without_the_compiler_is_none(self, tmp_path, monkeypatch):
        self._stand_in(tmp_path, monkeypatch, f'exec {sys.executable} -c "{_NO_JAX}" "$@"')
        with pytest.raises(MissingExtraError, match="which lacks jax"):
            tpu_compiler.count_devices("v5e:2x4")

    @pytest.mark.parametrize(
        "topology", ["v5e", "h100:8x8", "v5e:16", "0xv5e:4x4", "2v5e:4x4", "v5e:0x4", "v5e:16x16; rm -rf /"]
    )
    def test_what_is_no_topology(self, topology):
        with pytest.raises(ConfigError, match="not a TPU topology"):
            tpu_compiler.count_devices(topology)

    def test_topologies_are_named_as_users_and_the_compiler_do(self):
        parse = tpu_compiler.CompileTopology.parse
        assert parse("v5e:16x16") == tpu_compiler.CompileTopology(1, "v5e", "16x16")
        assert parse("4xv5p:4x4x8") == tpu_compiler.CompileTopology(4, "v5p", "4x4x8")
        assert parse("v7x:2x2x1") == parse("TPU7x:2x2x1") == parse("tpu7x:2x2x1") == parse("1xv7x:2x2x1")

    def test_help_needs_no_torch(self):
        code = (
            "import sys; from orchestrator.cli import main; main(['rehearse', '--help']);"
            " assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "topology" in done.stdout

    def test_the_topology_is_asked_for(self):
        done = cli.run("rehearse", "model=tiny")
        assert done.returncode == 2
        assert "'topology' is missing" in done.stderr
