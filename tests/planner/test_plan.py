"""From the layout to the bill: days, dollars, and what to do where a model does not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from orchestrator.chips.load import load_catalogue
from orchestrator.errors import ConfigError
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.job_plan import batch_for, ladder, pareto, plan_fleet, rank, search_fleet, smallest_fleet
from orchestrator.planner.plan_data import as_data, portfolio_data
from orchestrator.planner.planned_models import planned_models, refuse_planned_only
from orchestrator.planner.portfolio import assign
from orchestrator.planner.scaling import binding, scale, sizes
from orchestrator.planner.search import Space
from tests.planner.fakes import LLAMA_8B, LLAMA_70B, Counted, fleet_of, request_of

CATALOGUE = load_catalogue()
SURE = {"restart_seconds": 300.0, "save_stall_seconds": 1.0}


def _plan(text="h100x64", shape=LLAMA_8B, fleet_overrides=None, **more):
    return plan_fleet(request_of(shape, **more), fleet_of(text, **(fleet_overrides or {})), CATALOGUE)


def test_figures_follow_from_each_other():
    fake = Counted(seconds=lambda job, plan: 2.0 * job.global_batch_tokens / 2**20 / plan.devices)
    plan = _plan(estimators=fake.estimators, batch_tokens=2**20, tokens=1e11)
    figures = {name: value.value for name, value in plan.figures.items()}
    assert figures["speed"] == pytest.approx(2**20 / (2.0 / 64))
    assert figures["ideal_days"] == pytest.approx(1e11 / figures["speed"] / 86400)
    assert figures["days"] == pytest.approx(figures["ideal_days"] / figures["goodput"])
    assert figures["cost"] == pytest.approx(64 * figures["days"] * 24 * 3.99)
    assert figures["cost_per_trillion"] == pytest.approx(10 * figures["cost"])
    assert figures["power"] == pytest.approx(64 * 1275 * 1.56 / 1e6)
    assert figures["energy"] == pytest.approx(figures["power"] * figures["days"] * 24)
    assert figures["interruptions"] == pytest.approx(figures["days"] * 86400 / figures["mtbf"])


def test_idle_chips_are_paid_for_and_named():
    fake = Counted()
    plan = _plan("h100x72", batch_tokens=2**20, estimators=fake.estimators)
    assert plan.best.plan.devices == 64, "128 sequences go over 64 devices and not over 72"
    assert "8 chips are idle" in " ".join(plan.notes)
    days = plan.figures["days"].value
    assert plan.figures["cost"].value == pytest.approx(72 * days * 24 * 3.99)


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("trn2x64", {"energy", "power"}),
        ("tpu_v5px64", {"energy", "power"}),
        ("gb200x72", {"cost", "cost_per_trillion"}),
    ],
)
def test_unknown_power_and_price_are_unknown(text, unknown):
    plan = _plan(text)
    assert {name for name, value in plan.figures.items() if value.value is None} == unknown
    assert all(value.value != 0 for value in plan.figures.values())
    data = as_data(request_of(), [plan], "time")["fleets"][0]["figures"]
    assert all(data[name]["value"] is None for name in unknown)


def test_estimates_are_marked_to_the_end():
    marked = _plan("tpu_v7xx256")
    assert marked.figures["power"].estimated, "10 MW / 9216 chips is derived"
    assert marked.figures["energy"].estimated
    known = _plan("h100x64", fleet_overrides={"pue": 1.2, "failures_per_chip_day": 1e-4})
    assert not known.figures["power"].estimated


def test_an_unknown_link_makes_lower_bounds():
    fake = Counted(unknown=("inter_bandwidth",))
    plan = _plan(estimators=fake.estimators)
    assert str(plan.figures["step"]).startswith("≥")
    assert plan.figures["speed"].bound == -1
    assert plan.figures["mfu"].bound == -1
    assert plan.figures["days"].bound == 1
    assert plan.figures["cost"].bound == 1
    assert "inter_bandwidth" in " ".join(plan.notes)


def test_a_rate_that_nobody_measured_marks_the_step():
    assert _plan("mi250xx64").figures["step"].estimated == bool(_plan("mi250xx64").best.time.estimated)
    unmeasured = [text for text in ("trn2x64", "tpu_v5px64", "h100x64") if _plan(text).best.time.estimated]
    assert unmeasured, "nobody has published what Trainium2 reaches"
    plan = _plan(unmeasured[0])
    assert str(plan.figures["step"]).startswith("~")
    assert "nobody has measured" in plan.figures["cost"].explain()


def test_the_batch_follows_the_fleet():
    assert batch_for(request_of(), fleet_of("h100x8")).tokens == 2**22
    assert batch_for(request_of(), fleet_of("h100x16384")).tokens == 2**24
    assert batch_for(request_of(), fleet_of("tpu_v5px1M")).tokens == 2**26
    fixed = batch_for(request_of(batch_tokens=2**20), fleet_of("h100x16384"))
    assert (fixed.tokens, fixed.free) == (2**20, False)


def test_a_model_that_cannot_fit_says_what_would():
    plan = _plan("h100x8", LLAMA_70B)
    assert plan.best is None
    assert not plan.figures
    assert re.fullmatch(r"weights and optimizer state take \d+ GiB, its devices hold \d+ together", plan.remedy.needs)
    chips = plan.remedy.chips
    frugal = request_of(LLAMA_70B)
    assert search_fleet(frugal, fleet_of(f"h100x{chips}")).best is not None
    assert search_fleet(frugal, fleet_of(f"h100x{chips - 1}")).best is None
    assert as_data(frugal, [plan], "time")["fleets"][0]["smallest_fleet_chips"] == chips


def test_a_model_that_fits_with_other_choices_says_which():
    space = Space(remats=("none",), micro_batch=16)
    plan = _plan("h100x8", batch_tokens=2**20, space=space, restricted=("train.remat=none",))
    assert plan.best is None
    assert plan.remedy.layout.memory.fits
    assert plan.remedy.chips <= 8


def test_what_train_cannot_do_is_no_remedy():
    axes = Space(pipeline=1, expert=1, zeros=(3,), even=True)
    space = replace(axes, remats=("none",), micro_batch=16)
    plan = _plan("h100x8", batch_tokens=2**20, space=space, widest=axes, restricted=("train.remat=none",))
    assert plan.remedy.layout.plan.pipeline == 1
    alone = _plan("h100x8", LLAMA_70B, space=axes, widest=axes)
    assert alone.remedy.layout is None
    assert search_fleet(request_of(LLAMA_70B, space=axes), fleet_of(f"h100x{alone.remedy.chips}")).best is not None


def test_degrees_that_divide_nothing_are_named_as_such():
    plan = _plan("h100x8", space=Space(tensor=3), restricted=("layout.tensor=3",))
    assert "no layout is legal" in plan.remedy.needs
    assert plan.remedy.layout is not None


def test_no_million_chips_hold_what_no_degree_divides():
    huge = replace(
        LLAMA_70B, name="huge", layers=10_000, dim=262_144, mlp_dim=1_048_576, heads=7, kv_heads=7, head_dim=64
    )
    assert smallest_fleet(request_of(huge), fleet_of("trn1x16"), CATALOGUE) is None


def test_a_budget_buys_the_largest_fleet_within_it():
    fake = Counted(seconds=lambda job, plan: job.global_batch_tokens / plan.devices**0.9 / 1e4).estimators
    budget = 1.05 * _plan("h100x256", estimators=fake).figures["cost"].value
    plan = _plan(f"h100@${budget:.0f}", estimators=fake)
    assert plan.fleet.cluster.chips >= 256
    assert plan.figures["cost"].value <= budget
    more = [size for size in ladder(plan.fleet) if size > plan.fleet.cluster.chips]
    bigger = _plan(f"h100x{more[0]}", estimators=fake)
    assert bigger.figures["cost"].value > budget
    with pytest.raises(ConfigError, match="smallest fleet that fits costs"):
        _plan("h100@$100", estimators=fake)
    with pytest.raises(ConfigError, match="price of gb200 is not published"):
        _plan("gb200@$1M")


@pytest.mark.parametrize("text", ["h100x8", "tpu_v5px64", "trn2x16", "gb200x72", "tpu_v5ex4"])
def test_the_ladder_has_fleets_that_exist(text):
    rungs = ladder(fleet_of(text))
    name = text.rpartition("x")[0]
    assert rungs == sorted(set(rungs))
    assert all(fleet_of(f"{name}x{count}").cluster.chips == count for count in rungs[:40])
    assert rungs[-1] > 0.8 * 2**20


def test_ranks_and_the_pareto_front():
    fake = Counted().estimators
    plans = [_plan(text, estimators=fake) for text in ("h100x64", "gb200x72", "trn2x64", "h100x8", "mi300xx64")]
    for objective, key in (("time", "days"), ("cost", "cost"), ("energy", "energy")):
        numbers = [plan.figures[key].value for plan in rank(plans, objective)]
        known = [number for number in numbers if number is not None]
        assert known == sorted(known)
        assert numbers[: len(known)] == known, "the unknown come last"
    points = {plan.fleet.label: (plan.figures["days"].value, plan.figures["cost"].value) for plan in plans}
    front = {plan.fleet.label for plan in pareto(plans)}
    for label, (days, cost) in points.items():
        beaten = cost is None or any(c and d < days and c < cost for d, c in points.values())
        assert (label in front) == (not beaten)


def test_the_scaling_curve_names_the_links():
    fleet = fleet_of("h100x64")
    assert sizes(fleet)[0] == 8
    assert sizes(fleet)[-1] == 2**20
    assert fleet.cluster.chips in sizes(fleet)
    points = scale(request_of(), fleet, CATALOGUE, [8, 1024, 2**17])
    assert [point.chips for point in points] == [8, 1024, 2**17]
    assert "the network between hosts" not in points[0].links
    first = binding(points)["the network between hosts"]
    assert first.links["the network between hosts"] >= 0.1


def _table(days, costs):
    """Job -> plans on fleets a and b, whose days and costs are given."""
    plan = _plan()
    table = {}
    for job in days:
        plans = []
        for name, day, cost in zip("ab", days[job], costs[job], strict=True):
            figures = {
                key: replace(plan.figures[key], value=value)
                for key, value in (("days", day), ("cost", cost), ("energy", cost))
            }
            plans.append(replace(plan, fleet=replace(plan.fleet, label=name), figures=figures if day else {}))
        table[job] = plans
    return table


def test_a_portfolio_is_split_for_the_objective():
    table = _table({"x": (4, 6), "y": (4, 6), "z": (2, 3)}, {"x": (9, 1), "y": (9, 1), "z": (1, 9)})
    quick = assign(table, "time")
    assert quick.exact
    assert quick.days.value == 6, "x or y on a with z, the other one on b"
    cheap = assign(table, "cost")
    assert {job: plan.fleet.label for job, plan in cheap.placed.items()} == {"x": "b", "y": "b", "z": "a"}
    assert cheap.cost.value == 3
    assert portfolio_data(cheap, "cost")["days"]["value"] == 12


def test_a_portfolio_leaves_out_what_fits_nowhere_and_avoids_the_unknown():
    table = _table({"x": (None, None), "y": (1, 2)}, {"x": (1, 1), "y": (None, 5)})
    result = assign(table, "cost")
    assert result.impossible == ("x",)
    assert result.placed["y"].fleet.label == "b"


def test_many_jobs_are_placed_well_without_comparing_all():
    names = [f"job{index}" for index in range(20)]
    table = _table(
        {name: (1 + index % 5, 2 + index % 3) for index, name in enumerate(names)}, dict.fromkeys(names, (1, 1))
    )
    result = assign(table, "time")
    assert not result.exact
    least = sum(min(plan.figures["days"].value for plan in plans) for plans in table.values()) / 2
    assert least <= result.days.value <= 1.5 * least


@pytest.mark.parametrize("name", list(planned_models()))
def test_planned_models_have_the_parameters_that_their_sources_state(name):
    model = planned_models()[name]
    assert parameters(model.shape) == pytest.approx(model.parameters, rel=0.01)
    assert model.source


def test_train_says_that_such_a_model_can_only_be_planned():
    refuse_planned_only(["model=llama3_8b", "train.max_steps=3"], "train")
    with pytest.raises(ConfigError, match="planned, not trained") as caught:
        refuse_planned_only(["model=kimi_k2"], "train")
    assert "orchestrator plan model=kimi_k2" in str(caught.value)
