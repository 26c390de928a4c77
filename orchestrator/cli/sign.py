"""`checkpoint sign`: sign a checkpoint that is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.cli.checkpoint_text import clean
from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.observe.bar import Bar

if TYPE_CHECKING:
    from orchestrator.checkpoint.checkpoint import Checkpoint

_PROGRAM = "python -m orchestrator checkpoint sign"
_SUMMARY = """Hash every byte of a checkpoint, and sign it. Nothing is signed that is damaged, and no file that was
there is changed. Keys are PEM files without a password."""


@dataclass(frozen=True)
class SignOptions:
    """Options of `checkpoint sign`."""

    path: str = option(help="latest, a run directory, or a checkpoint; of several the newest; s3://..., gs://... too")
    signing_key: str | None = option(None, help="Ed25519 private key: signs the manifest (manifest.sig)")
    model_signing_key: str | None = option(
        None, help="ECDSA private key (P-256, P-384, P-521): signs the files as OpenSSF Model Signing does (model.sig)"
    )
    statement: bool = option(False, help="an in-toto statement, signed by the keys given (provenance.intoto.jsonl)")
    replace: bool = option(False, help="take the place of signatures of these kinds that are there")
    progress: bool = option(True, help="show a progress bar")
    runs_dir: str = option("runs", help="where latest looks")


def main(argv: list[str]) -> int:
    """Run the verb. Returns 0.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: a key or the checkpoint cannot be used, or it is signed already.
    """
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(f"usage: {_PROGRAM} PATH [key=value ...]\n\n{_SUMMARY}\n\n{describe_options(SignOptions)}")
        print(f"\nExample: {_PROGRAM} latest model_signing_key=ec.pem statement=true")
        return 0 if argv else 2
    options = parse_options(SignOptions, argv, ("path",))
    if options.signing_key is None and options.model_signing_key is None:
        fix = "give signing_key=key.pem or model_signing_key=ec.pem"
        raise ConfigError("say which key signs", got="none", fix=f"{fix}: see {_PROGRAM} --help")
    from orchestrator.checkpoint.attestation import attester
    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.checkpoint.signing import signer
    from orchestrator.runs.stored_model import find_checkpoint

    sign = signer(options.signing_key) if options.signing_key else None
    attest = attester(options.signing_key, options.model_signing_key, options.statement)
    checkpoint = Checkpoint(find_checkpoint(options.path, options.runs_dir, lambda text: print(f"warning: {text}")))
    digests = _hash(checkpoint, options.progress)
    contents = {}
    if sign:
        from orchestrator.checkpoint.format import SIGNATURE

        contents[SIGNATURE] = sign(checkpoint.content)
    if attest:
        small = {name: checkpoint.read(name) for name in attest.tells_of if name in digests}
        about = (checkpoint.directory.name, checkpoint.step, checkpoint.content)
        contents |= attest(*about, digests, small)
    _write(checkpoint, contents, options.replace)
    print(f"{clean(checkpoint.directory)}: {len(digests)} files, signed: {', '.join(contents)}")
    return 0


def _hash(checkpoint: Checkpoint, progress: bool) -> dict[str, str]:
    from orchestrator.checkpoint.attestation import hash_files, strangers
    from orchestrator.checkpoint.checkpoint import damaged_error

    total = sum(file.bytes for file in checkpoint.manifest.files.values())
    with Bar("verify", total, progress) as bar:
        damage, digests = hash_files(checkpoint, bar.add)
    if damage:
        raise damaged_error(checkpoint.directory, [text.partition(" ")[0] for text in damage], damage)
    if others := list(strangers(checkpoint)):
        raise CheckpointError(
            "there is more in the directory than the checkpoint",
            got="; ".join(others),
            fix="take it away: readers of the signature would refuse it",
        )
    return digests


def _write(checkpoint: Checkpoint, contents: dict[str, bytes], replace: bool) -> None:
    from orchestrator.checkpoint.storage import put_last, there

    try:
        if (old := [name for name in contents if there(checkpoint.directory / name)]) and not replace:
            raise CheckpointError(
                "the checkpoint is signed already",
                got=f"{', '.join(old)} in {checkpoint.directory}",
                fix="add replace=true if yours is to take the place of it",
            )
        for name, content in contents.items():
            put_last(checkpoint.directory / name, content)
    except OSError as error:
        raise CheckpointError(
            f"the signature could not be written: {error.strerror or error}", got=checkpoint.directory
        ) from None
