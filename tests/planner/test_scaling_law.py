"""Fits of L(N, D), and plans for a loss."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from orchestrator import cli
from orchestrator.api.ladders import read_fit, read_runs, read_table, write_fit
from orchestrator.api.planning import plan
from orchestrator.config.compose import compose
from orchestrator.errors import ConfigError, ConfigErrors
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.scaling_law import LadderPoint, ScalingLaw, fit_ladder
from orchestrator.planner.target_loss import TargetLoss, shape_for

# Hoffmann et al., arXiv 2203.15556, and Besiroglu et al., arXiv 2404.10102.
HOFFMANN = ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU = ScalingLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def ladder(law: ScalingLaw, noise: float = 0.0, seed: int = 0, sizes: int = 8, spans: int = 5) -> list[LadderPoint]:
    random = np.random.default_rng(seed)
    points = []
    for size in np.geomspace(5e7, 1.6e10, sizes):
        for ratio in np.geomspace(3, 300, spans):
            error = math.exp(noise * random.standard_t(4))
            points.append(LadderPoint(size, size * ratio, law.loss(size, size * ratio) * error))
    return points


def objective(law: ScalingLaw, points: list[LadderPoint]) -> float:
    sizes = [abs(math.log(law.loss(point.parameters, point.tokens) / point.loss)) for point in points]
    return sum(0.5 * size**2 if size <= 1e-3 else 1e-3 * (size - 5e-4) for size in sizes)


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU])
def test_exact_losses_give_the_law_back(law):
    found = fit_ladder(ladder(law), resamples=0).law
    for name in vars(law):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-4), name


def test_the_intervals_hold_the_law_that_made_the_losses():
    """Of eight ladders with noise of 0.4%: each number is in its interval about nineteen times out of twenty."""
    inside = []
    for seed in range(8):
        fit = fit_ladder(ladder(BESIROGLU, 0.004, seed), resamples=60)
        for name in ("irreducible", "alpha", "beta"):
            low, high = fit.interval(lambda law, name=name: getattr(law, name))
            inside.append(low <= getattr(BESIROGLU, name) <= high)
    assert sum(inside) >= 0.8 * len(inside)
    low, high = fit.interval(lambda law: law.alpha)
    assert high - low < 0.1


def test_the_minimum_is_that_of_another_optimizer():
    optimize = pytest.importorskip("scipy.optimize")
    points = ladder(BESIROGLU, 0.01, seed=3)
    fit = fit_ladder(points, resamples=0)
    n, d, y = (np.log([getattr(p, key) for p in points]) for key in ("parameters", "tokens", "loss"))

    def huber(theta):
        a, b, e, alpha, beta = theta
        predicted = np.logaddexp(np.logaddexp(a - alpha * n, b - beta * d), e)
        size = np.abs(predicted - y)
        return np.where(size <= 1e-3, 0.5 * size**2, 1e-3 * (size - 5e-4)).sum()

    starts = [(math.log(482), math.log(2085), math.log(1.8), 0.35, 0.37), (5, 5, 0.5, 0.3, 0.3), (10, 10, 0, 0.5, 0.5)]
    options = {"xatol": 1e-10, "fatol": 1e-16, "maxiter": 20_000, "maxfev": 20_000}
    theirs = min(optimize.minimize(huber, start, method="Nelder-Mead", options=options).fun for start in starts)
    assert fit.objective == pytest.approx(objective(fit.law, points), rel=1e-9)
    assert fit.objective <= theirs * (1 + 1e-6)


def test_the_optimum_is_one():
    size, tokens = BESIROGLU.optimum(2.0)
    assert BESIROGLU.loss(size, tokens) == pytest.approx(2.0)
    for factor in (0.9, 1.1):
        assert BESIROGLU.loss(size * factor, tokens / factor) > 2.0, "the same compute otherwise spent"
    assert BESIROGLU.with_compute(6 * size * tokens) == (pytest.approx(size), pytest.approx(tokens))
    assert BESIROGLU.loss(size, BESIROGLU.tokens_for(2.0, size)) == pytest.approx(2.0)
    assert BESIROGLU.optimum(1.8) is None
    assert BESIROGLU.tokens_for(2.0, 1e8) is None


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (ladder(HOFFMANN)[:5], "too small for a law of five numbers"),
        ([LadderPoint(1e8, 1e9 * (1 + at), 3.0 - at / 10) for at in range(8)], "1 sizes of model"),
        ([*ladder(HOFFMANN), LadderPoint(1e8, 1e9, math.nan)], "not of positive numbers"),
    ],
)
def test_a_ladder_that_says_too_little_is_refused(points, said):
    with pytest.raises(ConfigError, match=said):
        fit_ladder(points)


def test_losses_that_do_not_fall_with_the_size_are_refused():
    """As of a real ladder, whose largest model had too high a learning rate."""
    losses = {32: (2.893, 2.775, 2.579), 64: (2.789, 2.641, 2.365), 96: (2.859, 2.597, 2.476)}
    points = [
        LadderPoint(7e2 * width**1.5, 61_440.0 * 2**at, loss)
        for width, row in losses.items()
        for at, loss in enumerate(row)
    ]
    with pytest.raises(ConfigError, match="do not say how they fall with the"):
        fit_ladder(points)


@pytest.mark.parametrize("wanted", [3e7, 1.2e8, 8e9, 7e10, 4e11])
def test_a_model_of_so_many_parameters_is_found(wanted):
    shape = shape_for(wanted)
    assert parameters(shape) == pytest.approx(wanted, rel=0.2 if wanted < 1e8 else 0.03)
    assert shape.dim % shape.heads == 0
    assert shape.heads % shape.kv_heads == 0
    with pytest.raises(ConfigError, match="a size that is not made up here"):
        shape_for(1e5)


def test_a_fit_is_read_as_it_was_written_and_nothing_else_is(tmp_path):
    fit = fit_ladder(ladder(BESIROGLU, 0.01), resamples=5)
    write_fit(tmp_path / "fit.json", fit)
    assert read_fit(str(tmp_path / "fit.json")) == fit
    for text in ("", "[]", '{"format": 2}', (tmp_path / "fit.json").read_text().replace("0.3", '"x"')):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ConfigError, match="the fit cannot be read"):
            read_fit(str(tmp_path / "broken.json"))


def make_run(folder, size: float, tokens: float, loss: float, status: str = "finished", vocab: int = 256):
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    facts = {"status": status, "parameters": 9 * size, "active_parameters": size, "vocab_size": vocab, "legs": []}
    (folder / "run.json").write_text(json.dumps(facts))
    rows = [{"step": 9, "loss": loss, "tokens": tokens}, {"step": 9, "val_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_ladder_is_read_from_runs(tmp_path):
    for at, point in enumerate(ladder(HOFFMANN, sizes=3, spans=3)):
        make_run(tmp_path / "runs" / "ladder" / str(at), point.parameters, point.tokens, point.loss)
    found = read_runs(["ladder/*"], str(tmp_path / "runs"))
    assert {(point.parameters, point.loss) for point in found} == {
        (point.parameters, point.loss) for point in ladder(HOFFMANN, sizes=3, spans=3)
    }
    make_run(tmp_path / "runs" / "other" / "cut", 1e8, 1e9, 3.0, status="pruned")
    make_run(tmp_path / "runs" / "other" / "words", 1e8, 1e9, 3.0, vocab=50_000)
    with pytest.raises(ConfigErrors, match=r"has not finished(.|\n)*other/cut: pruned(.|\n)*different vocabularies"):
        read_runs(["ladder/*", "other/*"], str(tmp_path / "runs"))
    with pytest.raises(ConfigErrors, match="no run has such a name"):
        read_runs(["nothing*"], str(tmp_path / "runs"))


def test_a_table_may_have_operations_instead_of_tokens(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("N,FLOP,loss,more\n1e8,6e18,3.0,x\n2e8,6e18,2.9,x\n")
    assert [point.tokens for point in read_table(str(path), ("N", "FLOP", "loss"))] == [1e10, 5e9]
    with pytest.raises(ConfigErrors, match=r"lacks columns(.|\n)*N, FLOP, loss, more"):
        read_table(str(path))
    path.write_text("parameters,tokens,loss\n1,2,x\n")
    with pytest.raises(ConfigErrors, match=r"has no numbers(.|\n)*table.csv:2"):
        read_table(str(path))


@pytest.fixture
def fit(tmp_path, capsys):
    path = tmp_path / "losses.csv"
    rows = [f"{point.parameters},{point.tokens},{point.loss}" for point in ladder(BESIROGLU, 0.005)]
    path.write_text("\n".join(["parameters,tokens,loss", *rows]))
    words = [f"table={path}", f"out={tmp_path / 'fit.json'}", f"html={tmp_path / 'fit.html'}", "resamples=40"]
    assert cli.main(["scaling-law", *words]) == 0
    assert "95% of resamples" in capsys.readouterr().out
    return tmp_path / "fit.json"


def test_a_loss_is_planned_with_the_model_of_the_least_compute(fit):
    page = fit.with_name("fit.html").read_text()
    assert "Loss over compute" in page
    assert page.count("<tr>") == 1 + 5 + 1 + 4 + 1 + 40
    plans = plan(fleet="h100x8", target_loss=2.3, fit=str(fit), axes="train")
    data = plans.to_dict()
    target = data["target"]
    size, tokens = target["extent"]["parameters"], target["extent"]["tokens"]
    expected = BESIROGLU.optimum(2.3)
    assert (size, tokens) == (pytest.approx(expected[0], rel=0.3), pytest.approx(expected[1], rel=0.3))
    assert data["model"]["parameters"] == pytest.approx(size, rel=0.03)
    assert data["tokens"]["value"] == tokens
    assert target["low"]["flops"] < target["extent"]["flops"] < target["high"]["flops"]
    (note,) = [note for note in data["fleets"][0]["notes"] if "resampled fits" in note]
    assert "days" in note
    assert "cost $" in note
    shown = plans.text()
    assert "takes" in shown
    train = " ".join(shown.partition("  train ")[2].partition("  runner-up")[0].split())
    config = compose(train.split()).config  # what the plan says can be run
    assert config.model.dim == data["model"]["dim"]


def test_the_tokens_of_a_given_model_follow_from_the_loss(fit):
    read = read_fit(str(fit))
    target = TargetLoss.of(2.3, read, "fit.json", 8e9)
    assert read.law.loss(8e9, target.extent.tokens) == pytest.approx(2.3)
    assert "takes this model" in target.lines()[1]
    far = TargetLoss.of(1.95, read, "fit.json")
    assert any("far from what was measured" in line for line in far.lines())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target_loss=2.0"], "belong together"),
        (["target_loss=1.5", "FIT"], "no training reaches the loss"),
        (["target_loss=2.0", "FIT", "model=tiny"], "no number of tokens brings this model to the loss"),
        (["target_loss=2.0", "FIT", "tokens=1T"], "decides what tokens= would say"),
        (["target_loss=2.0", "FIT", "model.layers=3"], "decides what model.layers= would say"),
        (["target_loss=2.0", "FIT", "model=mixtral_8x7b"], "of models without experts"),
    ],
)
def test_what_a_law_cannot_say_is_refused(words, said, fit, capsys):
    words = [f"fit={fit}" if word == "FIT" else word for word in words]
    assert cli.main(["plan", "fleet=h100x8", *words]) == 2
    assert said in capsys.readouterr().err
