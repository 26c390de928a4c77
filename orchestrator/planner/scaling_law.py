"""The loss of a model by its parameters and tokens, fitted to a ladder of runs: L(N, D) = E + A / N^alpha + B / D^beta.

The form and the third way of fitting it are those of Hoffmann et al. (arXiv 2203.15556): the Huber loss, with 1e-3, of
the difference of logarithms, from a grid of starts. It is minimised by reweighted least squares with Levenberg's
damping, many starts or resamples at one time; the intervals are those of runs drawn with replacement.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.errors import ConfigError

Array = np.ndarray[Any, np.dtype[np.float64]]
FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
LEAST_POINTS = 6  # one more than the numbers that are fitted
_DELTA = 1e-3
_STARTS = 48  # of the grid, the best, from which the minimum is looked for
_ROUNDS = 600
_NOTHING = 1e-4  # of the largest term at the mean point
_EXPONENTS = (0.01, 3.0)  # those of published ladders are 0.1 to 0.9
_LOGARITHMS = 40.0  # of the shares at the mean point; beyond it one of the three terms is nothing
_CLOSE = 1e-10  # of the objective, relative: below it a round has changed nothing


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token.

    Attributes:
        irreducible: E.
        a: A.
        b: B.
        alpha: exponent of the parameters.
        beta: exponent of the tokens.
    """

    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of a model.

        Args:
            parameters: of the model.
            tokens: that it is trained on.
        """
        return self.irreducible + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def optimum(self, loss: float) -> tuple[float, float] | None:
        """Return parameters and tokens that reach a loss with the least compute; None below what the law can reach.

        At the optimum both shares of the loss fall equally per unit of compute: alpha A / N^alpha = beta B / D^beta.

        Args:
            loss: to be reached.
        """
        left = loss - self.irreducible
        if left <= 0 or min(self.a, self.b, self.alpha, self.beta) <= 0:
            return None
        of_model, of_data = left * self.beta / (self.alpha + self.beta), left * self.alpha / (self.alpha + self.beta)
        return _power(self.a / of_model, self.alpha), _power(self.b / of_data, self.beta)

    def tokens_for(self, loss: float, parameters: float) -> float | None:
        """Return the tokens with which a model reaches a loss; None where no number of them does.

        Args:
            loss: to be reached.
            parameters: of the model.
        """
        left = loss - self.irreducible - self.a / parameters**self.alpha
        return None if left <= 0 or min(self.b, self.beta) <= 0 else _power(self.b / left, self.beta)

    def with_compute(self, flops: float) -> tuple[float, float]:
        """Return the parameters and tokens of the smallest loss for a training of 6 N D operations.

        Args:
            flops: of the training.
        """
        product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        scale = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        parameters = float(scale * product ** (self.beta / (self.alpha + self.beta)))
        return parameters, product / parameters


@dataclass(frozen=True)
class LadderPoint:
    """A run of a ladder, trained to the end of its schedule.

    Attributes:
        parameters: of the model, those that each token goes through.
        tokens: that it was trained on.
        loss: at the end, on held-out data, nats per token.
        name: of the run.
    """

    parameters: float
    tokens: float
    loss: float
    name: str = ""


@dataclass(frozen=True)
class LadderFit:
    """A law with how sure it is.

    Attributes:
        law: of all points.
        points: that it was fitted to.
        resamples: laws of points drawn with replacement.
        objective: the sum of Huber losses at the minimum.
        mean_error: mean size of the difference of logarithms: 0.01 is 1%.
    """

    law: ScalingLaw
    points: Sequence[LadderPoint]
    resamples: Sequence[ScalingLaw]
    objective: float
    mean_error: float

    def interval(self, figure: Callable[[ScalingLaw], float | None]) -> tuple[float | None, float | None]:
        """Return the middle 95% of a figure over the resamples; an end that some do not reach is None.

        Args:
            figure: of a law; None where it has none, which counts as above all numbers.
        """
        found = sorted(math.inf if (value := figure(law)) is None else value for law in self.resamples)
        if not found:
            return None, None
        ends = [found[min(len(found) - 1, round(share * (len(found) - 1)))] for share in (0.025, 0.975)]
        low, high = (end if math.isfinite(end) else None for end in ends)
        return low, high


_LEAST = np.array([-_LOGARITHMS, -_LOGARITHMS, -_LOGARITHMS, _EXPONENTS[0], _EXPONENTS[0]])
_MOST = np.array([_LOGARITHMS, _LOGARITHMS, _LOGARITHMS, _EXPONENTS[1], _EXPONENTS[1]])


def fit_ladder(points: Sequence[LadderPoint], resamples: int = 400, seed: int = 0) -> LadderFit:
    """Fit the law.

    Args:
        points: at least `LEAST_POINTS`, of at least three sizes of model and three numbers of tokens.
        resamples: of the points, for the intervals.
        seed: of the resamples.

    Raises:
        ConfigError: the points are too few or too alike, or are no positive numbers.
    """
    _check(points)
    n, d, y = (np.log([getattr(point, key) for point in points]) for key in ("parameters", "tokens", "loss"))
    problem = _Problem(n, d, y)
    ones = np.ones((1, len(points)))
    grid = _starts(problem)
    found = problem.minimise(grid, np.repeat(ones, len(grid), 0))
    objectives = problem.objective(found, ones)
    best = int(np.argmin(objectives))
    _check_determined(found[best], problem)
    counts = np.random.default_rng(seed).multinomial(len(points), np.full(len(points), 1 / len(points)), resamples)
    drawn = counts.astype(np.float64)
    others = problem.minimise(np.repeat(found[best : best + 1], resamples, 0), drawn) if resamples else found[:0]
    residuals = problem.predict(found[best : best + 1])[0] - y
    laws = [problem.law(theta) for theta in others if np.isfinite(theta).all()]
    return LadderFit(
        problem.law(found[best]), tuple(points), laws, float(objectives[best]), float(np.abs(residuals).mean())
    )


def _check(points: Sequence[LadderPoint]) -> None:
    for point in points:
        numbers = (point.parameters, point.tokens, point.loss)
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ConfigError("a point of the ladder is not of positive numbers", got=f"{point.name}: {numbers}")
    sizes, spans = len({point.parameters for point in points}), len({point.tokens for point in points})
    if len(points) < LEAST_POINTS or sizes < 3 or spans < 3:
        raise ConfigError(
            "the ladder is too small for a law of five numbers",
            got=f"{len(points)} runs, {sizes} sizes of model, {spans} numbers of tokens",
            allowed=f"at least {LEAST_POINTS} runs, of three sizes and three numbers of tokens",
            fix="train more runs: each size with several numbers of tokens, each to the end of its schedule",
        )


def _check_determined(theta: Array, problem: _Problem) -> None:
    """Refuse a law of which the ladder does not say how it goes on.

    Raises:
        ConfigError: an exponent has run to an end of what is possible, or the model or the data has no share.
    """
    law, shares = problem.law(theta), np.exp(theta[:2] - theta[:3].max())
    for what, exponent, share in (("parameters", law.alpha, shares[0]), ("tokens", law.beta, shares[1])):
        if not _EXPONENTS[0] * 1.01 < exponent < _EXPONENTS[1] * 0.99 or share < _NOTHING:
            raise ConfigError(
                f"the losses do not say how they fall with the {what}",
                got=f"exponent {exponent:.3g}, {share:.2g} of the largest term",
                allowed=f"an exponent between {_EXPONENTS[0]:g} and {_EXPONENTS[1]:g}",
                fix=f"more runs, with {what} further apart, each with the learning rate that suits its size",
            )


class _Problem:
    """The points in logarithms, about their means: so the five numbers have little to do with each other.

    A row of `theta` is (log A', log B', log E, alpha, beta), where A' and B' are the shares at the mean point.
    """

    def __init__(self, n: Array, d: Array, y: Array):
        self._n_mean, self._d_mean = float(n.mean()), float(d.mean())
        self.n, self.d, self.y = n - self._n_mean, d - self._d_mean, y

    def law(self, theta: Array) -> ScalingLaw:
        a, b, e, alpha, beta = (float(number) for number in theta)
        return ScalingLaw(
            math.exp(e), math.exp(a + alpha * self._n_mean), math.exp(b + beta * self._d_mean), alpha, beta
        )

    def terms(self, theta: Array) -> Array:
        """Return the three logarithms that are added up: rows x points x 3."""
        a, b, e, alpha, beta = (theta[:, at, None] for at in range(5))
        return np.stack([a - alpha * self.n, b - beta * self.d, e + 0 * self.n], axis=-1)

    def predict(self, theta: Array) -> Array:
        return np.asarray(np.logaddexp.reduce(self.terms(theta), axis=-1))

    def objective(self, theta: Array, counts: Array) -> Array:
        size = np.abs(self.predict(theta) - self.y)
        each = np.where(size <= _DELTA, 0.5 * size**2, _DELTA * (size - 0.5 * _DELTA))
        return np.asarray((counts * each).sum(-1))

    def minimise(self, theta: Array, counts: Array) -> Array:
        """Return the minimum next to each row, for points that count so often."""
        theta, value = theta.copy(), self.objective(theta, counts)
        damping, still = np.full(len(theta), 1e-3), np.arange(len(theta))
        for _ in range(_ROUNDS):
            if not len(still):
                break
            step = self._step(theta[still], counts[still], damping[still])
            proposed = np.clip(theta[still] + step, _LEAST, _MOST)
            after = self.objective(proposed, counts[still])
            better = after < value[still]
            gain = np.where(better, (value[still] - after) / np.maximum(value[still], 1e-300), 0.0)
            theta[still[better]], value[still[better]] = proposed[better], after[better]
            damping[still] = np.where(better, damping[still] * 0.3, damping[still] * 8.0).clip(1e-12, 1e12)
            done = (better & (gain < _CLOSE)) | (damping[still] >= 1e12) | (value[still] < 1e-28)
            still = still[~done]
        return theta

    def _step(self, theta: Array, counts: Array, damping: Array) -> Array:
        terms = self.terms(theta)
        predicted = np.logaddexp.reduce(terms, axis=-1)
        shares = np.exp(terms - predicted[..., None])
        slopes = [shares[..., 0], shares[..., 1], shares[..., 2], -shares[..., 0] * self.n, -shares[..., 1] * self.d]
        jacobian = np.stack(slopes, axis=-1)
        residual = predicted - self.y
        # The quadratic that lies above the Huber loss and touches it here.
        weights = counts * np.minimum(1.0, _DELTA / np.maximum(np.abs(residual), 1e-300))
        weighted = jacobian * weights[..., None]
        hessian = np.einsum("spi,spj->sij", weighted, jacobian)
        gradient = np.einsum("spi,sp->si", weighted, residual)
        diagonal = np.einsum("sii->si", hessian)
        floor = 1e-12 * diagonal.max(-1, keepdims=True) + 1e-300
        damped = hessian + np.einsum("si,ij->sij", damping[:, None] * np.maximum(diagonal, floor) + floor, np.eye(5))
        return np.asarray(-np.linalg.solve(damped, gradient[..., None])[..., 0])


def _starts(problem: _Problem) -> Array:
    """Return the best of a grid over all that the law can be: the shares at the mean point, and the exponents."""
    level = float(problem.y.mean())
    shares = [math.log(share) + level for share in (0.02, 0.1, 0.3, 0.6)]
    floors = [math.log(share) + level for share in (0.2, 0.5, 0.7, 0.9)]
    exponents = (0.1, 0.25, 0.4, 0.7, 1.2)
    grid = np.array(list(itertools.product(shares, shares, floors, exponents, exponents)))
    order = np.argsort(problem.objective(grid, np.ones((1, len(problem.y)))))
    return grid[order[:_STARTS]]


def _power(base: float, exponent: float) -> float:
    """Return `base ** (1 / exponent)`, or infinity where that is no float."""
    log = math.log(base) / exponent
    return math.exp(log) if log < 700 else math.inf
