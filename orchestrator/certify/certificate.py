"""The certificate: what was measured on whose devices, as `certificate.json`, signed as checkpoints are. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.atomic_files import write_atomically
from orchestrator.certify.fixture import STEPS
from orchestrator.certify.kinds import KINDS
from orchestrator.checkpoint.signing import trust
from orchestrator.errors import CheckpointError, ConfigError, shown

FILE, SIGNATURE, PAGE = "certificate.json", "certificate.sig", "certificate.html"
FORMAT, VERSION = "orchestrator-certificate", 1
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
TIERS = {
    "same layout": "bitwise on the same layout",
    "across layouts": "bitwise across layouts",
    "across vendors": "within tolerance across vendors",
}
"""The tiers of determinism, and how they are said."""
_MAX_BYTES = 1 << 22


@dataclass(frozen=True)
class Case:
    """One case of a certificate.

    Attributes:
        name: of `kinds.KINDS`.
        layout: as text; empty for a case of the devices by themselves.
        status: `passed`, `failed`, or `not run`.
        measured: what was measured; None where that was not finite, or could not be measured.
        tolerance: the largest value that passes.
        note: what else is to be said, such as which tensor it was.
    """

    name: str
    layout: str
    status: str
    measured: float | None
    tolerance: float
    note: str = ""

    @property
    def key(self) -> str:
        """Name and layout, in a line."""
        return f"{self.name}, {self.layout}" if self.layout else self.name


@dataclass(frozen=True)
class Certificate:
    """The result of `certify`.

    Attributes:
        made_at: seconds since 1970.
        seconds: that it took.
        device: what the devices are: target, their names and number, chip, host, state.
        runtime: versions of driver and libraries, as the target reports them.
        software: versions of Python packages.
        precision: of the matrix products in all cases but those that say otherwise.
        reference: digest of the recorded reference that the devices were held against.
        layouts: that were tried.
        left_out: a line for each kind of layout that was not, and why.
        cases: in the order in which they ran.
        losses: of the 20 steps, by layout.
        norms: of their gradients, by layout.
    """

    made_at: float
    seconds: float
    device: Mapping[str, Any]
    runtime: Mapping[str, str]
    software: Mapping[str, str]
    precision: str
    reference: str
    layouts: tuple[str, ...]
    left_out: tuple[str, ...]
    cases: tuple[Case, ...]
    losses: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    norms: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every case has passed, and none was left out for a failure."""
        return bool(self.cases) and all(case.status == PASSED for case in self.cases)

    @property
    def failures(self) -> list[Case]:
        """The cases that have not passed."""
        return [case for case in self.cases if case.status != PASSED]

    @property
    def tiers(self) -> dict[str, bool | None]:
        """Which tiers of determinism were reached; None where there was nothing to compare."""
        return {
            "same layout": self._all("determinism", "resume"),
            "across layouts": self._equal_losses() if len(self.losses) > 1 else None,
            "across vendors": self._all("losses", "gradient_norms", "handover_in", "handover_out"),
        }

    def _all(self, *names: str) -> bool | None:
        found = [case.status == PASSED for case in self.cases if case.name in names]
        return all(found) if found else None

    def _equal_losses(self) -> bool:
        series = [list(self.losses[name]) + list(self.norms.get(name, ())) for name in self.losses]
        whole = all(len(one) == 2 * STEPS and None not in one for one in series)
        return whole and all(one == series[0] for one in series)

    @property
    def tier(self) -> str:
        """The tiers that were reached, in a line."""
        return "; ".join(TIERS[name] for name, reached in self.tiers.items() if reached) or "none"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `digest` is of everything else."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self),
            "passed": self.passed,
            "tiers": self.tiers,
        }
        return {**body, "digest": _digest(body)}

    @classmethod
    def from_dict(cls, data: Any) -> Certificate:
        """Take it back from `to_dict`. It may come from a file, so nothing of it is believed.

        Args:
            data: whatever JSON can hold.

        Raises:
            ValueError: it is no certificate of this version, or was changed.
        """
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError("it is of another kind or version")
        if data.get("digest") != _digest({key: value for key, value in data.items() if key != "digest"}):
            raise ValueError("its digest does not match: it was changed")
        kept = {name: data[name] for name in cls.__dataclass_fields__}
        cases = tuple(_case(item) for item in kept["cases"])
        found = cls(**{**kept, "cases": cases, **{name: tuple(map(str, kept[name])) for name in _LINES}})
        if (data["passed"], data["tiers"]) != (found.passed, found.tiers):
            raise ValueError("its verdict is not that of its cases")
        _check(found)
        return found


_LINES = ("layouts", "left_out")


def _case(item: Any) -> Case:
    if not isinstance(item, dict) or item.keys() != Case.__dataclass_fields__.keys():
        raise ValueError("a case that is none")
    case = Case(**item)
    texts = (case.name, case.layout, case.status, case.note)
    numbers = [case.tolerance] + ([] if case.measured is None else [case.measured])
    if not all(isinstance(text, str) for text in texts) or not all(map(_is_number, numbers)):
        raise ValueError("a case with values of other types")
    if case.status == PASSED and not (case.measured is not None and case.measured <= case.tolerance):
        raise ValueError(f"case {shown(case.key)} is beyond its tolerance and called passed")
    return case


def _check(found: Certificate) -> None:
    mappings = (found.device, found.runtime, found.software, found.losses, found.norms)
    series = [value for group in (found.losses, found.norms) for value in group.values()]
    good = all(isinstance(each, dict) for each in mappings) and all(isinstance(each, list) for each in series)
    good = good and all(value is None or _is_number(value) for each in series for value in each)
    if not good or not all(map(_is_number, (found.made_at, found.seconds))):
        raise ValueError("values of other types")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def judge(name: str, layout: str, measured: float | None, note: str = "") -> Case:
    """Make a case of what was measured: it has passed where that is within the tolerance of its kind.

    Args:
        name: of `KINDS`.
        layout: as text.
        measured: the value; None or not a finite number: failed.
        note: what else is to be said.
    """
    value = measured if measured is not None and math.isfinite(measured) else None
    within = value is not None and value <= KINDS[name].tolerance
    return Case(name, layout, PASSED if within else FAILED, value, KINDS[name].tolerance, note)


def write(folder: Path, certificate: Certificate, sign: Callable[[bytes], bytes] | None = None) -> Path:
    """Write `certificate.json`, and `certificate.sig` beside it where there is a key.

    Args:
        folder: that exists.
        certificate: to be written.
        sign: from the file's bytes to the signature file's, as `checkpoint.signing.signer` gives it.

    Returns:
        The path of the file.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(certificate.to_dict(), indent=1, allow_nan=False)
    # The signature first: there is no moment at which a certificate of a signer stands there unsigned.
    if sign is not None:
        write_atomically(folder / SIGNATURE, sign(text.encode()).decode())
    write_atomically(folder / FILE, text)
    return folder / FILE


@dataclass(frozen=True)
class OpenedCertificate:
    """A certificate that was read.

    Attributes:
        path: of its file.
        certificate: what it says.
        signed_by: the public key in hexadecimal; empty where it is not signed. It was verified where keys were given.
        digest: SHA-256 of the file.
    """

    path: Path
    certificate: Certificate
    signed_by: str
    digest: str


def read(path: Path, trusted_keys: Sequence[str] = (), required: bool = False) -> OpenedCertificate:
    """Read a certificate, and verify its signature where there are keys.

    Args:
        path: of `certificate.json`, or of the folder that it is in.
        trusted_keys: PEM files of the public keys that are believed.
        required: one without a signature is refused.

    Raises:
        ConfigError: there is none, it was changed, or its signature is not one of those keys.
        MissingExtraError: keys were given, and `cryptography` is not installed.
    """
    file = path / FILE if path.is_dir() else path
    try:
        with open(file, "rb") as handle:
            content = handle.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        certificate = Certificate.from_dict(json.loads(content))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"this is no certificate: {shown(getattr(error, 'strerror', None) or error)}",
            got=file,
            allowed=f"a {FILE} of this version",
            fix="make one: python -m orchestrator certify hardware=...",
        ) from None
    signature = _signature(file)
    try:
        # Also without keys: a signature that was damaged is noticed.
        trust(trusted_keys, required).check(content, signature, file)
        signed_by = str(json.loads(signature)["public_key"]) if signature else ""
    except CheckpointError as error:
        raise ConfigError(
            error.what.replace("checkpoint", "certificate"), got=error.got, allowed=error.allowed
        ) from None
    return OpenedCertificate(file, certificate, signed_by, hashlib.sha256(content).hexdigest())


def _signature(file: Path) -> bytes | None:
    try:
        with open(file.with_name(SIGNATURE), "rb") as handle:
            return handle.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"the signature cannot be read: {error.strerror}", got=file.with_name(SIGNATURE)) from None


def cited(opened: OpenedCertificate, target: str) -> dict[str, Any]:
    """Return what another result says of a certificate that it rests on.

    Args:
        opened: the certificate.
        target: of the devices that the result is of.
    """
    certificate = opened.certificate
    return {
        "file": str(opened.path),
        "sha256": opened.digest,
        "signed_by": opened.signed_by or None,
        "made_at": certificate.made_at,
        "target": certificate.device.get("target"),
        "device_names": certificate.device.get("device_names"),
        "same_target": certificate.device.get("target") == target,
        "passed": certificate.passed,
        "tier": certificate.tier,
        "failed": [case.key for case in certificate.failures],
    }


def timed(certificate: Certificate, started: float) -> Certificate:
    """Return the certificate with the time that it took.

    Args:
        certificate: complete otherwise.
        started: seconds since 1970.
    """
    return replace(certificate, made_at=started, seconds=time.time() - started)
