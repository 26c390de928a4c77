"""Signed manifests: by whom, of what, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("cryptography")

from orchestrator.checkpoint.attestation import examine, hash_files
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.dsse import unseal
from orchestrator.checkpoint.format import MANIFEST, SIGNATURE, STATEMENT
from orchestrator.checkpoint.run_checkpoints import newest_valid
from orchestrator.checkpoint.signing import Trust, signer, trust
from orchestrator.cli import main
from orchestrator.errors import CheckpointError, ConfigError
from tests.lab.checkpoints import small_model, tamper, write_whole
from tests.lab.cli import only_run, run
from tests.lab.keys import make_key
from tests.lab.runs import small_overrides

TENSORS = {"model.a": torch.arange(6.0)}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_key(folder, name) for name in ("ours", "theirs")}


@pytest.fixture
def saved(tmp_path, keys):
    return write_whole(tmp_path, TENSORS, sign=signer(keys["ours"][0]))


def _trusted(keys, *names, required=True) -> Trust:
    return trust([keys[name][1] for name in names], required)


def test_a_signed_checkpoint_is_taken(saved, keys):
    for trusted in (_trusted(keys, "ours"), _trusted(keys, "theirs", "ours"), Trust()):
        Checkpoint(saved, trusted).verify()


def test_openssl_agrees(saved, keys, tmp_path):
    """The signature is a plain one of the file: anybody can check it."""
    data = json.loads((saved / SIGNATURE).read_text())
    (tmp_path / "signature").write_bytes(bytes.fromhex(data["signature"]))
    words = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys["ours"][1], "-rawin", "-in", saved / MANIFEST]
    assert subprocess.run([*words, "-sigfile", tmp_path / "signature"], capture_output=True).returncode == 0
    pem = "".join(Path(keys["ours"][1]).read_text().splitlines()[1:-1])
    assert base64.b64decode(pem)[-32:].hex() == data["public_key"]


def test_a_strangers_signature_is_refused(saved, keys):
    for required in (True, False):
        with pytest.raises(CheckpointError, match="signed by a key that is not trusted"):
            Checkpoint(saved, _trusted(keys, "theirs", required=required))


def test_an_unsigned_one_is_refused_where_that_is_asked(tmp_path, keys):
    path = write_whole(tmp_path, TENSORS)
    Checkpoint(path, _trusted(keys, "ours", required=False))
    with pytest.raises(CheckpointError, match="is not signed"):
        Checkpoint(path, _trusted(keys, "ours"))


def test_a_signature_of_another_manifest(saved, tmp_path, keys):
    other = write_whole(tmp_path, {"model.a": torch.zeros(6)}, step=2, sign=signer(keys["ours"][0]))
    (other / SIGNATURE).write_bytes((saved / SIGNATURE).read_bytes())
    with pytest.raises(CheckpointError, match="not that of its manifest"):
        Checkpoint(other, _trusted(keys, "ours"))


def test_a_manifest_that_was_changed_with_a_fitting_digest(saved, keys):
    tamper(saved, lambda data: data.update(step=7))
    assert Checkpoint(saved).step == 7, "without a key nobody can tell"
    with pytest.raises(CheckpointError, match="not that of its manifest"):
        Checkpoint(saved, _trusted(keys, "ours"))


def test_a_key_that_claims_to_be_another(saved, keys):
    """Their signature with our public key's name on it."""
    data = json.loads(signer(keys["theirs"][0])((saved / MANIFEST).read_bytes()))
    del data["digest"]
    data["public_key"] = json.loads((saved / SIGNATURE).read_text())["public_key"]
    digest = hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (saved / SIGNATURE).write_text(json.dumps({**data, "digest": digest}, separators=(",", ":")))
    with pytest.raises(CheckpointError, match="not that of its manifest"):
        Checkpoint(saved, _trusted(keys, "ours"))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"[" * 3000, b"\xff" * 64, b'{"format": 1}', b"x" * 9999]
)
def test_a_signature_that_is_none(saved, content):
    (saved / SIGNATURE).write_bytes(content)
    for trusted in (Trust(), Trust(required=True)):
        with pytest.raises(CheckpointError):
            Checkpoint(saved, trusted)


def test_the_newest_that_is_trusted(tmp_path, keys):
    ours = write_whole(tmp_path, TENSORS, step=1, sign=signer(keys["ours"][0]))
    write_whole(tmp_path, TENSORS, step=2, sign=signer(keys["theirs"][0]))
    write_whole(tmp_path, TENSORS, step=3)
    said = []
    assert newest_valid(tmp_path, True, said.append, _trusted(keys, "ours")) == ours
    assert ["not signed" in said[0], "not trusted" in said[1]] == [True, True]


def test_keys_that_are_none(tmp_path, keys):
    rsa, locked = tmp_path / "rsa.pem", tmp_path / "locked.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "RSA", "-out", rsa], check=True, capture_output=True)
    words = ["openssl", "genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:x", "-out", locked]
    subprocess.run(words, check=True, capture_output=True)
    (tmp_path / "text.pem").write_text("secret text")
    private, public = keys["ours"]
    for path in (rsa, locked, tmp_path / "text.pem", tmp_path / "nowhere", tmp_path, public):
        with pytest.raises(ConfigError) as caught:
            signer(str(path))
        assert "openssl genpkey" in caught.value.fix
        assert "secret" not in str(caught.value)
    for path in (rsa, tmp_path / "text.pem", tmp_path / "nowhere", private):
        with pytest.raises(ConfigError) as caught:
            trust([str(path)], True)
        assert "-pubout" in caught.value.fix


def test_a_run_signs_and_only_goes_on_from_what_is_signed(tmp_path, keys):
    private, public = keys["ours"]
    asked = (f"checkpoint.trusted_keys=[{public}]", "checkpoint.require_signature=true")
    words = small_overrides(tmp_path, f"checkpoint.signing_key={private}", "train.max_steps=4", "hardware.devices=2")
    more = ("checkpoint.every_steps=2", "checkpoint.keep_last=9", "checkpoint.statement=true")
    model_key = make_key(tmp_path, "ec", "ecdsa") if importlib.util.find_spec("model_signing") else None
    more += (f"checkpoint.model_signing_key={model_key[0]}",) if model_key else ()
    result = run("train", *words, *more, *asked)
    assert result.returncode == 0, result.stderr
    run_dir = only_run(tmp_path / "runs")
    older, newer = (run_dir / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    secret = "".join(Path(private).read_text().splitlines()[1:-1])
    for path in (older, newer):
        Checkpoint(path, _trusted(keys, "ours")).verify()
        for file in path.iterdir():
            assert secret.encode() not in file.read_bytes()
    assert secret not in (run_dir / "config.yaml").read_text()
    trusted = trust([public, *([model_key[1]] if model_key else [])], False)
    for path in (older, newer):
        found = examine(Checkpoint(path), hash_files(Checkpoint(path))[1], trusted)
        assert len(found) == (3 if model_key else 2)
        assert all(one.by and not one.wrong for one in found), found

    # What the run itself asks for holds for `latest`, and nothing that lies in the checkpoint can lift it.
    (newer / SIGNATURE).unlink()
    result = run(
        "train", f"runs_dir={tmp_path / 'runs'}", "resume=latest", "train.max_steps=6", "resume_allow=[schedule]"
    )
    assert result.returncode == 0, result.stderr
    assert "resumed at step 2" in result.stdout
    resumed = unseal((run_dir / "checkpoints" / "step-00000006" / STATEMENT).read_bytes())
    legs = json.loads(resumed.payload)["predicate"]
    assert [leg["end_step"] for leg in legs["legs"]] == [4, 6]
    assert [one["verdict"] for one in legs["handover"]["checks"]] == ["agrees"]
    assert "step-00000004: the checkpoint is not signed" in result.stderr
    result = run(
        "train",
        f"runs_dir={tmp_path / 'new'}",
        f"resume={newer}",
        "train.max_steps=6",
        "resume_allow=[schedule]",
        *asked,
    )
    assert result.returncode == 2
    assert "error: the checkpoint is not signed" in result.stderr


def test_verify_takes_the_keys_that_are_trusted(tmp_path, keys, capsys):
    tensors, config = small_model()
    saved = write_whole(tmp_path, tensors, config=config, sign=signer(keys["ours"][0]))
    words = ["checkpoint", "verify", str(saved), "progress=false", "require_signature=true"]
    assert main([*words, f"trusted_keys={keys['ours'][1]}"]) == 0
    capsys.readouterr()
    assert main([*words, f"trusted_keys={keys['theirs'][1]}"]) == 1
    assert "signed by a key that is not trusted" in capsys.readouterr().out
