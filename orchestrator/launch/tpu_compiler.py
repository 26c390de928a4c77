"""Google's TPU compiler on a machine without a TPU: jax and libtpu in an environment and a process of their own.

libtpu installs signal handlers, can abort and can take very long; its versions also do not go with those of torch_xla.
So the compiler is a child process that leaves its answer in a file, and whatever happens to it is an answer too.
Versions that this was run with: jax 0.10.2, libtpu 0.0.42.1.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import ConfigError, MissingExtraError

PYTHON_VARIABLE = "ORCHESTRATOR_TPU_COMPILER_PYTHON"
JAX = "jax[tpu]==0.10.2"
DEFAULT_PYTHON = Path(".venv-tpu-compiler") / "bin" / "python"
TOPOLOGY = re.compile(r"(v2|v3|v4|v5e|v5p|v6e|TPU7x):\d+x\d+(x\d+)?")
_TOPOLOGY_HINT = "KIND:SIZE, as v5e:16x16, v6e:8x8, v5p:4x4x4, TPU7x:4x4x4"
_DESCRIBE_SECONDS = 120

# Without these libtpu asks Google's metadata server what machine this is.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


@dataclass(frozen=True)
class Verdict:
    """What the compiler said of a program.

    Attributes:
        status: `unknown` where the compiler did not come to an answer.
        reason: of a program that does not fit, the compiler's own message; of `unknown`, what happened.
        compile_seconds: wall time of the compiler, of an answer only.
        memory_bytes: per device, by what it is for (`peak`, `argument`, `output`, `temp`, `alias`, `generated_code`);
            empty unless it fits. Results that take the place of arguments are counted as `alias`.
    """

    status: Literal["fits", "does not fit", "unknown"]
    reason: str = ""
    compile_seconds: float | None = None
    memory_bytes: dict[str, int] | None = None


def compiler_python() -> Path:
    """The interpreter of the compiler's environment.

    Raises:
        MissingExtraError: it is not there.
    """
    root = Path(__file__).resolve().parents[2]
    python = Path(os.environ.get(PYTHON_VARIABLE) or root / DEFAULT_PYTHON)
    if not python.is_file():
        raise MissingCompilerError(python)
    return python


class MissingCompilerError(MissingExtraError):
    """The environment of the TPU compiler is not there. No extra brings it: it cannot be that of torch_xla."""

    def __init__(self, python: Path):
        make = f"python3 -m venv {DEFAULT_PYTHON.parents[1]} && {DEFAULT_PYTHON.parent}/pip install '{JAX}'"
        super(MissingExtraError, self).__init__(
            "a rehearsal needs Google's TPU compiler, in an environment of its own",
            got=f"no {python}",
            allowed=f"a Python that has {JAX}, about 1.1 GB",
            fix=f"{make}; or name another by {PYTHON_VARIABLE}",
        )


def count_devices(topology: str) -> int:
    """Devices of a topology, as the compiler counts them: some chips have two.

    Raises:
        ConfigError: there is no such topology.
        MissingExtraError: there is no compiler.
    """
    if not TOPOLOGY.fullmatch(topology):
        raise ConfigError("not a TPU topology", got=f"topology={topology}", allowed=_TOPOLOGY_HINT)
    answer, reason = _ask(["describe", topology], _DESCRIBE_SECONDS)
    if "devices" not in answer:
        said = answer.get("error", reason)
        raise ConfigError(
            f"the compiler does not know the topology: {said}", got=f"topology={topology}", allowed=_TOPOLOGY_HINT
        )
    return int(answer["devices"])


def compile_program(program: Path, topology: str, timeout_seconds: float) -> Verdict:
    """Compile a StableHLO program, partitioned over all devices of the topology.

    Raises:
        MissingExtraError: there is no compiler.
    """
    answer, reason = _ask(["compile", topology, str(program.resolve())], timeout_seconds)
    seconds = answer.get("compile_seconds")
    if "memory_bytes" in answer:
        return Verdict("fits", "", seconds, answer["memory_bytes"])
    error = answer.get("error", "")
    if "RESOURCE_EXHAUSTED" in error and "memory" in error:
        return Verdict("does not fit", error, seconds)
    return Verdict("unknown", f"the compiler refused the program: {error}" if error else reason)


def _ask(words: list[str], timeout_seconds: float) -> tuple[dict[str, Any], str]:
    """Run the child. Returns its answer, or nothing and what happened to it."""
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        log = Path(folder, "log")
        command = [str(compiler_python()), "-m", "orchestrator.launch.tpu_compiler", str(answer), *words]
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": root, "TMPDIR": folder}
        with log.open("wb") as out:
            child = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            code = child.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return {}, f"the compiler was stopped after {timeout_seconds:g} s (timeout_seconds)"
        finally:
            # With its children; it is gone by itself unless it ran out of time or the user lost patience.
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if answer.is_file():
            return json.loads(answer.read_text()), ""
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return {}, f"the compiler ended {how}: {last[0]}"


# --- in the child: the only place that has jax ---------------------------------------------------------


def _main(argv: list[str]) -> int:
    path, verb, topology, *rest = argv
    answer: dict[str, Any] = {}
    start = time.monotonic()
    try:
        devices = _devices(topology)
        answer["devices"] = len(devices)
        if verb == "compile":
            start = time.monotonic()
            answer["memory_bytes"] = _compile(Path(rest[0]).read_text(), devices)
    except Exception as error:  # jax has no narrower class for what its compiler reports
        answer["error"] = f"{error}" or type(error).__name__
    answer["compile_seconds"] = time.monotonic() - start
    # In one go: a crash while the answer is being written must not look like one.
    part = Path(path + ".part")
    part.write_text(json.dumps(answer))
    part.replace(path)
    return 0


def _devices(topology: str) -> list[Any]:
    from jax.experimental import topologies

    kind, _, size = topology.partition(":")
    settings: dict[str, Any] = {}
    if size in ("1x1", "1x1x1"):
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if kind == "v4":
        settings["chip_config_name"] = "megacore"
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings)
    return list(described.devices)


def _compile(text: str, devices: list[Any]) -> dict[str, int]:
    """Memory per device in bytes. Raises jax's error with the compiler's message."""
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax
    from jax._src.lib.mlir import ir

    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        done = devices[0].client.compile(module, _jax.DeviceList(tuple(devices)), _options(devices))
    stats = done.get_compiled_memory_stats()
    names = ("argument", "output", "temp", "alias", "generated_code")
    sizes = {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in names}
    return {"peak": int(stats.peak_memory_in_bytes), **sizes}


def _options(devices: list[Any]) -> Any:
    import numpy as np
    from jax._src.lib import xla_client

    options = xla_client.CompileOptions()
    build = options.executable_build_options
    for target in (options, build):
        target.num_replicas, target.num_partitions = 1, len(devices)
    build.use_spmd_partitioning = True
    build.use_shardy_partitioner = False
    # Else the results count whole.
    build.allow_spmd_sharding_propagation_to_output = [True]
    # The verdict is wanted, not the fastest program.
    build.exec_time_optimization_effort = build.memory_fitting_effort = -1.0
    build.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id for device in devices]]))
    return options


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
