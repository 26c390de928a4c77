"""`checkpoint handover`: check that a checkpoint's model computes here what it computed at the save."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config.schema import CheckpointConfig
from orchestrator.errors import CheckpointError, UserError
from orchestrator.output import tell

if TYPE_CHECKING:
    from orchestrator.certify.certificate import OpenedCertificate

_PROGRAM = "python -m orchestrator checkpoint handover"
_HELP = f"""usage: {_PROGRAM} CHECKPOINT [group=option ...] [key=value ...] [certificate=FILE] [--json]

Load the model of a checkpoint onto some hardware and layout, let it compute loss, gradients and logits of the reference
batch that the checkpoint carries, and compare them with what they were when it was saved: what to do on a new machine
before a long job. Nothing is written, and the data of the run is not needed.

CHECKPOINT is latest, a run directory or a checkpoint directory. The configuration is that of the saved run; hardware,
layout and precision are what you give, as for train resume=CHECKPOINT. The certificate of these devices (certify) is
cited: FILE, or the certificate.json in the run directory.

Examples
  {_PROGRAM} latest hardware.devices=4 layout.fsdp=2 layout.tensor=2
  {_PROGRAM} runs/tiny/20260102-030405 hardware=cuda hardware.precision=bf16
  {_PROGRAM} latest hardware=tpu hardware.simulate=4 --json
  {_PROGRAM} latest hardware=trainium certificate=certificates/trn2/certificate.json

Exits with 0 where it agrees, 1 where it differs beyond the tolerance of the precision."""

_CERTIFICATE = "certificate="
_ROWS = (("loss", "loss"), ("grad_norm", "gradient norm"), ("logits", "logits"), ("tensors", "other tensors"))
AGREES, DIFFERS = 0, 1


def main(argv: list[str]) -> int:
    """Run the verb. Returns `AGREES` or `DIFFERS`.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: the checkpoint cannot be read or carries no reference, or does not fit the hardware or the layout.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP)
        return 0
    if not argv or argv[0].startswith("-") or ("=" in argv[0] and not Path(argv[0]).exists()):
        raise CheckpointError(
            "say first which checkpoint is to be checked",
            got=argv[0] if argv else "nothing",
            allowed="latest, a run directory, or a checkpoint directory",
            fix=f"{_PROGRAM} latest hardware=...",
        )
    from orchestrator.certify.certificate import cited
    from orchestrator.config.compose import run_composed
    from orchestrator.launch.canary import run_check

    where, words = argv[0], [word for word in argv[1:] if word != "--json"]
    as_json = len(words) < len(argv) - 1
    named = [word.partition("=")[2] for word in words if word.startswith(_CERTIFICATE)]
    words = [word for word in words if not word.startswith(_CERTIFICATE)]

    def check(composed: Any) -> int:
        settings = composed.config.checkpoint
        # Before anything is measured: a file that was named has to be one.
        opened = _certificate(Path(named[-1]), settings) if named else None
        result = run_check(composed, where)
        if result is None:
            return AGREES
        opened = opened or _beside(result["checkpoint"], settings)
        if opened is not None:
            result["certificate"] = cited(opened, str(result["to"].get("target")))
        print(json.dumps(result, indent=2) if as_json else describe(result))
        return AGREES if result["verdict"] == "agrees" else DIFFERS

    # As for a resumed run, keys are checked together with the saved ones.
    quoted = where.replace("'", r"\'")
    return run_composed([*words, f"resume='{quoted}'"], "orchestrator checkpoint handover", check)


def _certificate(path: Path, settings: CheckpointConfig) -> OpenedCertificate:
    from orchestrator.certify.certificate import read

    return read(path, settings.trusted_keys, settings.require_signature)


def _beside(checkpoint: str, settings: CheckpointConfig) -> OpenedCertificate | None:
    """Read the certificate in the run directory of a checkpoint; None where there is none that can be believed."""
    from orchestrator.certify.certificate import FILE

    path = Path(checkpoint).parent.parent / FILE
    if not path.is_file():
        return None
    try:
        return _certificate(path, settings)
    except UserError as error:
        tell(f"the certificate in the run directory is not cited: {error}", level=logging.WARNING)
        return None


def describe(result: Mapping[str, Any]) -> str:
    """Return the result as text for a terminal.

    Args:
        result: as `handover.json` has it.
    """
    lines = [
        f"{'checkpoint':<15}{result['checkpoint']}, step {result['step']}",
        f"{'saved on':<15}{_side(result['from'])}",
        f"{'measured on':<15}{_side(result['to'])}",
        f"{'changed':<15}{', '.join(result['changed']) or 'nothing'}",
        "",
        f"{'':<15}{'saved':>12}{'measured':>12}{'difference':>12}{'allowed':>10}",
    ]
    for key, name in _ROWS:
        row = result[key]
        values = "".join(f"{_number(row[side]):>12}" for side in ("saved", "measured"))
        difference = (
            "not finite"
            if row["difference"] is None
            else f"{row['difference']:.1e}"
            if key != "tensors"
            else f"{row['difference']:.0f}"
        )
        mark = "" if row["agrees"] else "  differs"
        lines.append(f"{name:<15}{values}{difference:>12}{row['tolerance']:>10g}{mark}")
    lines += [f"{'':<15}{name} has other bits" for name in result["other_bits"]]
    if certificate := result.get("certificate"):
        lines += ["", f"{'certificate':<15}{_cited(certificate)}"]
    return "\n".join([*lines, "", f"{'verdict':<15}{result['verdict']}"])


def _cited(certificate: Mapping[str, Any]) -> str:
    names = certificate["device_names"] or [certificate["target"]]
    of = f"{certificate['target']}, {names[0]}"
    of += "" if certificate["same_target"] else ", which is another target than this one"
    result = "passed" if certificate["passed"] else f"failed: {'; '.join(certificate['failed'][:3])}"
    signed = f"signed by {certificate['signed_by'][:16]}" if certificate["signed_by"] else "not signed"
    lines = [str(certificate["file"]), f"of {of}", f"{result}; {certificate['tier']}; {signed}"]
    return f"\n{'':<15}".join(lines)


def _side(side: Mapping[str, Any]) -> str:
    names = side.get("device_names") or [side.get("target")]
    degrees = " x ".join(f"{axis}={degree}" for axis, degree in (side.get("layout") or {}).items() if degree != 1)
    torch = (side.get("software") or {}).get("torch", "unknown")
    where = f"{side.get('target')}: {side.get('devices')} x {names[0]}"
    return f"{where}, {side.get('precision')}, {degrees or 'single device'}, torch {torch}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
