"""What concerns Google Cloud Storage alone; what every store must do is in test_remote.py."""

from __future__ import annotations

import importlib
import json
import logging
import uuid

import fsspec
import fsspec.config
import pytest

pytest.importorskip("gcp_storage_emulator")

from orchestrator.checkpoint import store_timeouts
from orchestrator.checkpoint.storage import children, claim, locate, read_range, remove_tree, there, write_file
from orchestrator.errors import CheckpointError
from tests.lab.store import reachable, serve


@pytest.fixture(scope="module")
def server():
    with serve("gs") as store, reachable(store):
        yield store


@pytest.fixture(autouse=True)
def _healthy(server, monkeypatch):
    monkeypatch.setattr(store_timeouts, "_PAUSE_SECONDS", 0.01)
    server.requests.clear()
    server.faults.clear()


@pytest.fixture
def place(server):
    """Not located yet: who is there keeps its credentials."""
    return f"{server.place}/{uuid.uuid4().hex}"


@pytest.fixture
def no_settings(monkeypatch, tmp_path):
    """Nobody has logged in, and nothing says how."""
    library = type(locate("gs://bucket").fs)
    monkeypatch.setitem(fsspec.config.conf, "gs", {})
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    library.clear_instance_cache()
    yield fsspec.config.conf["gs"]
    library.clear_instance_cache()


@pytest.fixture
def private(server, monkeypatch):
    monkeypatch.setattr(server, "bearer", "secret")


def _use(path):
    assert claim(path / "owner.json", b"mine") == b"mine"
    write_file(path / "f", [b"content"])
    assert read_range(path / "f", 0, 100) == b"content"
    assert len(children(path)) == 2
    remove_tree(path)
    assert not there(path)


def test_only_the_documented_requests_are_used(place):
    """The class that gcsfs takes by itself asks by gRPC, and does not keep its word about objects of zonal buckets."""
    extended = importlib.import_module("gcsfs.extended_gcsfs").ExtendedGcsFileSystem
    fsspec.register_implementation("gs", extended, clobber=True)
    library = locate(place).fs
    assert f"{type(library).__module__}.{type(library).__name__}" == "gcsfs.core.GCSFileSystem"
    assert not library.dircache.use_listings_cache
    assert logging.getLogger("gcsfs").getEffectiveLevel() == logging.CRITICAL


def test_who_has_not_logged_in_is_told_how(private, no_settings, place):
    fresh = locate(place)
    with pytest.raises(PermissionError, match="Anonymous caller") as denied:
        claim(fresh / "owner.json", b"mine")
    assert "gcloud auth application-default login" in denied.value.strerror
    with pytest.raises(PermissionError, match="Anonymous caller"):
        write_file(fresh / "f", [b"content"])
    with pytest.raises(PermissionError, match="Anonymous caller"):
        there(fresh / "f")


def test_default_credentials_are_used(private, no_settings, server, place, monkeypatch, tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"type": "service_account", "client_email": "me@project", "token_uri": f"{server.url}/token"}
    account |= {"private_key_id": "1", "private_key": key.decode(), "project_id": "project"}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    _use(locate(place))
    assert len(server.matching("^TOKEN$")) == 1


@pytest.mark.parametrize(
    ("status", "said"), [(404, "knows an upload in parts no more"), (400, "an invalid part"), (403, "an invalid part")]
)
def test_an_upload_that_the_store_ends(server, place, status, said):
    """The address of an upload in parts is as good as a password."""
    server.fail("^COMMIT", status=status, message="an invalid part")
    with pytest.raises(OSError, match=said) as caught:
        write_file(locate(place) / "f", [b"content"])
    assert "upload_id" not in str(caught.value)
    assert server.unfinished() == []


def test_a_bucket_whose_requester_pays(server, no_settings, place, monkeypatch):
    monkeypatch.setattr(server, "payer", "project")
    no_settings["token"] = "anon"
    with pytest.raises(PermissionError, match="FSSPEC_GS_REQUESTER_PAYS=PROJECT"):
        claim(locate(place) / "owner.json", b"mine")
    no_settings["requester_pays"] = "project"
    _use(locate(place))


def test_settings_that_cannot_be_used_are_one_error(no_settings):
    no_settings["access"] = "some"
    with pytest.raises(CheckpointError, match="its store not set up: access must be one of"):
        locate("gs://bucket/x")
