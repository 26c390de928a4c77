"""Hosts that are network namespaces of this machine: each with an address of its own, a cable that can be cut, and
folders that no other one has.

A namespace has no name in the system: it lives as long as a file of this process is open, so nothing is left behind
however a test ends, and tests side by side do not meet.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.lab.ranks import preload
from tests.lab.run_server import ROOT

_CLONE_NEWNET = 0x40000000
_INTERFACE = "eth0"
T = TypeVar("T")


class NoNamespaces(Exception):
    """This machine does not permit them: a test is skipped with this reason."""


@dataclass
class Host:
    """A host of a `Network`.

    Attributes:
        name: for people.
        address: in the network.
        folder: its disk: working directory, runs, caches, temporary files. The network's other hosts do not use it.
    """

    name: str
    address: str
    folder: Path
    _namespace: int
    _hub: int

    @property
    def variables(self) -> dict[str, str]:
        """What programs have to know there: the name of the machine resolves to no address of the namespace."""
        return {
            "GLOO_SOCKET_IFNAME": _INTERFACE,
            "TMPDIR": str(self.folder / "tmp"),
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def enter(self) -> None:
        """Let this process, which has one thread, be there from now on."""
        _enter(self._namespace)

    def narrow(self, rate: str) -> None:
        """Let no more than a rate leave the host, such as `50mbit`."""
        words = f"qdisc add dev {_INTERFACE} root tbf rate {rate} burst 64kb latency 200ms"
        self.within(lambda: subprocess.run(["tc", *words.split()], check=True))

    def cut(self) -> None:
        """Cut the cable: no packet comes or goes, and no connection is closed."""
        _ip(self._hub, f"link set dev {self.name} down")

    def mend(self) -> None:
        """Plug the cable in again."""
        _ip(self._hub, f"link set dev {self.name} up")

    def listen(self, port: int = 0) -> socket.socket:
        """Return a socket of this process that listens at the host's address."""
        return self.within(lambda: socket.create_server((self.address, port)))

    def within(self, action: Callable[[], T]) -> T:
        """Call `action` in a thread of this process that is there; sockets and threads that it makes stay there."""

        def run() -> T:
            _enter(self._namespace)
            return action()

        return _in_thread(run)

    def start(self, words: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a program there, in a session of its own."""
        enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._namespace}", *words]
        with open(log, "ab") as file:
            return subprocess.Popen(
                enter,
                cwd=self.folder,
                env={**os.environ, **self.variables, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def fork(self, function: Callable[..., int], *args: Any, environment: Mapping[str, str], log: Path) -> Any:
        """Call `function` there in a forked process, with all imports made; its value is the exit code."""
        preload()
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(self, function, args, dict(environment), log)
        )
        process.start()
        return process


@contextlib.contextmanager
def network(folder: Path, *names: str) -> Iterator[tuple[Host, ...]]:
    """Make hosts that reach each other; they are gone with the context.

    Args:
        folder: below which each has its own.
        names: of the hosts, of at most 15 characters.

    Raises:
        NoNamespaces: this machine does not permit it.
    """
    with contextlib.ExitStack() as opened:
        hub = _namespace(opened)
        _ip(hub, "link add br0 type bridge", "link set br0 up", "link set lo up")
        hosts = []
        for number, name in enumerate(names, 1):
            inside = _namespace(opened)
            _ip(
                hub,
                f"link add name {name} type veth peer name {_INTERFACE} netns /proc/{os.getpid()}/fd/{inside}",
                f"link set dev {name} master br0 up",
            )
            address = f"10.77.0.{number}"
            _ip(inside, "link set lo up", f"addr add {address}/24 dev {_INTERFACE}", f"link set {_INTERFACE} up")
            place = folder / name
            (place / "tmp").mkdir(parents=True)
            hosts.append(Host(name, address, place, inside, hub))
        yield tuple(hosts)


def _namespace(opened: contextlib.ExitStack) -> int:
    def make() -> int:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            raise NoNamespaces(f"no network namespaces: {os.strerror(ctypes.get_errno())}")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    if sys.platform != "linux":
        raise NoNamespaces("no network namespaces on this system")
    found = _in_thread(make)
    opened.callback(os.close, found)
    return found


def _ip(namespace: int, *commands: str) -> None:
    enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{namespace}", "ip", "-batch", "-"]
    try:
        done = subprocess.run(enter, input="\n".join(commands), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoNamespaces(f"{error.filename} is not installed") from None
    if done.returncode:
        raise NoNamespaces(f"ip {'; '.join(commands)}: {done.stderr.strip()}")


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise NoNamespaces(f"the namespace cannot be entered: {os.strerror(ctypes.get_errno())}")


def _in_thread(action: Callable[[], T]) -> T:
    """A namespace is a thread's: what is done in one that ends leaves this process where it is."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(action())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _child(host: Host, function: Callable[..., int], args: tuple[Any, ...], environment: Any, log: Path) -> None:
    import torch

    code = 1
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file  # a test's own are not those of the system
        try:
            os.setsid()
            _enter(host._namespace)
            os.chdir(host.folder)
            os.environ.update(host.variables)
            os.environ.update(environment)
            torch.set_num_threads(1)
            code = function(*args)
        except BaseException:
            traceback.print_exc()
        finally:
            file.flush()
            os._exit(code)


class Loopback:
    """A namespace that has nothing but itself: processes that enter it speak with each other, until that is cut.

    Raises:
        NoNamespaces: this machine does not permit it.
    """

    def __init__(self) -> None:
        self.variables = {"GLOO_SOCKET_IFNAME": "lo"}
        self._opened = contextlib.ExitStack()
        self._namespace = _namespace(self._opened)
        self.mend()

    def enter(self) -> None:
        """Bring this process into it."""
        _enter(self._namespace)

    def cut(self) -> None:
        """Let nothing pass; no connection is closed."""
        _ip(self._namespace, "link set lo down")

    def mend(self) -> None:
        """Let everything pass."""
        _ip(self._namespace, "link set lo up")

    def close(self) -> None:
        """Let go of it: it is gone with the last process in it."""
        self._opened.close()
