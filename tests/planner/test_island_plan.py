"""A run planned on islands: bytes as the codec writes them, links and waiting by hand, failures, words and messages."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from orchestrator.api.island_planning import exchange_terms, read_sites
from orchestrator.api.planning import plan
from orchestrator.chips.load import load_catalogue
from orchestrator.config.compose import compose
from orchestrator.errors import ConfigErrors
from orchestrator.islands.boxes import Box
from orchestrator.islands.codec import encoded_bytes
from orchestrator.models.shapes import parameter_shapes
from orchestrator.planner.estimate.exchange_bytes import KINDS, exchange_bytes, typical_bytes
from orchestrator.planner.exchange_terms import ExchangeTerms
from orchestrator.planner.island_plan import Site, blocked_seconds, needed_bits, plan_islands
from orchestrator.planner.job_plan import plan_fleet
from orchestrator.planner.quantity import given, write
from tests.planner.fakes import Counted, fleet_of, request_of

CATALOGUE = load_catalogue()
# Tensors of a thousand millions of numbers in one direction, in a step of a second.
SIZE, STEP = 1e9, 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["tiny", "llama_20m", "tiny_moe"])
def test_bytes_are_those_that_the_codec_writes(model, kind):
    config = compose([f"model={model}", "model.vocab_size=4096"]).config.model
    named = list(parameter_shapes(config))
    shapes = [shape for _, shape in named]
    written = sum(encoded_bytes(Box.whole(name, shape), kind) for name, shape in named)
    assert exchange_bytes(shapes, kind) == written
    odd = [(), (7,), (70_001,), (3, 5, 7), (2000, 3), (5, 2049)]
    assert exchange_bytes(odd, kind) == sum(encoded_bytes(Box.whole("odd", shape), kind) for shape in odd)


def test_bytes_of_a_model_of_known_size_alone_are_about_right():
    shapes = [shape for _, shape in parameter_shapes(compose(["model=llama3_8b"]).config.model)]
    count = exchange_bytes(shapes, "fp32") / 4
    for kind in KINDS:
        # Rows longer than a group have one scale as well, so the true figure is a little below.
        exact, typical = exchange_bytes(shapes, kind), typical_bytes(count, kind)
        assert (1 - 4 / 1024 / KINDS[kind]) * typical <= exact <= typical, kind


def test_what_an_exchange_waits_for():
    plain = ExchangeTerms(inner_steps=16)
    # 8 Gbit there and back at 1 Gbit/s: nothing hides them.
    assert blocked_seconds(SIZE, 1e9, STEP, plain) == 16
    assert blocked_seconds(SIZE, 1e9, STEP, replace(plain, fragments=4)) == 16
    # Each of four fragments takes 4 s, of which 3 steps hide 3.
    assert blocked_seconds(SIZE, 1e9, STEP, replace(plain, fragments=4, overlap_steps=3)) == 4
    assert blocked_seconds(SIZE, 1e9, STEP, replace(plain, fragments=4, overlap_steps=4)) == 0
    # Each of the four takes 40 s, of which 16 steps hide 16.
    assert blocked_seconds(SIZE, 1e8, STEP, replace(plain, fragments=4, overlap_steps=16)) == 96
    # However much is overlapped, 80 s in one direction do not pass in a round of 16.
    assert blocked_seconds(SIZE, 1e8, STEP, replace(plain, overlap_steps=10_000)) == 64


@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_the_link_that_is_needed_is_just_enough(overlap):
    terms = ExchangeTerms(inner_steps=16, fragments=4, overlap_steps=overlap)
    blocked = blocked_seconds(SIZE, needed_bits(SIZE, STEP, terms), STEP, terms)
    assert blocked / (16 * STEP + blocked) == pytest.approx(0.05 if not overlap else 0, abs=1e-9)
    assert blocked_seconds(SIZE, 0.9 * needed_bits(SIZE, STEP, terms), STEP, terms) > blocked


def _planned(terms, gbits=(10.0, 10.0), **more):
    """Two islands of which the second is three times as fast."""
    fake = Counted(seconds=lambda job, plan: 64.0 / plan.devices)
    request = request_of(estimators=fake.estimators, batch_tokens=2**22, tokens=1e11, **more)
    plans = [plan_fleet(request, fleet_of(text), CATALOGUE) for text in ("h100x64", "h100x192")]
    plans[1] = replace(plans[1], figures={**plans[1].figures, "speed": given("speed", 3 * 2**22, "tokens/s", "test")})
    sites = [Site(f"i{n}", "", given("link", gbit * 1e9, "bit/s", "test")) for n, gbit in enumerate(gbits)]
    return plan_islands(request, terms, sites, plans)


def test_shares_follow_speeds_and_figures_follow_from_each_other():
    terms = ExchangeTerms(inner_steps=64, kind="int8", shapes=((1024, 1024),) * 1000)
    found = _planned(terms)
    assert [share.value for share in found.shares] == [0.25, 0.75]
    assert found.step.value == pytest.approx(0.25), "a step of 2^22 tokens at four times 2^22 tokens/s"
    one = {name: value.value for name, value in found.outcomes[0].figures.items()}
    assert one["size"] == 1000 * (2**20 + 4 * 1024)
    assert one["per_step"] == one["size"] / 64
    blocked = 2 * 8 * one["size"] / 10e9
    assert one["waiting"] == pytest.approx(blocked / (64 * 0.25 + blocked))
    assert one["speed"] == pytest.approx(4 * 2**22 * (1 - one["waiting"]))
    assert one["days"] == pytest.approx(1e11 / one["speed"] / one["goodput"] / 86400)
    assert one["cost"] == pytest.approx(256 * one["days"] * 24 * 3.99)
    days = [each.figures["waiting"].value for each in found.sweep]
    assert days == sorted(days, reverse=True), "the rarer the exchange, the less is waited for"
    assert [each.terms.kind for each in found.kinds] == list(KINDS)


def test_who_waits_for_whom():
    terms = ExchangeTerms(inner_steps=64, shapes=((1024, 1024),) * 1000)
    waits = {
        algorithm: _planned(replace(terms, algorithm=algorithm), (1.0, 100.0)).outcomes[0].figures
        for algorithm in ("diloco", "decoupled")
    }
    slow, fast = (
        blocked / (16 + blocked) for blocked in (blocked_seconds(4 * 1000 * 2**20, g, 0.25, terms) for g in (1e9, 1e11))
    )
    assert waits["diloco"]["waiting"].value == pytest.approx(slow), "all wait for the slow link"
    assert waits["decoupled"]["waiting"].value == pytest.approx(0.25 * slow + 0.75 * fast)
    each = [plan.figures["goodput"].value for plan in _planned(terms).plans]
    assert waits["diloco"]["goodput"].value == pytest.approx(each[0] * each[1])
    assert waits["decoupled"]["goodput"].value == pytest.approx(0.25 * each[0] + 0.75 * each[1])


def test_an_island_that_does_not_hold_the_model_is_named():
    request = request_of(batch_tokens=2**20)
    plans = [plan_fleet(request, fleet_of(text), CATALOGUE) for text in ("h100x64", "h100x1")]
    sites = read_sites("[h100x64, {fleet: h100x1, name: small}]")
    found = plan_islands(request, ExchangeTerms(), sites, plans)
    assert not found.fits
    assert found.misfits == ("small",)
    assert not found.outcomes


def test_the_configuration_says_how_they_exchange():
    words = ["model=tiny", "model.vocab_size=4096", "islands=decoupled", "islands.exchange=int4", "islands.fragments=2"]
    terms = exchange_terms(compose(words).config, 4096)
    assert (terms.algorithm, terms.kind, terms.fragments) == ("decoupled", "int4", 2)
    assert exchange_bytes(terms.shapes, "fp32") == 5_116_416, "what an island of tiny sends to its hub"
    exact = exchange_terms(compose([*words, "islands=synchronous"]).config, 4096)
    assert (exact.inner_steps, exact.fragments, exact.kind) == (1, 1, "fp32")


def test_words_text_data_and_page(tmp_path):
    islands = ["h100x8", {"fleet": "h100x16", "gbit_per_s": 5, "name": "big"}]
    found = plan(["model=llama3_8b", "islands.exchange=int8", "islands.inner_steps=32"], islands=islands, tokens="1T")
    text = found.text(plain=True)
    for word in ("big alone", "one fleet, h100-sxm x 24", "32 *", "int8 *", "synchronous, fp32", "~10 Gbit/s"):
        assert word in text, word
    data = json.loads(json.dumps(found.to_dict()))["islands"]
    assert [one["name"] for one in data["islands"]] == ["island-0", "big"]
    first, exact = data["outcomes"][0], data["outcomes"][-1]
    assert first["figures"]["size"]["value"] == pytest.approx(exact["figures"]["size"]["value"] / 4, rel=0.01)
    assert exact["figures"]["days"]["value"] > first["figures"]["days"]["value"]
    from orchestrator.report.island_plan_page import islands_section

    page = islands_section(found.islands)
    assert "<svg" in page
    assert "big alone" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("[h100x64]", ["two or more"]),
        ("[h100x64, {fleet: h100x8, gbit: 1}]", ["gbit"]),
        ("[h100x64, {fleet: h100x8, gbit_per_s: 0}, nochip]", ["gbit_per_s is out of range", "not a fleet"]),
        ("[h100x64, h100@$5M]", ["a budget is for one fleet"]),
        ("[{fleet: h100x8, name: a}, {fleet: h100x8, name: a}]", ["two islands have one name"]),
        ("[h100x64, ", ["is not a list"]),
    ],
)
def test_bad_islands(words, said):
    with pytest.raises(ConfigErrors) as error:
        read_sites(words)
    assert all(part in str(error.value) for part in said)


def test_a_fleet_and_islands_are_one_too_many():
    with pytest.raises(ConfigErrors, match="both say the chips"):
        plan(["model=tiny"], fleet="h100x8", islands="[h100x8,h100x8]")
    with pytest.raises(ConfigErrors, match="'fleet' is missing"):
        plan(["model=tiny"])


def test_links_are_written_in_thousands():
    assert write(5_116_416, "bytes") == "5.12 MB"
    assert write(8.4e8, "bit/s") == "840 Mbit/s"
