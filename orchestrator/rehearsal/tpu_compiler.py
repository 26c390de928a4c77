"""Google's TPU compiler on a machine without a TPU: jax and libtpu in their own environment and process.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.atomic_files import write_atomically
from orchestrator.errors import ConfigError, MissingExtraError

PYTHON_VARIABLE = "ORCHESTRATOR_TPU_COMPILER_PYTHON"
JAX = "jax[tpu]==0.10.2"
DEFAULT_PYTHON = Path(".venv-tpu-compiler") / "bin" / "python"
_TOPOLOGY = re.compile(r"(?:([1-9]\d*)x)?(v2|v3|v4|v5e|v5p|v6e|v7x|tpu7x):([1-9]\d*(?:x[1-9]\d*){1,2})", re.IGNORECASE)
_TOPOLOGY_HINT = "KIND:SIZE, as v5e:16x16, v6e:8x8, v4:4x4x4, v5p:4x4x4, v7x:4x4x4; several slices: 2xv5e:16x16"
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
class CompileTopology:
    """Chips and their wiring.

    Attributes:
        slices: groups of chips of the same size, with the data-centre network between them.
        kind: generation of the chip, as the compiler calls it.
        size: chips of a slice along each axis of its torus, as `4x4`.
    """

    slices: int
    kind: str
    size: str

    @classmethod
    def parse(cls, text: str) -> CompileTopology:
        """Read `KIND:SIZE` or `SLICESxKIND:SIZE`.

        Args:
            text: of the topology.

        Raises:
            ConfigError: it is neither.
        """
        match = _TOPOLOGY.fullmatch(text)
        if match is None:
            raise ConfigError("not a TPU topology", got=f"topology={text}", allowed=_TOPOLOGY_HINT)
        slices, kind, size = match.groups()
        kind = kind.lower()
        return cls(int(slices or 1), "tpu7x" if kind == "v7x" else kind, size)


@dataclass(frozen=True)
class Verdict:
    """The compiler's result for a program.

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
    """Return the interpreter of the compiler's environment.

    Raises:
        MissingExtraError: it is not there.
    """
    root = Path(__file__).resolve().parents[2]
    python = Path(os.environ.get(PYTHON_VARIABLE) or root / DEFAULT_PYTHON)
    if not python.is_file():
        raise MissingCompilerError(f"no {python}")
    return python


class MissingCompilerError(MissingExtraError):
    """The environment of the TPU compiler is missing. No extra brings it: it cannot be that of torch_xla.

    Args:
        got: what is there instead.
    """

    def __init__(self, got: str):
        super(MissingExtraError, self).__init__(
            "a rehearsal needs Google's TPU compiler, in an environment of its own",
            got=got,
            allowed=f"a Python that has {JAX}: x86-64 Linux, 1.3 GB",
            fix=f"run scripts/setup tpu-compiler, or name such a Python in {PYTHON_VARIABLE}",
        )


def count_devices(topology: str) -> int:
    """Return the devices of a topology, as the compiler counts them: chips of v2, v3 and v7x have two.

    Args:
        topology: such as `v5e:4x4`.

    Raises:
        ConfigError: there is no such topology.
        MissingExtraError: there is no compiler.
    """
    CompileTopology.parse(topology)
    answer, reason = _ask(["describe", topology], _DESCRIBE_SECONDS)
    if "devices" not in answer:
        said = answer.get("error", reason)
        raise ConfigError(
            f"the compiler does not know the topology: {said}", got=f"topology={topology}", allowed=_TOPOLOGY_HINT
        )
    return int(answer["devices"])


def compile_program(program: Path, topology: str, timeout_seconds: float, degrees: Sequence[int] = ()) -> Verdict:
    """Compile a StableHLO program, partitioned over all devices of the topology.

    Args:
        program: file of StableHLO text.
        topology: of the devices, such as `v5e:4x4`.
        timeout_seconds: after which the compiler is ended.
        degrees: of the axes of the program's mesh, which is laid over the devices as in a run; none: the partitions go
            in the compiler's order of the devices.

    Raises:
        MissingExtraError: there is no compiler.
    """
    words = ["compile", topology, str(program.resolve()), *map(str, degrees)]
    answer, reason = _ask(words, timeout_seconds)
    seconds = answer.get("compile_seconds")
    if "memory_bytes" in answer:
        return Verdict("fits", "", seconds, answer["memory_bytes"])
    error = answer.get("error", "")
    if "RESOURCE_EXHAUSTED" in error and "memory" in error:
        return Verdict("does not fit", error, seconds)
    return Verdict("unknown", f"the compiler refused the program: {error}" if error else reason)


def _ask(words: list[str], timeout_seconds: float) -> tuple[dict[str, Any], str]:
    """Run the child. Returns its answer, or nothing and what happened to it.

    Raises:
        MissingExtraError: there is no compiler.
    """
    python = compiler_python()
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        log = Path(folder, "log")
        command = [str(python), "-m", "orchestrator.rehearsal.tpu_compiler", str(answer), *words]
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
            said: dict[str, Any] = json.loads(answer.read_text())
            if "missing" in said:
                raise MissingCompilerError(f"{python}, which lacks {said['missing']}")
            return said, ""
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
            program, *degrees = rest
            if degrees:
                devices = _in_mesh(devices, [int(degree) for degree in degrees])
            answer["memory_bytes"] = _compile(Path(program).read_text(), devices)
    except ModuleNotFoundError as error:
        answer["missing"] = error.name
    except Exception as error:  # jax has no narrower class for what its compiler reports
        answer["error"] = f"{error}" or type(error).__name__
    answer["compile_seconds"] = time.monotonic() - start
    # In one go: a crash while the answer is being written must not look like one.
    write_atomically(Path(path), json.dumps(answer))
    return 0


def _devices(text: str) -> list[Any]:
    """Return the devices of a topology, one slice after the other."""
    from jax.experimental import topologies

    topology = CompileTopology.parse(text)
    settings: dict[str, Any] = {}
    if topology.size in ("1x1", "1x1x1"):
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":
        # Both cores of a chip as one device, as the runtime has them.
        settings["chip_config_name"] = "megacore"
    if topology.slices > 1:
        settings["num_slices"] = topology.slices
    name = f"{topology.kind}:{topology.size}"
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    return sorted(described.devices, key=lambda device: getattr(device, "slice_index", None) or 0)


def _in_mesh(devices: list[Any], degrees: list[int]) -> list[Any]:
    """Return the devices in the order in which a run's mesh has them."""
    from orchestrator.hardware.mesh import order_devices

    names = ("coords", "core_on_chip", "slice_index")
    places = [{name: getattr(device, name) for name in names if hasattr(device, name)} for device in devices]
    return [devices[number] for number in order_devices(places, degrees).flat]


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
