"""Write and check what stands for whole files of a checkpoint: in-toto statement and OpenSSF model signature."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.dsse import unseal
from orchestrator.checkpoint.format import MANIFEST, MODEL_SIGNATURE, SIGNATURE, SIGNATURES, STATEMENT
from orchestrator.checkpoint.keys import ECDSA, ED25519, PrivateKey, PublicKey, private_key
from orchestrator.checkpoint.model_signature import MAX_MODEL_SIGNATURE_BYTES, ModelSigner, parse_model_signature
from orchestrator.checkpoint.signing import Trust, signed_by
from orchestrator.checkpoint.statement import (
    MAX_STATEMENT_BYTES,
    TELLS_OF,
    make_statement,
    open_statement,
    other_files,
    seal_statement,
    untrue,
)
from orchestrator.checkpoint.storage import children, read_bounded, there
from orchestrator.errors import CheckpointError, UserError, shown

_LIMITS = {STATEMENT: MAX_STATEMENT_BYTES, MODEL_SIGNATURE: MAX_MODEL_SIGNATURE_BYTES}
_NAMED = 8


class Attester:
    """Signs whole files.

    Args:
        statement_keys: that sign the statement; none: there is none.
        model_key: that signs in the format of OpenSSF Model Signing; None: no such signature.

    Attributes:
        tells_of: names of the small files that a statement tells of.
    """

    tells_of = TELLS_OF

    def __init__(self, statement_keys: Sequence[PrivateKey] = (), model_key: PrivateKey | None = None):
        self._statement_keys = statement_keys
        self._model_signer = ModelSigner(model_key) if model_key else None

    def __call__(
        self, name: str, step: int, manifest: bytes, digests: Mapping[str, str], small: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """Return what is to be written beside the manifest, by name.

        Args:
            name: of the checkpoint's directory.
            step: of the manifest.
            manifest: its content.
            digests: SHA-256 of every file that it lists, in hex, by name.
            small: the content of the files that a statement tells of, by name.
        """
        every = {**digests, MANIFEST: hashlib.sha256(manifest).hexdigest()}
        result = {}
        if self._statement_keys:
            content = seal_statement(make_statement(step, every, small.__getitem__), self._statement_keys)
            open_statement(unseal(content))  # nothing is written that is refused by whoever reads it
            result[STATEMENT] = content
        if self._model_signer:
            result[MODEL_SIGNATURE] = self._model_signer.sign(name, every)
        return result


def attester(signing_key: str | None, model_signing_key: str | None, statement: bool) -> Attester | None:
    """Read the keys that stand for whole files; None where nothing of the kind is asked for.

    Args:
        signing_key: path of an Ed25519 key.
        model_signing_key: path of an ECDSA key.
        statement: whether there is to be a statement, signed by all the keys there are.

    Raises:
        ConfigError: a file that is no such key.
        MissingExtraError: a library is not installed.
    """
    if not attests(model_signing_key, statement):
        return None
    model_key = (
        private_key(model_signing_key, "checkpoint.model_signing_key", ECDSA) if model_signing_key is not None else None
    )
    keys = [private_key(signing_key, "checkpoint.signing_key", ED25519)] if signing_key and statement else []
    return Attester([*keys, *([model_key] if model_key else [])] if statement else [], model_key)


def attests(model_signing_key: str | None, statement: bool) -> bool:
    """Return whether whole files are signed, for which each process that writes some has to hash them.

    Args:
        model_signing_key: path of an ECDSA key, or None.
        statement: whether there is to be a statement.
    """
    return statement or model_signing_key is not None


@dataclass(frozen=True)
class Examined:
    """What was found of one signature of a checkpoint.

    Attributes:
        name: of its file.
        text: what there is to say of it, in a line.
        by: the trusted keys that have signed it; none: nothing of it is believed.
        wrong: why the checkpoint is refused; empty where it is not.
    """

    name: str
    text: str
    by: tuple[PublicKey, ...] = ()
    wrong: tuple[str, ...] = ()


def attested(checkpoint: Checkpoint) -> list[str]:
    """Return which files of a checkpoint stand for whole files, by name.

    Args:
        checkpoint: the checkpoint.

    Raises:
        CheckpointError: the store cannot be asked.
    """
    try:
        return [name for name in (STATEMENT, MODEL_SIGNATURE) if there(checkpoint.directory / name)]
    except OSError as error:
        raise CheckpointError(
            f"the signatures cannot be read: {error.strerror or error}", got=checkpoint.directory
        ) from None


def examine(checkpoint: Checkpoint, digests: Mapping[str, str], trust: Trust) -> list[Examined]:
    """Check all signatures of a checkpoint.

    Args:
        checkpoint: the checkpoint, opened under `trust`, whose files were compared with its manifest.
        digests: SHA-256 of every file that the manifest lists, in hex, by name; empty where it is not `attested`.
        trust: the keys that are believed.
    """
    every = {**digests, MANIFEST: hashlib.sha256(checkpoint.content).hexdigest()}
    looks = {STATEMENT: _examine_statement, MODEL_SIGNATURE: _examine_model_signature}
    found = []
    if checkpoint.signature is not None:
        public = signed_by(checkpoint.signature, checkpoint.directory)
        by = tuple(key for key in trust.keys if key.raw == public)
        name = PublicKey(ED25519, ED25519, b"", public).keyid[:12]
        unchecked = f"signed by key {name}: not checked, as no Ed25519 key is among trusted_keys"
        found.append(Examined(SIGNATURE, f"signed by {_names(by, trust)}" if by else unchecked, by))
    for name in attested(checkpoint):
        try:
            found.append(looks[name](checkpoint, _read(checkpoint, name), every, trust))
        except UserError as error:
            found.append(Examined(name, "refused", wrong=(str(error.what) + _got(error),)))
    return found


def strangers(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a line for each file in the directory that neither the manifest lists nor is a signature.

    A reader passes them over. Where whole files are signed, they are damage.

    Args:
        checkpoint: the checkpoint.
    """
    known = {MANIFEST, *SIGNATURES, *checkpoint.manifest.files}
    names = sorted(path.name for path in children(checkpoint.directory) if path.name not in known)
    yield from (f"'{shown(name)}' lies in the checkpoint, and the manifest does not list it" for name in names[:_NAMED])
    if len(names) > _NAMED:
        yield f"{len(names) - _NAMED} more files that the manifest does not list"
    yield from (
        f"the manifest lists '{name}', which is the name of a signature"
        for name in SIGNATURES
        if name in checkpoint.manifest.files
    )


def hash_files(checkpoint: Checkpoint, progress: Any = lambda done: None) -> tuple[list[str], dict[str, str]]:
    """Read every file once: compare its pieces with the manifest, and hash the whole of it.

    Args:
        checkpoint: the checkpoint.
        progress: told the number of bytes of each stretch that was read.

    Returns:
        A line for each damaged piece, and the SHA-256 of each file in hex, by name.
    """
    places: dict[str, list[Any]] = {name: [] for name in checkpoint.manifest.files}
    for place in checkpoint.places():
        places[place.file].append(place)

    def look(name: str) -> tuple[list[str], str]:
        whole, damage = hashlib.sha256(), []
        for place in places[name]:

            def tell(part: memoryview) -> None:
                whole.update(part)
                progress(len(part))

            if reason := checkpoint.compare(place, tell):
                damage.append(str(checkpoint.damage_at(place, reason)))
        return damage, whole.hexdigest()

    with ThreadPoolExecutor() as pool:
        results = dict(zip(places, pool.map(look, places), strict=True))
    damage = [text for found, _ in results.values() for text in found]
    return damage, {name: digest for name, (_, digest) in results.items()}


def _examine_statement(checkpoint: Checkpoint, content: bytes, every: Mapping[str, str], trust: Trust) -> Examined:
    envelope = unseal(content)
    by = tuple(envelope.signed_by(trust.keys))
    if trust.keys and not by:
        signers = ", ".join(shown(keyid, 64) for keyid, _ in envelope.signatures) or "nobody"
        return Examined(STATEMENT, "refused", wrong=(f"the statement is signed by {signers}, no trusted key",))
    statement = open_statement(envelope)
    if statement is None:
        return Examined(STATEMENT, "of a kind that this version does not know: not read")
    said = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    wrong = [*other_files(said, every)]
    predicate = statement["predicate"]
    if not wrong:
        wrong = [*untrue(predicate, make_statement(checkpoint.step, every, checkpoint.read)["predicate"])]
    if wrong:
        return Examined(STATEMENT, "refused", by, tuple(f"the statement: {text}" for text in wrong))
    legs = predicate.get("legs", [])
    checks = predicate.get("handover", {}).get("checks", [])
    verdicts = ", ".join(one["verdict"] for one in checks) or "none made"
    data = shown(predicate.get("data", {}).get("fingerprint", "unknown"), 12)
    about = f"step {checkpoint.step}, {len(legs)} legs, data {data}, handover checks: {verdicts}"
    if by:
        return Examined(STATEMENT, f"signed by {_names(by, trust)}: {about}", by)
    signers = ", ".join(shown(keyid, 12) for keyid, _ in envelope.signatures)
    unbelieved = f"signed by {signers}: not believed, as no trusted_keys are given" if signers else "not signed"
    return Examined(STATEMENT, f"{unbelieved}. It says: {about}")


def _examine_model_signature(
    checkpoint: Checkpoint, content: bytes, every: Mapping[str, str], trust: Trust
) -> Examined:
    signature = parse_model_signature(content)
    keys = [key for key in trust.keys if key.kind == ECDSA]
    if signature.unknown:
        return Examined(MODEL_SIGNATURE, f"{signature.unknown}: not checked here, model_signing verify does")
    if not keys:
        text = f"signed by key {shown(signature.hint, 12)}: not checked, as no ECDSA key is among trusted_keys"
        return Examined(MODEL_SIGNATURE, text)
    others = [name for name in SIGNATURES if name != MODEL_SIGNATURE and name not in signature.ignored]
    beside = {
        name: hashlib.sha256(_read(checkpoint, name)).hexdigest()
        for name in others
        if there(checkpoint.directory / name)
    }
    files = {**every, **beside}
    key = signature.check(keys, checkpoint.directory.name, files)
    if key is None:
        text = f"the model signature is signed by key {shown(signature.hint, 64)}, no trusted key"
        return Examined(MODEL_SIGNATURE, "refused", wrong=(text,))
    return Examined(MODEL_SIGNATURE, f"signed by {_names([key], trust)}: {len(files)} files", (key,))


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    try:
        return read_bounded(checkpoint.directory / name, _LIMITS.get(name, MAX_STATEMENT_BYTES))
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None


def _names(keys: Sequence[PublicKey], trust: Trust) -> str:
    files = dict(zip(trust.keys, trust.files, strict=False))
    return " and ".join(f"a trusted key ({files.get(key, key.keyid[:12])})" for key in keys)


def _got(error: UserError) -> str:
    return f" ({error.got})" if error.got else ""
