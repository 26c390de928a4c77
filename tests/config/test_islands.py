"""The words `islands=[...]`, the rules of the group, and configurations as words."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.as_words import as_words, value_word
from orchestrator.config.compose import compose
from orchestrator.config.words import parse_words
from orchestrator.errors import ConfigErrors
from orchestrator.islands.terms import describe_terms, exchanges_of, terms_of

TPU = "{name: b, hardware: tpu, overrides: ['hardware.simulate=4']}"
TWO = f"islands=[{{hardware: cpu, devices: 2, layout: {{fsdp: 2}}}}, {TPU}]"


def _said(*words: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        compose(words)
    return [f"{problem.what}: {problem.got}" for problem in caught.value.problems]


def test_a_list_of_islands_stands_for_the_members_of_the_group():
    composed = compose([TWO])
    first, second = composed.config.islands.members
    assert (first.hardware, first.devices, first.layout) == ("cpu", 2, {"fsdp": 2})
    assert (second.name, second.overrides) == ("b", ("hardware.simulate=4",))
    assert composed.config.islands.name == "diloco"
    # Of the group the user has said nothing but this: what is resumed keeps its other keys.
    assert composed.overrides == {"islands.members": False}
    assert compose([TWO, "islands.algorithm=synchronous"]).choices["islands"] == "synchronous"
    chosen = compose(["islands=decoupled", TWO])
    assert (chosen.config.islands.algorithm, len(chosen.config.islands.members)) == ("decoupled", 2)
    assert chosen.overrides == {"islands": True, "islands.members": False}


def test_all_mistakes_are_said_at_once():
    found = _said(
        "islands=[{hardware: gpu, share: 0, layout: {x: 2}, overrides: ['model=x']}, {name: island-0, place: remote}]",
        "islands.algorithm=synchronous",
        "islands.exchange=int8",
        "islands.grace_seconds=3",
        "train.ema.decay=0.9",
        "train.global_batch_tokens=256",
    )
    parts = ("hardware", "share", "layout", "overrides", "one name", "this host alone", "exchange=int8")
    for part in (*parts, "grace_seconds", "average", "1 sequences, 2 islands"):
        assert sum(part in one for one in found) == 1, part
    assert len(found) == len(parts) + 3


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["islands.join=tcp://h:1", "islands.island=a"], "a key that they share"),
        (["islands.join=h:1", "islands.island=a", "islands.key_file=k"], "'islands.join' is out of range"),
        (["islands.join=tcp://h:1", "islands.key_file=k"], "has a name"),
        (["islands.island=a"], "belongs to a hub"),
        ([TWO, "islands.join=tcp://h:1", "islands.island=a", "islands.key_file=k"], "part of one of them"),
        ([TWO, "islands.overlap_steps=64"], "before the next exchange"),
        ([TWO, "islands.eager=true"], "waits for the answer"),
        ([TWO, "islands.fragments=65"], "inner step of its own"),
        ([TWO, "islands.bind=*"], "'islands.bind' is out of range"),
        ([TWO, "train.on_nonfinite=rewind"], "rewind"),
        ([TWO, "islands=synchronous", "model=tiny_deepseek"], "balance_bias"),
    ],
)
def test_a_rule_of_the_group(words, part):
    (said,) = _said(*words)
    assert part in said


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12) | st.from_regex(r"[\\'\"${}\[\],:= ]{0,9}"))
def test_any_text_is_itself_as_a_word(text):
    ((_, override),), problems = parse_words([f"name=[{value_word(text)}]"])
    assert not problems
    assert [str(one).replace("\\${", "${") for one in override.value()] == [text]


def test_a_configuration_is_composed_again_from_its_words():
    words = [
        "optim=muon",
        "optim.lr=1e-3",
        "layout.tensor=2",
        "data.sources=[{path: a b, weight: 2, reader: {x: [1]}}]",
    ]
    more = ["hardware.environment={A: 'b c'}", "train.sample.prompt='it\\'s \\${x}'", "islands.outer.lr=0.7"]
    config = compose([*words, *more, TWO]).config
    assert compose(as_words(config)).config == config
    own = compose(["optim._target_=torch.optim.RAdam", "optim.arguments.eps=1e-6"]).config
    assert compose(as_words(own)).config == own
    alone = compose(as_words(config, without=("islands", "optim.lr"))).config
    assert (alone.islands.members, alone.islands.outer.lr, alone.train) == ((), "auto", config.train)
    assert alone.optim.lr != config.optim.lr


def test_terms_are_decided_by_the_number_of_exchanges():
    islands = compose([TWO, "islands.exchange=int8", "islands.inner_steps=10"]).config.islands
    few, many = terms_of(islands, 990), terms_of(islands, 991)
    assert (few.lr, few.momentum, few.error_feedback) == (1.0, 0.0, True)
    assert (exchanges_of(islands, 991), many.lr, many.momentum) == (100, 0.7, 0.9)
    assert "int8 with error feedback" in describe_terms(few)
    exact = terms_of(compose([TWO, "islands=synchronous"]).config.islands, 20)
    assert (exact.gradients, exact.inner_steps, exact.exchange) == (True, 1, "fp32")
