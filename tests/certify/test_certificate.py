"""The document: what it says, what is refused when it is read, its signature, its page, and several side by side."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.certify.certificate import (
    FAILED,
    FILE,
    NOT_RUN,
    PASSED,
    SIGNATURE,
    Case,
    Certificate,
    _digest,
    cited,
    judge,
    read,
    write,
)
from orchestrator.certify.differences import Sides
from orchestrator.certify.fixture import WORDS, choose_layouts
from orchestrator.certify.kinds import KINDS
from orchestrator.certify.recorded import batches_digest, recorded
from orchestrator.checkpoint.signing import signer
from orchestrator.cli import handover
from orchestrator.config.compose import compose
from orchestrator.config.schema import CheckpointConfig
from orchestrator.errors import ConfigError
from orchestrator.report.certificate_page import render_certificate

CPU = Path(__file__).parents[2] / "docs" / "certificates" / "cpu.json"


def made(target: str = "cpu", shift: float = 0.0, cases: tuple[Case, ...] = ()) -> Certificate:
    losses = tuple(loss * (1 + shift) for loss in recorded().losses)
    found = cases or tuple(judge(name, "fsdp=2", 0.0) for name in KINDS)
    device = {"target": target, "devices": 2, "device_names": [f"{target} <device>"], "simulated": False}
    series = {"fsdp=2": list(losses)}, {"fsdp=2": list(recorded().norms)}
    return Certificate(
        1.0, 60.0, device, {"torch": "2"}, {"torch": "2"}, "fp32", recorded().digest, ("fsdp=2",), (), found, *series
    )


@pytest.fixture
def keys(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    files = []
    for name in ("ours", "other"):
        key = ed25519.Ed25519PrivateKey.generate()
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub.pem"
        pem = serialization.Encoding.PEM
        plain = serialization.NoEncryption()
        private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
        files.append((str(private), str(public)))
    return files


def test_the_cpu_certificate_of_the_repository_is_of_this_reference():
    certificate = read(CPU).certificate
    assert certificate.passed
    assert certificate.reference == recorded().digest
    assert len(certificate.layouts) == 8
    assert certificate.tiers == {"same layout": True, "across layouts": False, "across vendors": True}
    assert {case.name for case in certificate.cases} == set(KINDS) - {"losses_bf16"}
    assert all(case.tolerance == KINDS[case.name].tolerance for case in certificate.cases)


def test_tolerances_lie_between_rounding_and_products_in_bf16():
    assert batches_digest() == recorded().batches
    for series, kind in (("losses", "losses"), ("norms", "gradient_norms")):
        assert 10 * recorded().fp64[series] < KINDS[kind].tolerance < recorded().bf16[series] / 2


def test_what_is_not_measured_has_not_passed():
    limit = KINDS["losses"].tolerance
    statuses = [judge("losses", "", value).status for value in (0.0, limit, 1.01 * limit, math.nan, math.inf, None)]
    assert statuses == [PASSED, PASSED, FAILED, FAILED, FAILED, FAILED]
    whole = made()
    assert whole.passed
    assert whole.tiers == {"same layout": True, "across layouts": None, "across vendors": True}
    cases = (*whole.cases, Case("resume", "tensor=2", NOT_RUN, None, 0.0))
    assert not replace(whole, cases=cases).passed
    assert replace(whole, cases=cases).tiers["same layout"] is False
    assert not replace(whole, cases=()).passed
    two = {"fsdp=2": whole.losses["fsdp=2"], "tensor=2": []}
    assert replace(whole, losses=two, norms={}).tiers["across layouts"] is False


def changed(data: dict, **changes: object) -> dict:
    """With a digest that fits, as whoever changed it would have made it."""
    body = {key: value for key, value in {**data, **changes}.items() if key != "digest"}
    return {**body, "digest": _digest(body)}


def test_a_changed_certificate_is_refused(tmp_path):
    path = write(tmp_path, made())
    assert read(tmp_path).certificate.cases == made().cases
    data = json.loads(path.read_text())
    failed = [{**data["cases"][0], "measured": 1.0}, *data["cases"][1:]]
    for wrong in (
        {**data, "seconds": 1.0},
        changed(data, cases=failed),
        changed(data, cases=[{**failed[0], "status": FAILED}, *failed[1:]]),
        changed(data, passed=False),
        changed(data, version=2),
        changed(data, losses=[1]),
        changed(data, cases=[{**data["cases"][0], "measured": "0"}]),
        {key: value for key, value in data.items() if key != "cases"},
        [],
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match="this is no certificate"):
            read(path)
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "nowhere.json")


def test_a_signature_is_that_of_the_file(tmp_path, keys):
    (private, public), (_, other) = keys
    path = write(tmp_path, made(), signer(private))
    assert read(path, [public], required=True).signed_by
    with pytest.raises(ConfigError, match="certificate is signed by a key that is not trusted"):
        read(path, [other])
    data = json.loads(path.read_text())
    path.write_text(json.dumps(changed(data, seconds=1.0)))
    assert read(path).certificate.seconds == 1.0
    with pytest.raises(ConfigError, match="one of them was changed"):
        read(path, [public])
    (tmp_path / SIGNATURE).write_text("{}")
    with pytest.raises(ConfigError, match="the signature of the certificate is damaged"):
        read(path)
    (tmp_path / SIGNATURE).unlink()
    with pytest.raises(ConfigError, match="the certificate is not signed"):
        read(path, [public], required=True)


def test_the_page_names_every_case():
    certificate = made(cases=(judge("losses", "fsdp=2", 0.5, "note <b>"), judge("determinism", "fsdp=2", 0.0)))
    page = render_certificate(certificate.to_dict(), {name: vars(kind) for name, kind in KINDS.items()})
    for text in ("20 losses", "determinism", "note &lt;b&gt;", "not reached", "cpu &lt;device&gt;", "1 of 2"):
        assert text in page
    assert "<b>" not in page


@pytest.mark.parametrize(("devices", "kinds"), [(1, 1), (2, 4), (3, 3), (4, 8), (8, 8), (16, 8), (64, 3)])
def test_every_layout_takes_all_devices(devices, kinds):
    choice = choose_layouts(compose([*WORDS]).config, devices)
    assert len(choice.layouts) == kinds, choice.left_out
    assert len(choice.layouts) + len(choice.left_out) == (9 if devices > 1 else 1)
    assert {layout.devices for layout in choice.layouts} == {devices}
    assert len(set(choice.layouts)) == kinds


def test_two_vendors_side_by_side(tmp_path, monkeypatch, capsys):
    apart = tuple(judge(name, "fsdp=2", 1.0 if name == "matrix_products" else 0.0) for name in KINDS)
    for name, certificate in (("a", made()), ("b", made("tpu", shift=1e-4, cases=apart))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, certificate)
    sides = Sides.of([read(tmp_path / "a"), read(tmp_path / "b")])
    assert sides.verdicts() == ["matrix products: passed on cpu; failed (fsdp=2) on tpu"]
    (losses,) = sides.losses()
    assert (losses.layouts, losses.agrees) == ("fsdp=2", False)
    assert losses.losses == pytest.approx(1e-4)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", f"a/{FILE}", "b"]) == 0
    printed = capsys.readouterr().out
    for text in ("matrix products: passed on cpu; failed (fsdp=2) on tpu", "1.0e-04", "device.target", "compare.html"):
        assert text in printed
    assert "matrix products" in (tmp_path / "compare.html").read_text()
    assert cli.main(["compare", f"a/{FILE}", f"a/{FILE}", "html=none", "json=true"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert (same["verdicts"], same["cases"], same["facts"]) == ([], [], {})
    assert cli.main(["compare", f"a/{FILE}", "latest"]) == 2
    assert "certificates with certificates" in capsys.readouterr().err


def test_other_training_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["certify", "hardware=cpu", "model=tiny", "optim.lr=1"]) == 2
    said = capsys.readouterr().err
    assert "got:     model=tiny" in said
    assert "got:     optim.lr=1" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for words in (["layout.fsdp=3"], ["output=full"], ["checkpoint.signing_key=nowhere.pem"]):
        assert cli.main(["certify", "hardware=cpu", *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_handover_cites_the_certificate(tmp_path, monkeypatch, capsys):
    write(tmp_path, made())
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    beside = handover._beside(str(checkpoint), CheckpointConfig())
    assert beside is not None
    row = {"saved": 1.0, "measured": 1.0, "difference": 0.0, "tolerance": 1.0, "agrees": True}
    side = {"target": "cpu", "devices": 1, "precision": "fp32"}
    result = {"checkpoint": str(checkpoint), "step": 10, "from": side, "to": side, "changed": [], "other_bits": []}
    result |= {key: row for key, _ in handover._ROWS} | {"verdict": "agrees"}
    monkeypatch.setattr("orchestrator.launch.canary.run_check", lambda composed, where: dict(result))
    assert handover.main([str(tmp_path)]) == 0
    assert f"certificate    {tmp_path / FILE}" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    write(other, made("tpu"))
    assert handover.main([str(tmp_path), f"certificate={other}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["certificate"]
    assert (said["target"], said["same_target"], said["passed"], said["signed_by"]) == ("tpu", False, True, None)
    assert said == cited(read(other), "cpu")
    with pytest.raises(ConfigError, match="this is no certificate"):
        handover.main([str(tmp_path), f"certificate={checkpoint}"])
    (tmp_path / FILE).write_text("{}")
    assert handover._beside(str(checkpoint), CheckpointConfig()) is None
