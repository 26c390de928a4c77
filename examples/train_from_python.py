"""Train a small model, look at the run, and let the model write.

Words on the command line change the run:

    python examples/train_from_python.py model=tiny train.max_steps=200 hardware.devices=2
"""

from __future__ import annotations

import sys

import orchestrator
from orchestrator.errors import UserError


def main(overrides: list[str]) -> None:
    """Train with `overrides`, print what came of it, and continue a prompt."""
    run = orchestrator.train(["model=tiny", "train.max_steps=100", *overrides])
    if run.status != "finished":
        sys.exit(f"the run is {run.status}: see {run.report}")
    print("step   loss     validation")
    for row in run.metrics:
        if "val_loss" in row:
            print(f"{row['step']:<6} {row['loss']:.4f}   {row['val_loss']:.4f}")

    measured = orchestrator.evaluate(run)
    print(f"measured again: {measured.loss:.4f} nats per token on {measured.tokens:,} tokens")
    print(orchestrator.generate("def ", run, tokens=64, temperature=0.7))
    print(f"report: {run.report}")


if __name__ == "__main__":  # the run's processes do not import this file, so this is a habit and no need
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
