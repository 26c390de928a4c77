"""`python -m orchestrator certify`: whether devices compute what they should, before a run trusts them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError, ConfigErrors

if TYPE_CHECKING:
    from orchestrator.config.compose import Composed
    from orchestrator.launch.certifying import Certified

_PROGRAM = "python -m orchestrator certify"
_GROUPS = ("hardware", "layout")
_KEYS = ("checkpoint.signing_key", "logger.progress")
PASSED, FAILED = 0, 1

_HELP = """usage: {program} hardware=TARGET [layout=...] [hardware.KEY=value ...] [key=value ...]

Train a small model on these devices, on every kind of layout that they allow, and hold what comes out against what a
CPU gives: initial weights, 20 losses and gradient norms, collectives, gradients, accumulation, saving, loading,
resuming, handovers to the CPU and from it, equal runs, NaN and infinity, and the precision of matrix products against
fp64. A table is printed; certificate.json and a page are written.

Hardware and layout are those of train; the model, its data and its optimizer are always the same. Without layout=... or
layout.AXIS=... each kind is tried. On a CPU 4 processes stand for devices, unless
hardware.devices says another number. checkpoint.signing_key=FILE signs the certificate as it does checkpoints.

Options
  hardware=  kind of devices, as for train; hardware.KEY=value sets what there is to say of them
  layout=    one way of sharding instead of all; layout.AXIS=value sets its degrees
{options}

Examples
  {program} hardware=cpu
  {program} hardware=cuda hardware.devices=8
  {program} hardware=tpu hardware.simulate=4
  {program} hardware=trainium layout.fsdp=8 layout.tensor=4 output=certificates/trn2
  python -m orchestrator compare docs/certificates/cpu.json certificates/trn2

Exits with 0 where all cases have passed, 1 where one has not, 2 where the devices or words cannot be used."""


@dataclass(frozen=True)
class CertifyOptions:
    """Options of `certify`, beside hardware and layout."""

    output: str | None = option(
        None, help="new folder for certificate.json and its page; none: certificates/TARGET-TIME"
    )
    json: bool = option(False, help="print JSON")


def main(argv: list[str]) -> int:
    """Run the verb. Returns `PASSED` or `FAILED`.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: what of the words, the devices or the folder is wrong.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP.format(program=_PROGRAM, options=describe_options(CertifyOptions)))
        return 0
    from orchestrator.certify.fixture import WORDS
    from orchestrator.config.compose import run_composed

    own = [word for word in argv if word.partition("=")[0] in CertifyOptions.__dataclass_fields__]
    options = parse_options(CertifyOptions, own)
    words = [word for word in argv if word not in own]
    _check(words)
    return run_composed([*WORDS, *words], "orchestrator certify", lambda composed: _certify(composed, options))


def _check(words: list[str]) -> None:
    """Refuse what would make it another training than the recorded one.

    Raises:
        ConfigErrors: all words that it does not take.
    """
    wrong = [word for word in words if not _is_taken(word.partition("=")[0].lstrip("+"))]
    if wrong:
        allowed = f"hardware, layout, their keys, {', '.join((*_KEYS, *CertifyOptions.__dataclass_fields__))}"
        what = "a certificate is of one small training, which is always the same"
        raise ConfigErrors([ConfigError(what, got=word, allowed=allowed, fix="leave it out") for word in wrong])


def _is_taken(key: str) -> bool:
    return key.partition(".")[0] in _GROUPS or key in _KEYS


def _certify(composed: Composed, options: CertifyOptions) -> int:
    from orchestrator.launch.certifying import certify

    done = certify(composed, Path(options.output) if options.output else None)
    if done is None:
        return PASSED  # the first process says it
    if options.json:
        files = {"file": str(done.file), "page": str(done.page)}
        print(json.dumps({**done.certificate.to_dict(), **files}, indent=2))
    else:
        print(_report(done))
    return PASSED if done.certificate.passed else FAILED


def _report(done: Certified) -> str:
    from orchestrator.launch.certifier import line_of

    certificate = done.certificate
    device = certificate.device
    names = ", ".join(device["device_names"][:1]) or device["target"]
    simulated = ", simulated" if device["simulated"] else ""
    lines = [
        "",
        *map(line_of, certificate.cases),
        "",
        *(f"not tried  {line}" for line in certificate.left_out),
        f"devices    {device['target']}: {device['devices']} x {names}{simulated}, {certificate.precision}",
        f"determinism {certificate.tier}",
    ]
    failed = len(certificate.failures)
    verdict = "passed" if certificate.passed else f"failed: {failed} of {len(certificate.cases)} cases"
    return "\n".join(
        [
            *lines,
            f"result     {verdict}, in {certificate.seconds:.0f} s",
            f"certificate {done.file}",
            f"page       {done.page}",
        ]
    )
