"""The accelerators that a SkyPilot job may come to run on: how they are written, and what of them SkyPilot has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import ConfigError, shown

# As SkyPilot's catalogue spells them -> target of the product. It looks them up online, and takes any name offline.
_TARGETS: Mapping[str, tuple[str, ...]] = {
    "cuda": (
        *("A10", "A10G", "A100", "A100-80GB", "A100-80GB-SXM", "B200", "B300", "GB200", "GB300", "H100", "H100-MEGA"),
        *("H100-SXM", "H200", "H200-SXM", "L4", "L40", "L40S", "RTXPRO6000", "T4", "V100", "V100-32GB"),
    ),
    "rocm": ("MI300X", "MI325X", "MI355X"),
    "trainium": ("Trainium", "Trainium2"),
}
_GPUS = {name: target for target, names in _TARGETS.items() for name in names}
_TPU = re.compile(r"tpu-(v[0-9]+[a-z]*)-([0-9]{1,4})")
# Generation -> (software of the machine, what the size counts per chip, the sizes in chips). SkyPilot's own default is
# one for v2 to v4 wherever it knows no better.
_FLAT, _CUBIC = (1, 4, 8, 16, 32, 64, 128, 256), (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TPUS: Mapping[str, tuple[str | None, int, tuple[int, ...]]] = {
    "v4": ("tpu-ubuntu2204-base", 2, _CUBIC),
    "v5litepod": ("v2-alpha-tpuv5-lite", 1, _FLAT),
    "v5p": ("v2-alpha-tpuv5", 2, _CUBIC),
    "v6e": ("v2-alpha-tpuv6e", 1, _FLAT),
    "v7x": (None, 1, _CUBIC),
}
_CLOUDS = (
    *("aws", "azure", "cudo", "do", "fluidstack", "gcp", "hyperbolic", "ibm", "k8s", "kubernetes", "lambda", "mithril"),
    *("nebius", "oci", "paperspace", "primeintellect", "runpod", "scp", "seeweb", "shadeform", "slurm", "ssh", "vast"),
    *("verda", "vsphere", "yotta"),
)


@dataclass(frozen=True)
class SkyCandidate:
    """An accelerator that the job may run on.

    Attributes:
        text: as the user wrote it.
        name: as SkyPilot has it.
        count: of a host; of a TPU always 1, the slice.
        spot: whether it may be taken away.
        infra: cloud, cloud/region or cloud/region/zone; None for any.
        target: of the product.
        runtime_version: of a TPU's machine.
    """

    text: str
    name: str
    count: int
    spot: bool
    infra: str | None
    target: str
    runtime_version: str | None = None

    @property
    def is_tpu(self) -> bool:
        """Whether it is a slice of TPUs, with its own hosts."""
        return self.target == "tpu"


def parse_candidate(text: str, runtime_version: str | None) -> SkyCandidate:
    """Parse `[INFRA/]ACCELERATOR[:COUNT][:spot]`.

    Args:
        text: such as `gcp/tpu-v6e-8:spot`.
        runtime_version: software of TPU machines; None for that of the generation.

    Raises:
        ConfigError: SkyPilot has no such accelerator, cloud or number.
    """
    infra, _, rest = text.rpartition("/")
    if infra and infra.split("/")[0].lower() not in _CLOUDS:
        cloud = infra.split("/")[0]
        raise _error("SkyPilot knows no such cloud", text, ", ".join(_CLOUDS), cloud, _CLOUDS)
    name, *options = rest.split(":")
    spot = "spot" in options
    numbers = [option for option in options if option != "spot"]
    if len(numbers) > 1 or not all(re.fullmatch(r"[1-9][0-9]{0,2}", number) for number in numbers):
        raise _error("a candidate is [INFRA/]ACCELERATOR[:COUNT][:spot]", text, "such as gcp/tpu-v6e-8:spot, H100:8")
    count = int(numbers[0]) if numbers else 1
    if name.lower().startswith("tpu"):
        return _tpu(SkyCandidate(text, name, count, spot, infra or None, "tpu"), bool(numbers), runtime_version)
    if name not in _GPUS:
        known = [*_GPUS, *(f"tpu-{generation}-N" for generation in _TPUS)]
        raise _error("SkyPilot has no such accelerator", text, ", ".join(known), name, known)
    return SkyCandidate(text, name, count, spot, infra or None, _GPUS[name])


def _tpu(candidate: SkyCandidate, counted: bool, runtime_version: str | None) -> SkyCandidate:
    text, match = candidate.text, _TPU.fullmatch(candidate.name)
    if match is None or match[1] not in _TPUS:
        known = [f"tpu-{generation}-N" for generation in _TPUS]
        raise _error("SkyPilot has no such TPU that the product runs on", text, ", ".join(known), candidate.name, known)
    usual, per_chip, chips = _TPUS[match[1]]
    if counted:
        raise _error("a TPU is one slice, whose size stands in its name", text, f"{candidate.name}, without a number")
    sizes = [size * per_chip for size in chips]
    if int(match[2]) not in sizes:
        raise _error(f"a slice of tpu-{match[1]} has no such size", text, ", ".join(map(str, sizes)))
    if candidate.infra and candidate.infra.split("/")[0].lower() not in ("gcp", "k8s", "kubernetes"):
        raise _error("TPUs are Google's", text, f"gcp/{candidate.name}")
    if runtime_version is None and usual is None:
        raise ConfigError(
            f"the software of a machine with tpu-{match[1]} is not known here, and SkyPilot takes that of the v2",
            got=f"launch.candidates: {text} with launch.runtime_version=null",
            fix="launch.runtime_version=..., as Google's page on TPU software versions has it",
        )
    version = runtime_version or usual
    return SkyCandidate(text, candidate.name, 1, candidate.spot, candidate.infra, "tpu", version)


def _error(what: str, text: str, allowed: str, word: str = "", known: list[str] | tuple[str, ...] = ()) -> ConfigError:
    close = difflib.get_close_matches(word, known, n=1)
    fix = f"did you mean '{close[0]}'?" if close else None
    return ConfigError(what, got=f"launch.candidates: {shown(text)}", allowed=allowed, fix=fix)
