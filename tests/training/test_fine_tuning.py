"""Supervised fine-tuning: its losses are those of transformers, the same on every layout, and exact over a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.schema import RunConfig
from orchestrator.data.chat_template import chat_templates
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError
from orchestrator.evaluation.text_loss import read_texts
from orchestrator.interop.importing import import_weights
from orchestrator.runs.stored_model import files_of
from tests.lab import chat
from tests.lab.runs import SMALL, checkpoint, losses, train
from tests.lab.tensors import read_all
from tests.lab.tokenizers import add_llama
from tests.runs.test_init_from import settled

transformers = pytest.importorskip("transformers")
STEPS, SEQ = 3, 128
ADAMW = ("optim.lr=2e-3", "optim.weight_decay=0.1", "optim.schedule.kind=constant", "optim.schedule.warmup_steps=0")


def talks() -> list[list[dict[str, Any]]]:
    return [
        [
            {"role": role, "content": f"{number} {text} " * (1 + (number * 5 + turn) % 3)}
            for turn in range(1 + number % 2)
            for role, text in (("user", "the cat?"), ("assistant", "sat on the mat"))
        ]
        for number in range(12)
    ]


def hub(folder: Path, family: str) -> Any:
    """A directory as on the hub, with a chat template; returns its model in fp32."""
    # Filled up, as those on the hub are: a vocabulary divides over devices then.
    return add_llama(chat.make(folder, family), SEQ, 0.1, 16)


def run(tmp_path: Path, family: str, *more: str) -> RunConfig:
    """A run that trains an imported model on the conversations, all of them in every step."""
    if not (tmp_path / "imported").exists():
        hub(tmp_path / "hub", family)
        import_weights(tmp_path / "hub", str(tmp_path / "imported"), "hf")
        rows = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks())
        (tmp_path / "talks.jsonl").write_text(rows, encoding="utf-8")
    own = ("model.", "data.tokenizer", "train.seq_len", "train.global_batch", "train.max_steps", "optim.schedule")
    plain = [word for word in SMALL if not word.startswith(own)]
    places = [f"runs_dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"]
    data = ["data.messages=chat", f"data.sources=[{{path: {tmp_path / 'talks.jsonl'}, weight: 1}}]"]
    whole = ["data.validation_fraction=0", f"train.seq_len={SEQ}", f"train.max_steps={STEPS}", "train.sample.tokens=0"]
    init = f"train.init_from={tmp_path / 'imported'}"
    return settled(*plain, *places, *data, *whole, init, "checkpoint.every_steps=null", *ADAMW, *more)


def reference(folder: Path, steps: int) -> list[float]:
    """Losses of transformers' own path: each conversation by itself, masked by its template, all in one step."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), eps=1e-8)
    made = [tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True) for talk in talks()]
    total = sum(sum(one["assistant_masks"]) for one in made)
    found = []
    for _ in range(steps):
        loss = torch.zeros(())
        for one in made:
            ids, mask = torch.tensor(one["input_ids"]), torch.tensor(one["assistant_masks"]).bool()
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = loss + torch.nn.functional.cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum")
        loss = loss / total
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return found


def sequences(tmp_path: Path, config: RunConfig) -> int:
    from orchestrator.training.data_module import TokenDataModule

    return TokenDataModule(config).stream.windows[0]


def whole_batch(tmp_path: Path, family: str, *more: str) -> str:
    """The global batch that has every sequence once."""
    config = run(tmp_path, family, f"train.global_batch_tokens={SEQ}", *more)
    return f"train.global_batch_tokens={sequences(tmp_path, config) * SEQ}"


@pytest.mark.parametrize(
    ("family", "packing"),
    [
        ("chatml", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama3", False), ("mistral", True))),
    ],
)
def test_losses_are_those_of_transformers(tmp_path: Path, family: str, packing: bool) -> None:
    how = f"data.chat.packing={str(packing).lower()}"
    batch = whole_batch(tmp_path, family, how)
    ours = losses(train(run(tmp_path, family, how, batch), 1, tmp_path / "run"))
    np.testing.assert_allclose(ours, reference(tmp_path / "hub", STEPS), rtol=1e-5)
    assert chat_templates(files_of(Checkpoint(checkpoint(tmp_path / "run", STEPS)))) == {
        "default": chat.FAMILIES[family][0]
    }


LAYOUTS = {
    "fsdp": (2, ["layout.fsdp=2"]),
    "tensor": (2, ["layout.tensor=2"]),
    "context": (2, ["layout.context=2"]),
    "pipeline": (2, ["layout.pipeline=2"]),
    "fsdp x tensor": (4, ["layout.fsdp=2", "layout.tensor=2"]),
}
EVEN = [f"train.global_batch_tokens={4 * SEQ}", "train.micro_batch_size=2"]


@pytest.mark.parametrize(
    "name", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "fsdp")]
)
def test_every_layout_trains_on_conversations_alike(tmp_path: Path, name: str) -> None:
    size, layout = LAYOUTS[name]
    one = losses(train(run(tmp_path, "chatml", *EVEN), 1, tmp_path / "one"))
    more = losses(train(run(tmp_path, "chatml", *EVEN, f"hardware.devices={size}", *layout), size, tmp_path / "more"))
    np.testing.assert_allclose(more, one, rtol=1e-5)


def test_a_stopped_run_ends_bitwise_as_one_that_was_not(tmp_path: Path) -> None:
    train(run(tmp_path, "chatml", *EVEN), 1, tmp_path / "whole")
    train(run(tmp_path, "chatml", *EVEN, "train.max_steps=1"), 1, tmp_path / "halves")
    train(run(tmp_path, "chatml", *EVEN), 1, tmp_path / "halves", checkpoint(tmp_path / "halves", 1))
    whole, halves = (read_all(checkpoint(tmp_path / name, STEPS)) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


def test_a_template_that_is_given_comes_with_the_checkpoint(tmp_path: Path) -> None:
    config = run(tmp_path, "chatml", *EVEN, "data.chat.template=simple", "train.max_steps=1")
    train(config, 1, tmp_path / "run")
    found = chat_templates(files_of(Checkpoint(checkpoint(tmp_path / "run", 1))))
    assert "capitalize" in found["default"]
    # No answer begins within the few tokens that a handover compares; all of these count there.
    measured = json.loads((checkpoint(tmp_path / "run", 1) / "handover.json").read_text())
    assert measured["loss"] > 1
    assert measured["grad_norm"] > 0
    # What the assistant says is no text by itself; a store of it has a loss in runs alone.
    (store,) = {path.parent for path in (tmp_path / "cache").rglob("index.json")}
    tokenizer = TokenStore.open(store).tokenizer
    with pytest.raises(DataError, match="holds conversations"):
        next(read_texts(str(store), tokenizer, config.data))
