"""A fitted scaling law as text, and as a page with its curves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.atomic_files import write_atomically
from orchestrator.errors import printable
from orchestrator.planner.quantity import write
from orchestrator.planner.scaling_law import FLOPS_PER_PARAMETER_AND_TOKEN, LadderFit, ScalingLaw
from orchestrator.report.page import frame, table
from orchestrator.report.plan_svg import Dot, Line, log_chart
from orchestrator.report.run_text import aligned, clock_time

_TONES = 10
_SYMBOLS = {"irreducible": "E", "a": "A", "b": "B", "alpha": "alpha", "beta": "beta"}
_STYLE = (
    "\n".join(
        f".tone{at} {{ fill: {tone}; background: {tone}; }} .stroke{at} {{ stroke: {tone}; }}"
        for at, tone in enumerate(
            (
                "#1f6feb",
                "#c2620a",
                "#1a7f4b",
                "#7a4fd0",
                "#c0362c",
                "#0e8a8a",
                "#b0448c",
                "#76652b",
                "#4d6fa8",
                "#8a8f98",
            )
        )
    )
    + """
.line { fill: none; stroke-width: 1.6; } .dashed { stroke-dasharray: 6 4; } .ring { fill: none; stroke-width: 2; }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 3px; }
"""
)


def law_text(fit: LadderFit) -> str:
    """Return a fit for the terminal.

    Args:
        fit: of a ladder.
    """
    law = fit.law
    head = (
        f"L(N, D) = {law.irreducible:.4f} + {law.a:,.4g} / N^{law.alpha:.4f} + {law.b:,.4g} / D^{law.beta:.4f}   "
        f"nats per token; {len(fit.points)} runs, mean error {fit.mean_error:.2%}"
    )
    numbers = [("", "fitted", "95% of resamples"), *_numbers(fit)]
    optima = [("compute", "parameters", "tokens", "tokens per parameter", "loss"), *_optima(fit)]
    return "\n\n".join([head, aligned(numbers), "least loss for some compute (6 N D)\n" + aligned(optima)])


def write_law_page(path: Path, fit: LadderFit) -> None:
    """Write the page.

    Args:
        path: of the file.
        fit: of a ladder.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, render_law(fit))


def render_law(fit: LadderFit) -> str:
    """Return the page as HTML.

    Args:
        fit: of a ladder.
    """
    rows = [
        (
            point.name,
            write(point.parameters, ""),
            write(point.tokens, ""),
            f"{point.loss:.4f}",
            f"{fitted:.4f}",
            f"{math.log(point.loss / fitted):+.2%}",
        )
        for point in fit.points
        for fitted in (fit.law.loss(point.parameters, point.tokens),)
    ]
    return frame(
        "Scaling law",
        [
            "<h1>Scaling law</h1>",
            f'<p class="lead">L(N, D) = E + A / N<sup>alpha</sup> + B / D<sup>beta</sup>, {len(fit.points)} runs, '
            f"mean error {fit.mean_error:.2%}, {len(fit.resamples)} resamples, {clock_time(time.time())}</p>",
            _curves(fit),
            "<h2>Numbers</h2>",
            table(("", "Fitted", "95% of resamples"), _numbers(fit)),
            "<h2>Least loss for some compute</h2>",
            table(("Compute, 6 N D", "Parameters", "Tokens", "Tokens per parameter", "Loss"), _optima(fit)),
            "<h2>Runs</h2>",
            table(("Run", "Parameters", "Tokens", "Loss", "Law", "Difference"), rows),
        ],
        _STYLE,
    )


def _numbers(fit: LadderFit) -> Iterator[tuple[str, ...]]:
    for name, symbol in _SYMBOLS.items():
        low, high = fit.interval(lambda law, name=name: getattr(law, name))  # type: ignore[misc]
        yield symbol, f"{getattr(fit.law, name):,.4g}", _span(low, high, lambda value: f"{value:,.4g}")


def _optima(fit: LadderFit) -> Iterator[tuple[str, ...]]:
    if min(fit.law.a, fit.law.b, fit.law.alpha, fit.law.beta) <= 0:
        return
    largest = max(_flops(point.parameters, point.tokens) for point in fit.points)
    for times in (1, 10, 100, 1000):
        flops = largest * times
        parameters, tokens = fit.law.with_compute(flops)
        sizes = fit.interval(lambda law, flops=flops: _safely(law, flops, 0))  # type: ignore[misc]
        data = fit.interval(lambda law, flops=flops: _safely(law, flops, 1))  # type: ignore[misc]
        loss = fit.interval(lambda law, flops=flops: _least_loss(law, flops))  # type: ignore[misc]
        yield (
            f"{flops:.3g}{'' if times == 1 else f' ({times:,} times the ladder)'}",
            f"{write(parameters, '')} ({_span(*sizes, lambda value: write(value, ''))})",
            f"{write(tokens, '')} ({_span(*data, lambda value: write(value, ''))})",
            f"{tokens / parameters:.3g}",
            f"{fit.law.loss(parameters, tokens):.4f} ({_span(*loss, lambda value: f'{value:.4f}')})",
        )


def _safely(law: ScalingLaw, flops: float, which: int) -> float | None:
    return None if min(law.a, law.b, law.alpha, law.beta) <= 0 else law.with_compute(flops)[which]


def _least_loss(law: ScalingLaw, flops: float) -> float | None:
    return None if min(law.a, law.b, law.alpha, law.beta) <= 0 else law.loss(*law.with_compute(flops))


def _span(low: float | None, high: float | None, text: Callable[[float], str]) -> str:
    if low is None:
        return "unknown"
    return f"{text(low)} to {'no end' if high is None else text(high)}"


def _flops(parameters: float, tokens: float) -> float:
    return FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens


def _curves(fit: LadderFit) -> str:
    sizes = sorted({point.parameters for point in fit.points})
    shown = sizes if len(sizes) <= _TONES - 1 else [sizes[round(at * (len(sizes) - 1) / 8)] for at in range(9)]
    lines = []
    for tone, size in enumerate(shown):
        tokens = [point.tokens for point in fit.points]
        low, high = math.log(min(tokens)), math.log(max(tokens) * 2)
        path = [math.exp(low + (high - low) * at / 40) for at in range(41)]
        label = f"{write(size, '')} parameters"
        lines.append(Line(label, [(_flops(size, one), fit.law.loss(size, one)) for one in path], tone))
    if min(fit.law.a, fit.law.b, fit.law.alpha, fit.law.beta) > 0:
        work = [_flops(point.parameters, point.tokens) for point in fit.points]
        low, high = math.log(min(work)), math.log(max(work) * 100)
        path = [math.exp(low + (high - low) * at / 40) for at in range(41)]
        frontier = [(flops, fit.law.loss(*fit.law.with_compute(flops))) for flops in path]
        lines.append(Line("least loss", frontier, _TONES - 1, dashed=True))
    dots = [
        Dot(
            _flops(point.parameters, point.tokens),
            point.loss,
            title=printable(f"{point.name}: {point.loss:.4f}"),
            tone=min(range(len(shown)), key=lambda at: abs(math.log(shown[at] / point.parameters))),
        )
        for point in fit.points
    ]
    return log_chart(
        "Loss over compute", "operations, 6 N D (log scale)", "nats per token (log scale)", lines, dots, 420
    )
