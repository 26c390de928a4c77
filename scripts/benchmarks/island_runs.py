"""Runs of two islands of this machine: one four times slower than the other, and two with a narrow link between them.

    python scripts/benchmarks/island_runs.py [slow] [link]

slow: decoupled, a pause in each step of one island: how long the fast one waits, and who trains how much.
link: each island on a core of its own, in a network of its own, 50 Mbit/s between them, H=64, int8, four fragments with
overlap: the tokens per second of both together, against the sum of each alone on its core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from orchestrator.islands.island_messages import Terms
from tests.lab.islands import LabRun
from tests.lab.namespaces import NoNamespaces, network

QUICK = ("train.sample.tokens=0", "checkpoint.every_steps=null", "checkpoint.handover.enabled=false")
REAL = (
    *("model.dim=256", "model.layers=4", "model.heads=4", "model.kv_heads=4", "model.mlp_dim=768"),
    *("train.seq_len=64", "train.global_batch_tokens=1024", "train.max_steps=256"),
)


def slow(folder: Path) -> None:
    """One island four times slower."""
    terms = Terms("decoupled", inner_steps=16)
    run = LabRun(folder, terms, (*QUICK, "train.max_steps=400"), cores={"a": 0, "b": 1})
    try:
        run.start("a", slower=0.03)
        run.start("b", slower=0.15)
        run.finish(400)
    finally:
        run.close()
    booked = {name: sum(b - a for a, b in ranges) for name, ranges in run.ledger()["booked"].items()}
    speeds = {name: _speed(run, name) for name in "ab"}
    waited = {name: _sum(run, name, "waited") / _sum(run, name, "seconds") for name in "ab"}
    print(f"slow: speeds {speeds['a'] / speeds['b']:.2f} to 1, sequences {booked['a'] / booked['b']:.2f} to 1")
    print(f"slow: the fast island waited {waited['a']:.1%} of its time, the slow one {waited['b']:.1%}")


def _sum(run: LabRun, name: str, key: str) -> float:
    return float(sum(note[key] for note in run.notes("report")[2:] if note["island"] == name))


def _speed(run: LabRun, name: str) -> float:
    """Sequences per second, all that an island does counted, but for its first leases."""
    notes = [note for note in run.notes("report") if note["island"] == name][1:]
    return float(sum(sum(note["sequences"]) for note in notes) / sum(note["seconds"] for note in notes))


def link(folder: Path) -> None:
    """Two islands with 50 Mbit/s between them."""
    terms = Terms(inner_steps=64, fragments=4, overlap_steps=24, exchange="int8")
    speeds = {}
    with network(folder / "hosts", "one", "two") as (one, two):
        for host in (one, two):
            host.narrow("50mbit")
        hosts = {"hub": one, "a": one, "b": two}
        for names in ("a", "b", "ab"):
            shares = dict.fromkeys(names, 1.0)
            words = (*QUICK, *REAL) if names == "ab" else (*QUICK, *REAL, "train.global_batch_tokens=512")
            run = LabRun(folder / names, terms, words, shares, hosts=hosts, cores={"a": 0, "b": 1})
            try:
                for name in names:
                    run.start(name)
                run.finish(500)
            finally:
                run.close()
            speeds |= {(names, name): _speed(run, name) for name in names}
            sent = sum(given["bytes"] for note in run.notes("exchange") for given in note["given"])
            print(
                f"link: {names}: {', '.join(f'{speeds[names, name]:.1f}' for name in names)} sequences/s, {sent} bytes"
            )
    together = speeds["ab", "a"] + speeds["ab", "b"]
    print(f"link: together {together / (speeds['a', 'a'] + speeds['b', 'b']):.3f} of the sum of both alone")


def main() -> None:
    """Print what the runs have come to."""
    for what in sys.argv[1:] or ("slow", "link"):
        with tempfile.TemporaryDirectory(prefix="islands-") as folder:
            try:
                {"slow": slow, "link": link}[what](Path(folder))
            except NoNamespaces as error:
                print(f"{what}: not measured: {error}")


if __name__ == "__main__":
    main()
