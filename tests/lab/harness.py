"""Models and tasks for lm-eval, small and from local files, and what lm-eval's own model makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.lab import tokenizers as lab

RELATIVE = 1e-5
LONGEST = 48
_WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "def",
    "encode",
    "text",
    "return",
    "naïve",
    "café",
]


def preload() -> None:
    """Import once what every forked process would import for itself."""
    import datasets  # noqa: F401

    import orchestrator.evaluation.evaluate_job
    import orchestrator.evaluation.harness_tasks  # noqa: F401


def make_checkpoint(folder: Path, kind: str) -> Path:
    """A checkpoint of random weights with a tokenizer of a kind, by way of an import."""
    from orchestrator.interop.importing import import_weights

    hub = lab.make(folder / "hub", kind)
    lab.add_llama(hub, LONGEST, 0.4, 8, bos_token_id=None, eos_token_id=None)
    import_weights(hub, str(folder / "imported"), "hf")
    return folder / "imported"


def export(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as transformers reads it."""
    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.interop.exporting import export_hf

    export_hf(Checkpoint(checkpoint), folder, "stored", 10**9, lambda *unused: None)
    return folder


def _sentence(number: int, length: int) -> str:
    return " ".join(_WORDS[(number * 7 + place * place + place) % len(_WORDS)] for place in range(length))


def write_tasks(folder: Path) -> Path:
    """A task of each kind, with its data: choices, texts that are longer than the model's window, and answers."""
    folder.mkdir(parents=True)
    questions = [
        {
            "question": _sentence(number, 2 + number % 5),
            "choices": [_sentence(number + choice, 1 + choice) for choice in range(3)],
            "answer": number % 3,
        }
        for number in range(7)
    ]
    texts = [{"text": _sentence(number, 3 + 9 * number)} for number in range(5)]
    answers = [{"question": _sentence(number, 1 + number), "answer": "cat"} for number in range(4)]
    for name, rows in {"choices": questions, "texts": texts, "answers": answers}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = "dataset_path: json\ntest_split: test\nmetadata: {version: 1.0}\n"
    data = "dataset_kwargs: {data_files: {test: %s}}\n"
    (folder / "lab_choices.yaml").write_text(
        f"task: lab_choices\noutput_type: multiple_choice\n{common}{data % (folder / 'choices.jsonl')}"
        "doc_to_text: 'Question: {{question}}\nAnswer:'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "fewshot_split: test\nmetric_list:\n  - {metric: acc}\n  - {metric: acc_norm}\n"
    )
    (folder / "lab_texts.yaml").write_text(
        f"task: lab_texts\noutput_type: loglikelihood_rolling\n{common}{data % (folder / 'texts.jsonl')}"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - {metric: word_perplexity}\n"
        "  - {metric: byte_perplexity}\n  - {metric: bits_per_byte}\n"
    )
    (folder / "lab_answers.yaml").write_text(
        f"task: lab_answers\noutput_type: generate_until\n{common}{data % (folder / 'answers.jsonl')}"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['zz', \"\\n\\n\"], max_gen_toks: 12}\nmetric_list:\n  - {metric: exact_match}\n"
    )
    return folder


def reference(exported: Path, tasks: Path, names: list[str], **options: Any) -> dict[str, Any]:
    """What lm-eval's own model makes of the tasks."""
    import transformers
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", **options.pop("model", {}))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options)


def write_scored(folder: Path, kind: str) -> None:
    """A checkpoint, and what lm-eval's own model makes of the texts that our model is asked to score in tasks."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.evaluation.harness_model import HarnessModel
    from orchestrator.evaluation.harness_tasks import HarnessTasks, TaskRequest
    from orchestrator.evaluation.scoring import TextScore
    from orchestrator.runs.stored_model import tokenizer_of

    checkpoint = make_checkpoint(folder, kind)
    exported = export(checkpoint, folder / "export")
    asked: list[Any] = []

    def score(texts: Any) -> list[TextScore]:
        asked.extend(texts)
        return [TextScore(0.0, False) for _ in texts]

    tokenizer = tokenizer_of(Checkpoint(checkpoint))
    ours = HarnessModel(tokenizer, score, lambda fields: [], LONGEST)
    names = ("lab_choices", "lab_texts")
    HarnessTasks(TaskRequest(names, (str(write_tasks(folder / "tasks")),), bootstrap=0)).run(ours)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(exported)
    theirs = HFLM(pretrained=model, tokenizer=words, batch_size=4, device="cpu")
    pairs = [(None, list(text.tokens[: text.first]), list(text.tokens[text.first :])) for text in asked]
    values = theirs._loglikelihood_tokens(pairs, disable_tqdm=True)
    rows = [[*pair[1:], *value] for pair, value in zip(pairs, values, strict=True)]
    (folder / "scored.json").write_text(json.dumps(rows))


def responses(results: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model said to each request of each document, by task; a choice's pair is flat."""
    found: dict[str, list[Any]] = {}
    for name, samples in results["samples"].items():
        rows = sorted(samples, key=lambda sample: sample["doc_id"])
        found[name] = [_first(reply) for sample in rows for reply in sample["resps"]]
    return found


def _first(reply: Any) -> Any:
    while isinstance(reply, (list, tuple)) and len(reply) == 1:
        reply = reply[0]
    return tuple(reply) if isinstance(reply, (list, tuple)) else reply


if __name__ == "__main__":
    write_scored(Path(sys.argv[1]), sys.argv[2])
