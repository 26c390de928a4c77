"""`generate`: continue a prompt with a checkpoint."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from orchestrator.config.options import describe_options, option, parse_options


@dataclass(frozen=True)
class GenerateOptions:
    prompt: str = option(help="text to continue")
    checkpoint: str = option("latest", help="latest, a run directory or a checkpoint directory")
    tokens: int = option(128, help="tokens to write at most")
    temperature: float = option(0.8, help="0 takes the likeliest token each time")
    top_k: int | None = option(None, help="draw among the k likeliest tokens")
    seed: int = option(0, help="of the draws")
    hardware: Literal["auto", "cpu", "cuda", "rocm"] = option("auto", help="auto, cpu, cuda, rocm")
    runs_dir: str = option("runs", help="where latest looks")


def main(argv: list[str]) -> int:
    if any(word in ("-h", "--help") for word in argv):
        print(
            f"usage: python -m orchestrator generate prompt=TEXT [key=value ...]\n\n{describe_options(GenerateOptions)}"
        )
        return 0
    options = parse_options(GenerateOptions, argv)

    from orchestrator.config.schema import HardwareConfig
    from orchestrator.hardware.registry import resolve
    from orchestrator.train.resume import find
    from orchestrator.train.say import warn

    found = find(options.checkpoint, options.runs_dir, False, warn)
    target = resolve(HardwareConfig(target=options.hardware, devices=1))

    from orchestrator.train.generate import generate

    print(f"checkpoint {found.checkpoint}", file=sys.stderr)
    print(options.prompt, end="", flush=True)
    pieces = generate(
        found.checkpoint, target, options.prompt, options.tokens, options.temperature, options.top_k, options.seed
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
