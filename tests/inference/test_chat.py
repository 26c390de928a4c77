"""What the verbs `generate` and `chat` print is what transformers writes with the exported model and its template."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.cli import chat as chat_verb
from orchestrator.cli import generate as generate_verb
from orchestrator.data.chat_template import ChatTemplate
from orchestrator.data.conversation_encoder import BUILTIN_TEMPLATES
from orchestrator.errors import ConfigErrors, DataError
from orchestrator.inference.chat_task import Answering, ChatJob, ChatSession, end_of_turn
from orchestrator.inference.generator import Writer
from orchestrator.interop.importing import import_weights
from tests.lab import chat as lab
from tests.lab.slow import cases
from tests.lab.tokenizers import add_llama

transformers = pytest.importorskip("transformers")
GREEDY = {"temperature": 0.0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make(tmp_path_factory.mktemp(family), family) for family in lab.FAMILIES}


def make(parent: Path, family: str, window: int = 256, multiple: int = 1) -> Path:
    """A random model with the tokenizer and the template of a family, in `hub`, and imported."""
    folder = lab.make(parent / "hub", family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    add_llama(folder, window, 0.5, multiple, seed=1, **ends)
    import_weights(folder, str(parent / "imported"), "hf")
    return parent


def in_transformers(folder: Path, turns: list[str], system: str | None, tokens: int, ends: list[int]) -> list[str]:
    """A conversation, each answer by the whole of it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hub")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hub", dtype=torch.float32)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
        found = model.generate(**ids, **settings)[0, ids["input_ids"].shape[1] :].tolist()
        found = found[:-1] if found[-1] in ends else found
        messages.append({"role": "assistant", "content": tokenizer.decode(found)})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def run_verb(verb: Any, words: list[str], capsys: Any, monkeypatch: Any = None, lines: str = "") -> list[str]:
    if monkeypatch is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert verb.main([*words, "hardware=cpu"]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("family", cases(lab.FAMILIES, quick=("llama3", "chatml")))
def test_answers_are_those_of_transformers(folders, family, capsys, monkeypatch):
    """Three turns, each behind what the cache holds of the ones before; then anew, and with another system message."""
    folder, turns = folders[family], ["the cat?", "where?", "why"]
    words = [f"checkpoint={folder / 'imported'}", "tokens=12", "temperature=0", "json=true"]
    system = None if family in ("mistral", "gemma") else "Be the cat."
    words += [] if system is None else [f"system={system}"]
    lines = "\n".join([*turns, "/reset", turns[1], "/retry", "/nothing", "/exit", "never read"])
    found = [json.loads(line) for line in run_verb(chat_verb, words, capsys, monkeypatch, lines)]
    tokenizer = Writer(Checkpoint(folder / "imported"), CPU).tokenizer
    ends = [tokenizer.eos_id, *end_of_turn(ChatTemplate(tokenizer))]
    expected = in_transformers(folder, turns, system, 12, ends)
    again = in_transformers(folder, turns[1:2], system, 12, ends) * 2
    assert [answer["content"] for answer in found] == expected + again
    assert [answer["seed"] for answer in found] == [0, 1, 2, 3, 4]
    assert len(set(expected)) == 3


def test_prompts_of_a_file_are_continued_as_transformers_does_it(folders, tmp_path, capsys):
    folder = folders["llama3"]
    prompts = ["the cat", "def f(x):\n    return", "日本", "the quick brown fox jumps over", "x"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text} if text != "x" else text) for text in prompts))
    words = [f"checkpoint={folder / 'imported'}", f"prompts_file={file}", "tokens=10", "temperature=0"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hub")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hub", dtype=torch.float32)
    expected = []
    for prompt in prompts:
        ids = Writer(Checkpoint(folder / "imported"), CPU).tokenizer.prompt_ids(prompt)
        settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
        found = model.generate(torch.tensor([ids]), **settings)[0].tolist()
        expected.append([token for token in found[len(ids) :] if token != tokenizer.eos_token_id])
    found = [json.loads(line) for line in run_verb(generate_verb, [*words, "json=true", "rows=2"], capsys)]
    assert [row["prompt"] for row in found] == prompts
    assert [row["text"] for row in found] == [tokenizer.decode(ids) for ids in expected]
    shown = run_verb(generate_verb, [*words, "rows=3"], capsys)
    assert shown[0] == "--- 1 of 5, seed 0"
    for bad, message in (("{", "no JSON"), ('{"text": "x"}', "holds no prompt"), ("", "no prompt in the file")):
        file.write_text(bad)
        with pytest.raises(DataError, match=message):
            generate_verb.main(words)


def test_samples_are_those_that_each_seed_gives_alone(folders, capsys):
    words = [f"checkpoint={folders['chatml'] / 'imported'}", "prompt=the", "tokens=9", "temperature=1", "json=true"]
    together = run_verb(generate_verb, [*words, "samples=3", "seed=5"], capsys)
    alone = [run_verb(generate_verb, [*words, f"seed={seed}"], capsys)[0] for seed in (5, 6, 7)]
    assert together == alone
    assert len(set(together)) == 3


def test_a_long_conversation_loses_its_oldest_turns(tmp_path, capsys):
    writer = Writer(Checkpoint(make(tmp_path, "chatml", window=96) / "imported"), CPU)
    answering = Answering(writer, ChatJob("Be brief.", 8, GREEDY, [], 0))
    prompts = []

    def answers(ids, seed):
        prompts.append(len(ids))
        return answering(ids, seed)

    conversation, out = ChatSession(answering, answers), io.StringIO()
    conversation.hold(io.StringIO("the cat sat on\nthe mat again\nand again\\\nand again\n" + "so long " * 60), out)
    said = capsys.readouterr().err
    assert "its oldest turn is left out" in said
    assert "the message is too long for this model" in said
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(prompts) == 3
    assert max(prompts) <= 96 - 8


def test_a_built_in_template_is_named_or_a_file(folders, tmp_path, capsys, monkeypatch):
    (tmp_path / "simple.jinja").write_text(BUILTIN_TEMPLATES["simple"])
    words = [f"checkpoint={folders['chatml'] / 'imported'}", "tokens=12", "temperature=0"]
    given = (["template=simple"], [f"template={tmp_path / 'simple.jinja'}"], [])
    named, file, own = [run_verb(chat_verb, [*words, *more], capsys, monkeypatch, "the cat?\n") for more in given]
    assert named == file != own


def test_wrong_words_of_chat_are_one_error(folders, tmp_path):
    checkpoint = f"checkpoint={folders['chatml'] / 'imported'}"
    with pytest.raises(ConfigErrors, match="colour"):
        chat_verb.main([checkpoint, "colour=red", "top_p=2"])
    with pytest.raises(DataError, match=r"cannot be read[\s\S]* template=[\s\S]*simple, chatml, or a file"):
        chat_verb.main([checkpoint, f"template={tmp_path / 'none.jinja'}"])
    (tmp_path / "bad.jinja").write_text("{% for m in %}")
    with pytest.raises(DataError, match="template"):
        chat_verb.main([checkpoint, f"template={tmp_path / 'bad.jinja'}", "hardware=cpu"])
