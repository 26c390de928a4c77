"""Signatures that others can check: OpenSSF Model Signing by its own command line, in-toto by independent readers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("model_signing")

from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf import json_format
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementPb
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from orchestrator.checkpoint.attestation import attested, attester, examine, hash_files, strangers
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.dsse import IN_TOTO, seal, unseal
from orchestrator.checkpoint.format import MANIFEST, MODEL_SIGNATURE, SIGNATURE, STATEMENT
from orchestrator.checkpoint.keys import ECDSA, ED25519, private_key
from orchestrator.checkpoint.signing import signer, trust
from orchestrator.checkpoint.statement import seal_statement
from orchestrator.checkpoint.storage import locate
from orchestrator.cli import main
from orchestrator.errors import CheckpointError, ConfigError, MissingExtraError
from tests.lab.checkpoints import files_of, small_model, write_whole
from tests.lab.keys import make_key

LEG = {"leg": 0, "start_step": 0, "end_step": 3, "target": "cpu", "layout": {"fsdp": 2}, "host": "secret.example"}
CHECKED = {"leg": 1, "start_step": 3, "end_step": 7, "handover": {"step": 3, "verdict": "agrees", "loss": 1e-7}}
EXTRA = {
    "history.json": json.dumps({"legs": [LEG, CHECKED], "rows": [{"step": 1, "loss": 2.0}]}).encode(),
    "handover.json": b'{"loss": 1.5, "grad_norm": 0.25}',
}
STATE = {"step": 7, "data": {"fingerprint": "abc" * 9, "seed": 2**60 + 1}, "software": {"torch": "2.13.0"}}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    kinds = {"ours": ED25519, "theirs": ED25519, "ec": ECDSA, "their_ec": ECDSA}
    return {name: make_key(folder, name, kind) for name, kind in kinds.items()}


def _write(parent: Path, keys, **options) -> Path:
    tensors, config = small_model()
    private = [keys[name][0] for name in ("ours", "ec")]
    given = {"sign": signer(private[0]), "attest": attester(*private, True), **options}
    return write_whole(parent, tensors, step=7, config=config, state=STATE, extra=EXTRA, **given)


@pytest.fixture(scope="module")
def original(tmp_path_factory, keys):
    return _write(tmp_path_factory.mktemp("original"), keys)


@pytest.fixture
def saved(tmp_path, original):
    """Under another name: a checkpoint that is copied or moved keeps its signatures."""
    return Path(shutil.copytree(original, tmp_path / "moved"))


def _trust(keys, *names):
    return trust([keys[name][1] for name in names], required=False)


def _problems(path, trusted) -> list[str]:
    checkpoint = Checkpoint(path, trusted)
    damage, digests = hash_files(checkpoint)
    wrong = [text for one in examine(checkpoint, digests, trusted) for text in one.wrong]
    return [*damage, *wrong, *strangers(checkpoint)]


def _model_signing(command: str, path: Path, *words) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "model_signing", command, "key", str(path), "--signature", path / MODEL_SIGNATURE]
    return subprocess.run([*map(str, line), *words], capture_output=True, text=True)


def _verifies(path: Path, keys, key: str = "ec") -> bool:
    done = _model_signing("verify", path, "--public_key", keys[key][1])
    assert ("Verification succeeded" in done.stdout) == (done.returncode == 0)
    return done.returncode == 0


def _in_toto_problems(path: Path, pems: list[str]) -> list[str]:
    """As a program reads it that knows in-toto and nothing of checkpoints."""
    envelope = Envelope.from_dict(json.loads((path / STATEMENT).read_text()))
    public = [SSlibKey.from_crypto(load_pem_public_key(Path(pem).read_bytes())) for pem in pems]
    assert len(envelope.verify(public, len(public))) == len(public)
    assert envelope.payload_type == IN_TOTO
    statement = Statement.copy_from_pb(json_format.Parse(envelope.payload, StatementPb()))
    statement.validate()
    said = {subject.name: subject.digest["sha256"] for subject in statement.pb.subject}
    names = {file.name for file in path.iterdir()} - {SIGNATURE, STATEMENT, MODEL_SIGNATURE}
    found = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    return sorted(name for name in said.keys() | names if said.get(name) != found.get(name))


def _flip(path: Path, place: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("hash", ["sha256", "blake3"])
def test_others_verify_what_is_written(tmp_path, keys, hash):
    path = _write(tmp_path, keys, hash=hash)
    assert _verifies(path, keys)
    assert _in_toto_problems(path, [keys["ours"][1], keys["ec"][1]]) == []
    assert _problems(path, _trust(keys, "ours", "ec")) == []


@pytest.mark.parametrize(
    "fault", ["rank-00000.safetensors", "config.yaml", "history.json", MANIFEST, "a file more", "a file less"]
)
def test_one_bit_or_one_file_fails_everywhere(saved, keys, fault):
    if fault == "a file more":
        (saved / "notes.txt").write_text("new")
    elif fault == "a file less":
        (saved / "sums.json").unlink()
    else:
        _flip(saved / fault)
    assert _in_toto_problems(saved, [keys["ours"][1]]) != []
    with pytest.raises(CheckpointError, match=r"damaged|does not match|not that of its manifest|XX"):
        raise CheckpointError("; ".join(_problems(saved, _trust(keys, "ec"))).replace("notes.txt", "XX"))
    if fault in ("rank-00000.safetensors", "a file more"):  # each takes a second or two
        assert not _verifies(saved, keys)


def test_every_bit_of_the_signatures(saved, keys):
    """The payloads, the signatures, the names of the keys."""
    (saved / SIGNATURE).unlink()
    checkpoint = Checkpoint(saved)
    digests, trusted = hash_files(checkpoint)[1], _trust(keys, "ours", "ec")
    chance = random.Random(0)
    for name, end in ((STATEMENT, b"\n"), (MODEL_SIGNATURE, b'","keyid"')):
        content, missed = (saved / name).read_bytes(), []
        start, stop = content.index(b'"payload"'), content.index(end)
        for _ in range(200):
            place, bit = chance.randrange(start, stop), chance.randrange(8)
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (saved / name).write_bytes(changed)
            found = {one.name: one for one in examine(checkpoint, digests, trusted)}[name]
            if not found.wrong and len(found.by) == (2 if name == STATEMENT else 1):
                missed.append((place, bit))
        (saved / name).write_bytes(content)
        assert not missed


def test_what_a_statement_tells(saved, keys):
    statement = json.loads(unseal((saved / STATEMENT).read_bytes()).payload)
    predicate = statement["predicate"]
    assert [leg["end_step"] for leg in predicate["legs"]] == [3, 7]
    assert "secret" not in json.dumps(statement), "of a leg only what is named"
    assert predicate["handover"]["checks"] == [{"leg": 1, **CHECKED["handover"]}]
    assert predicate["handover"]["recorded"] == {"loss": 1.5, "grad_norm": 0.25}
    assert predicate["configuration"]["digest"] == {
        "sha256": hashlib.sha256((saved / "config.yaml").read_bytes()).hexdigest()
    }
    assert (predicate["data"]["seed"], predicate["software"]) == (str(2**60 + 1), {"torch": "2.13.0"})
    assert {one["name"] for one in statement["subject"]} == {MANIFEST, *files_of(saved)}


def test_without_keys_nothing_is_believed(saved, keys):
    checkpoint = Checkpoint(saved)
    found = examine(checkpoint, hash_files(checkpoint)[1], trust([], False))
    assert [one.name for one in found] == [SIGNATURE, STATEMENT, MODEL_SIGNATURE]
    assert all(not one.by and not one.wrong for one in found)
    assert [next(word for word in ("not checked", "not believed") if word in one.text) for one in found] == [
        "not checked",
        "not believed",
        "not checked",
    ]


@pytest.mark.parametrize(("trusted", "refused"), [("theirs", {STATEMENT}), ("their_ec", {STATEMENT, MODEL_SIGNATURE})])
def test_a_strangers_signature(saved, keys, trusted, refused):
    (saved / SIGNATURE).unlink()
    checkpoint = Checkpoint(saved)
    found = examine(checkpoint, hash_files(checkpoint)[1], _trust(keys, trusted))
    assert {one.name for one in found if one.wrong} == refused
    assert all("no trusted key" in text for one in found for text in one.wrong)


def _statement(path: Path) -> dict:
    return json.loads(unseal((path / STATEMENT).read_bytes()).payload)


def _resign(path: Path, statement: dict, *private: str) -> None:
    (path / STATEMENT).write_bytes(seal_statement(statement, [private_key(file, "x", ED25519) for file in private]))


def test_a_signed_lie_is_refused(saved, keys):
    """By a key that is trusted: what it says is compared with the files all the same."""
    statement = _statement(saved)
    statement["predicate"]["handover"]["checks"][0]["loss"] = 0
    _resign(saved, statement, keys["ours"][0])
    assert "handover/checks/0/loss" in "".join(_problems(saved, _trust(keys, "ours")))
    statement = _statement(saved)
    statement["predicate"]["handover"]["checks"][0]["loss"] = 1e-7
    statement["predicate"]["added_later"] = True
    _resign(saved, statement, keys["ours"][0])
    assert _problems(saved, _trust(keys, "ours")) == []
    statement["subject"].pop()
    _resign(saved, statement, keys["ours"][0])
    assert "in the checkpoint and not signed" in "".join(_problems(saved, _trust(keys, "ours")))


def test_statements_that_are_none_of_ours(saved, keys):
    trusted, checkpoint = _trust(keys, "ours"), Checkpoint(saved)
    digests = hash_files(checkpoint)[1]

    def look(content: bytes, trusted=trusted):
        (saved / STATEMENT).write_bytes(content)
        return {one.name: one for one in examine(checkpoint, digests, trusted)}[STATEMENT]

    statement = _statement(saved)
    unsigned = seal(json.dumps(statement).encode(), IN_TOTO, [])
    assert "no trusted key" in look(unsigned).wrong[0]
    assert "not signed" in look(unsigned, trust([], False)).text
    ours = [private_key(keys["ours"][0], "x", ED25519)]
    foreign = look(
        seal(json.dumps({**statement, "predicateType": "https://slsa.dev/provenance/v1"}).encode(), IN_TOTO, ours)
    )
    assert (foreign.by, foreign.wrong, "not read" in foreign.text) == ((), (), True)
    no_statement = (
        b"",
        b"[]",
        b"null",
        b'{"predicateType": []}',
        b"[" * 5000,
        b'{"predicateType": "a", "a": 1, "a": 2}',
    )
    for payload in (*no_statement, json.dumps({**statement, "subject": []}).encode()):
        found = look(seal(payload, IN_TOTO, ours))
        assert found.wrong or "not read" in found.text
        assert not found.by
    assert "payload is" in look(seal(json.dumps(statement).encode(), "text/plain", ours)).wrong[0]
    for content in (b"", b"{}", b"[]", b"\xff", b'{"payload":1,"payloadType":"","signatures":[]}\n', b"[" * 5000):
        assert "damaged" in look(content).wrong[0]


@pytest.mark.parametrize("name", [STATEMENT, MODEL_SIGNATURE])
def test_what_is_large_or_no_file_is_not_read(saved, keys, name):
    checkpoint, trusted = Checkpoint(saved), _trust(keys, "ours", "ec")
    digests = hash_files(checkpoint)[1]
    (saved / name).unlink()
    for make in (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40), os.mkfifo, os.mkdir):
        make(saved / name)
        found = {one.name: one for one in examine(checkpoint, digests, trusted)}[name]
        assert found.wrong
        assert not found.by
        (saved / name).rmdir() if (saved / name).is_dir() else (saved / name).unlink()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 5000, b'{"verificationMaterial": null}'])
def test_model_signatures_that_are_none(saved, keys, content):
    (saved / MODEL_SIGNATURE).write_bytes(content)
    assert "the model signature is damaged" in "".join(_problems(saved, _trust(keys, "ours", "ec")))


def test_model_signatures_of_other_kinds_are_said(saved, keys):
    checkpoint = Checkpoint(saved)
    digests, bundle = hash_files(checkpoint)[1], json.loads((saved / MODEL_SIGNATURE).read_text())

    def text(**material) -> str:
        (saved / MODEL_SIGNATURE).write_text(json.dumps({**bundle, **material}))
        found = {one.name: one for one in examine(checkpoint, digests, _trust(keys, "ours", "ec"))}[MODEL_SIGNATURE]
        assert not found.by
        return found.text

    assert "by a certificate or through Sigstore" in text(verificationMaterial={"certificate": {"rawBytes": ""}})
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["serialization"]["hash_type"] = "blake3"
    envelope = {**bundle["dsseEnvelope"], "payload": base64.b64encode(json.dumps(payload).encode()).decode()}
    assert "by another method" in text(dsseEnvelope=envelope)


def test_what_the_other_command_line_has_signed(saved, keys, capsys):
    """It leaves out its own file alone: the other signatures are among what it signs."""
    (saved / MODEL_SIGNATURE).unlink()
    done = _model_signing("sign", saved, "--private_key", keys["ec"][0])
    assert done.returncode == 0, done.stderr
    trusted = _trust(keys, "ours", "ec")
    assert _problems(saved, trusted) == []
    statement = _statement(saved)
    _resign(saved, statement, keys["ours"][0])
    assert "the model signature is not that of these files" in "".join(_problems(saved, trusted))


@pytest.mark.parametrize("curve", ["P-384", "P-521"])
def test_other_curves(tmp_path, saved, curve):
    private, public = make_key(tmp_path, "other", ECDSA, curve)
    (saved / MODEL_SIGNATURE).unlink()
    (saved / STATEMENT).unlink()
    words = [str(saved), "progress=false", f"model_signing_key={private}", "statement=true"]
    assert main(["checkpoint", "sign", *words]) == 0
    assert _in_toto_problems(saved, [public]) == []
    assert _problems(saved, trust([public], False)) == []


def test_sign_and_verify(tmp_path, keys, capsys):
    tensors, config = small_model()
    path = write_whole(tmp_path, tensors, step=7, config=config, state={"step": 7})
    verify = ["checkpoint", "verify", str(path), "progress=false"]

    def call(*words: str) -> tuple[int, str]:
        code = main([*words])
        out, err = capsys.readouterr()
        return code, out + err

    assert call(*verify)[1].splitlines()[-1] == "not signed"
    trusted = f"trusted_keys={keys['ours'][1]},{keys['ec'][1]}"
    code, text = call(*verify, trusted, "require_signature=true")
    assert (code, "not signed by a key of trusted_keys" in text) == (1, True)
    sign = ["checkpoint", "sign", str(path), "progress=false", "statement=true"]
    code, text = call(*sign)
    assert (code, "say which key signs" in text) == (2, True)
    both = [f"signing_key={keys['ours'][0]}", f"model_signing_key={keys['ec'][0]}"]
    code, text = call(*sign, *both)
    assert (code, f"signed: {SIGNATURE}, {STATEMENT}, {MODEL_SIGNATURE}" in text) == (0, True)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    code, text = call(*sign, *both)
    assert (code, "is signed already" in text) == (2, True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert call(*sign, *both, "replace=true")[0] == 0
    code, text = call(*verify, trusted, "require_signature=true")
    assert code == 0, text
    assert [line.split()[0] for line in text.splitlines()[1:]] == [SIGNATURE, STATEMENT, MODEL_SIGNATURE]
    assert text.count("by a trusted key") == 3
    # A key of one kind alone checks what it can.
    code, text = call(*verify, f"trusted_keys={keys['ec'][1]}", "require_signature=true")
    assert (code, text.count("by a trusted key"), "not checked" in text) == (0, 2, True)
    (path / "notes.txt").write_text("new")
    code, text = call(*verify, trusted)
    assert (code, "wrong: 'notes.txt' lies in the checkpoint" in text) == (1, True)
    code, text = call(*sign, *both, "replace=true")
    assert (code, "more in the directory than the checkpoint" in text) == (2, True)
    (path / "notes.txt").unlink()
    _flip(path / "rank-00000.safetensors")
    for words in (verify, [*sign, *both, "replace=true"]):
        code, text = call(*words)
        assert (code in (1, 2), "damaged" in text) == (True, True)


def test_keys_of_the_wrong_kind(keys, tmp_path):
    for asked in ((None, keys["ours"][0], False), (keys["ec"][0], None, True)):
        with pytest.raises(ConfigError) as caught:
            attester(*asked)
        assert "openssl genpkey" in caught.value.fix
    curve = make_key(tmp_path, "other", ECDSA, "secp256k1")
    with pytest.raises(ConfigError, match="no private key that can be used"):
        attester(None, curve[0], False)
    with pytest.raises(ConfigError, match="no public key that can be used"):
        trust([curve[1]], False)
    with pytest.raises(ConfigError, match="none of the trusted keys is of the kind that signs manifests"):
        trust([keys["ec"][1]], True)


def test_without_the_library(saved, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingExtraError, match="model-signing"):
        attester(None, keys["ec"][0], False)
    attester(keys["ours"][0], None, True)
    assert "'model-signing', which is not installed" in "".join(_problems(saved, _trust(keys, "ours", "ec")))
    assert _problems(saved, _trust(keys, "ours")) == []


def test_in_a_store(keys):
    pytest.importorskip("upath")
    path = _write(locate(f"memory://{uuid.uuid4().hex}"), keys)
    assert attested(Checkpoint(path)) == [STATEMENT, MODEL_SIGNATURE]
    trusted = _trust(keys, "ours", "ec")
    assert _problems(path, trusted) == []
    sign = ["checkpoint", "sign", str(path), "progress=false", f"signing_key={keys['theirs'][0]}", "statement=true"]
    assert main([*sign, "replace=true"]) == 0
    assert "signed by" in "".join(_problems(path, _trust(keys, "ec")))
    assert _problems(path, _trust(keys, "theirs")) == []
    (path / "more").write_bytes(b"x")
    assert "'more' lies in the checkpoint" in "".join(_problems(path, _trust(keys, "theirs")))
