"""From a loss to be reached to a model and its tokens, by a fitted law, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.errors import ConfigError
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.quantity import write
from orchestrator.planner.scaling_law import FLOPS_PER_PARAMETER_AND_TOKEN, LadderFit, ScalingLaw
from orchestrator.planner.spec import COMPUTE_OPTIMAL, ModelShape

_FAR = 10.0  # times the largest of the ladder, beyond which a figure is said to be far from what was measured
_LARGE_VOCABULARY, _SMALL_VOCABULARY = 131_072, 32_768
_ASPECTS = (64, 176)  # width over layers


@dataclass(frozen=True)
class Extent:
    """A model and its training, as sizes.

    Attributes:
        parameters: of the model.
        tokens: that it is trained on.
    """

    parameters: float
    tokens: float

    @property
    def flops(self) -> float:
        """Operations of the training, 6 N D."""
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * self.tokens


@dataclass(frozen=True)
class TargetLoss:
    """A loss to be reached, and what that takes.

    Attributes:
        loss: nats per token.
        fit: of the law.
        source: file of the fit.
        extent: that reaches it with the least compute, or that of the model which was asked for.
        chosen: the model is the law's choice.
        low: at the lower end of the middle 95% of resamples, by compute; None: there are no resamples.
        high: at the upper end; None: some of the resamples say that it is never reached.
    """

    loss: float
    fit: LadderFit
    source: str
    extent: Extent
    chosen: bool
    low: Extent | None
    high: Extent | None

    @classmethod
    def of(cls, loss: float, fit: LadderFit, source: str, model_parameters: float | None = None) -> TargetLoss:
        """Return what a loss takes.

        Args:
            loss: to be reached.
            fit: of the law.
            source: file of the fit.
            model_parameters: of the model; None: as many as take the least compute.

        Raises:
            ConfigError: by the law it is never reached.
        """
        extent = _extent(fit.law, loss, model_parameters)
        if extent is None:
            raise _never(fit.law, loss, model_parameters)
        ends: list[Extent | None] = [None, None]
        found = [_extent(law, loss, model_parameters) for law in fit.resamples]
        ordered = sorted(found, key=lambda one: math.inf if one is None else one.flops)
        if ordered:
            ends = [ordered[round(share * (len(ordered) - 1))] for share in (0.025, 0.975)]
        return cls(loss, fit, source, extent, model_parameters is None, ends[0], ends[1])

    def lines(self) -> list[str]:
        """Return the law and what it says, as lines of text."""
        law, points = self.fit.law, self.fit.points
        model = f"{self._range('parameters')} parameters" if self.chosen else "this model"
        lines = [
            f"loss {self.loss:g} by {self.source}: {law.irreducible:.4g} + {law.a:.4g} / N^{law.alpha:.3f} + "
            f"{law.b:.4g} / D^{law.beta:.3f}, of {len(points)} runs",
            f"takes {model}, {self._range('tokens')} tokens, {self._range('flops')} operations"
            + ("" if self.low is None else "; in brackets the ends of 95% of resampled fits, by operations"),
        ]
        for name in ("parameters", "tokens"):
            times = getattr(self.extent, name) / max(getattr(point, name) for point in points)
            if times > _FAR:
                lines.append(f"far from what was measured: {times:,.0f} times the most {name} of the ladder")
        return lines

    def _range(self, name: str) -> str:
        middle, low, high = (None if one is None else _sized(name, one) for one in (self.extent, self.low, self.high))
        return f"{middle}" if low is None else f"{middle} ({low} to {high or 'no end'})"

    def as_data(self) -> dict[str, object]:
        """Return it as plain data, for JSON."""
        extents = {"extent": self.extent, "low": self.low, "high": self.high}
        return {
            "loss": self.loss,
            "fit": self.source,
            "law": vars(self.fit.law),
            "model": "chosen by the law" if self.chosen else "as asked for",
            **{name: None if one is None else {**vars(one), "flops": one.flops} for name, one in extents.items()},
        }


def _sized(name: str, extent: Extent) -> str:
    value: float = getattr(extent, name)
    return f"{value:.3g}" if name == "flops" else write(value, "")


def _extent(law: ScalingLaw, loss: float, model_parameters: float | None) -> Extent | None:
    if model_parameters is None:
        found = law.optimum(loss)
        return None if found is None or not all(map(math.isfinite, found)) else Extent(*found)
    tokens = law.tokens_for(loss, model_parameters)
    return None if tokens is None or not math.isfinite(tokens) else Extent(model_parameters, tokens)


def _never(law: ScalingLaw, loss: float, model_parameters: float | None) -> ConfigError:
    if model_parameters is None:
        return ConfigError(
            "by the law of the fit no training reaches the loss",
            got=f"target_loss={loss:g}",
            allowed=f"more than {law.irreducible:.4g}, which is left of any model and any data",
            fix="ask for a larger loss, or fit a ladder of better runs",
        )
    least = law.irreducible + law.a / model_parameters**law.alpha
    return ConfigError(
        "by the law of the fit no number of tokens brings this model to the loss",
        got=f"target_loss={loss:g} with {write(model_parameters, 'parameters')}",
        allowed=f"more than {least:.4g} for this model",
        fix="leave out model= for the model of the least compute, or take a larger one",
    )


def shape_for(wanted: float) -> ModelShape:
    """Return a decoder like Llama 3 of about so many parameters: its proportions, and heads of 128 or, if small, 64.

    Args:
        wanted: parameters of the model, embeddings counted.

    Raises:
        ConfigError: there is none near it.
    """
    large = [shape for shape in _shapes(_LARGE_VOCABULARY) if 5 * shape.vocab * shape.dim * 2 <= parameters(shape)]
    candidates = [*large, *_shapes(_SMALL_VOCABULARY)]
    best = min(candidates, key=lambda shape: (abs(math.log(parameters(shape) / wanted)), -shape.vocab))
    if not 0.8 * wanted < parameters(best) < 1.25 * wanted:
        raise ConfigError(
            "the law asks for a model of a size that is not made up here",
            got=write(wanted, "parameters"),
            allowed="some 10M to 2T parameters",
            fix="choose the model: model=NAME",
        )
    return best


def _shapes(vocab: int) -> list[ModelShape]:
    found = []
    for dim in (*range(64, 1024, 64), *range(1024, 8192, 256), *range(8192, 40_960, 1024)):
        head = 128 if dim >= 1024 else 64
        heads = dim // head
        groups = 8 if heads > 8 and heads % 8 == 0 else heads
        width = max(64, round(3.5 * dim / 256) * 256)
        for layers in range(max(2, dim // _ASPECTS[1]), max(2, dim // _ASPECTS[0]) + 1):
            found.append(ModelShape(COMPUTE_OPTIMAL, layers, dim, width, heads, groups, head, vocab))
    return found
