"""Ask the cloud whether this host will be taken away, and ask the run to stop in time. No torch.

Google's metadata server says `TRUE` under `instance/preempted` of a Spot machine, 30 seconds before it is stopped, and
`TERMINATE_ON_HOST_MAINTENANCE` under `instance/maintenance-event`, a minute before (an hour on machines with GPUs or
TPUs), if that was asked for since the last event: cloud.google.com/compute/docs/instances/preemptible and
.../metadata/getting-live-migration-notice. Amazon's has JSON with the time under `spot/instance-action`, two minutes
before, and 404 otherwise; it should be asked every 5 seconds, with a token of IMDSv2:
docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from orchestrator import stopping
from orchestrator.hardware import host
from orchestrator.output import tell

POLL_SECONDS = 5.0
_ANSWER_SECONDS = 2.0
_TOKEN_SECONDS = 21600  # the longest that Amazon gives
_MOST_BYTES = 4096
_GCE_PREEMPTED_SECONDS, _GCE_MAINTENANCE_SECONDS, _EC2_SECONDS = 30.0, 60.0, 120.0


@dataclass(frozen=True)
class Notice:
    """The word of a cloud that it takes a host away.

    Attributes:
        source: the cloud.
        what: it does, as it says itself.
        seconds: until then.
    """

    source: str
    what: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.source} takes this host away in about {max(0.0, self.seconds):.0f} s ({self.what})"


def cloud_of_host() -> str | None:
    """Return `gce` or `ec2`, by what the firmware says; None for every other machine."""
    if "Google Compute Engine" in (host.read("/sys/class/dmi/id/product_name") or ""):
        return "gce"
    # Instances on Nitro name the vendor of the board, those on Xen have an uuid that begins so.
    if "Amazon EC2" in (host.read("/sys/class/dmi/id/board_vendor") or ""):
        return "ec2"
    return "ec2" if (host.read("/sys/hypervisor/uuid") or "").lower().startswith("ec2") else None


def ask_gce() -> Notice | None:
    """Return Google's notice for this host; None where there is none.

    Raises:
        OSError: the metadata server does not answer.
    """
    server = os.environ.get("GCE_METADATA_HOST") or os.environ.get("GCE_METADATA_IP") or "metadata.google.internal"
    base, headers = f"http://{server}/computeMetadata/v1/instance", {"Metadata-Flavor": "Google"}
    if _get(f"{base}/preempted", headers) == "TRUE":
        return Notice("Google Cloud", "preempted", _GCE_PREEMPTED_SECONDS)
    event = _get(f"{base}/maintenance-event", headers)
    if event is not None and event.startswith("TERMINATE"):
        return Notice("Google Cloud", event, _GCE_MAINTENANCE_SECONDS)
    return None


class Ec2:
    """Amazon's metadata service, with its token."""

    def __init__(self) -> None:
        server = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
        self._base, self._token, self._until = server.rstrip("/"), "", 0.0

    def ask(self) -> Notice | None:
        """Return Amazon's notice for this host; None where there is none.

        Raises:
            OSError: the service does not answer.
        """
        if time.monotonic() > self._until:
            wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
            self._token = _get(f"{self._base}/latest/api/token", wanted, method="PUT") or ""
            self._until = time.monotonic() + _TOKEN_SECONDS / 2
        text = _get(f"{self._base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token})
        return None if text is None else _ec2_notice(text)


def _ec2_notice(text: str) -> Notice:
    action, seconds = "interruption", _EC2_SECONDS
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
        told = json.loads(text)
        action = str(told["action"])[:40]
        seconds = datetime.fromisoformat(told["time"]).timestamp() - time.time()
    return Notice("Amazon EC2", action, seconds)


def _get(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """Return what the server says; None where it says that there is nothing of that name."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    # A proxy of the environment knows another host's metadata, if any.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
            return str(answer.read(_MOST_BYTES).decode(errors="replace")).strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


@contextlib.contextmanager
def noticing(
    notices: str, hear: Callable[[Notice], object] = lambda notice: None, poll_seconds: float = POLL_SECONDS
) -> Iterator[None]:
    """Within it a notice asks this process to stop, as SIGTERM does, and says how long it lives.

    One process of a host asks. A cloud that does not answer is asked again: that is no news, and no error.

    Args:
        notices: `launch.notices`.
        hear: called with the notice, before the process is asked to stop; from a thread.
        poll_seconds: between two questions.
    """
    cloud = cloud_of_host() if notices == "auto" else notices
    if cloud not in ("gce", "ec2"):
        yield
        return
    ask = ask_gce if cloud == "gce" else Ec2().ask
    ended = threading.Event()
    thread = threading.Thread(target=_poll, args=(ask, hear, ended, poll_seconds), name="notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _poll(
    ask: Callable[[], Notice | None], hear: Callable[[Notice], object], ended: threading.Event, poll_seconds: float
) -> None:
    while not ended.is_set():
        with contextlib.suppress(OSError, ValueError):
            if (notice := ask()) is not None:
                tell(f"notice     {notice}")
                stopping.allow(notice.seconds)
                with contextlib.suppress(RuntimeError):  # the other processes have gone
                    hear(notice)
                os.kill(os.getpid(), signal.SIGTERM)
                return
        ended.wait(poll_seconds)
