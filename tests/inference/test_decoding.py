"""Many texts at a time, behind a cache, are what transformers and the full forward pass give for each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.errors import NonFiniteError
from orchestrator.inference.decoding import Decoding, TextRequest, generate_tokens
from orchestrator.inference.passes import WholePasses
from orchestrator.inference.place import Place
from orchestrator.inference.sampling import Sampling
from orchestrator.interop.exporting import export_hf
from orchestrator.models.decoder import Decoder
from orchestrator.models.kv_cache import KVCache
from tests.lab.models import MODELS, model_config, random_model, save_model
from tests.lab.slow import cases

Make = Callable[..., Decoder]
GREEDY = Sampling()
# Beyond windows of 8, of one token, and alike in length.
PROMPTS = [[3, 14, 15, 92, 65, 35, 89], [5], list(range(40, 60)), [7, 8, 9], [9, 8, 7]]
COUNT = 20


def written(place: Place, requests: list[TextRequest], rows: int = 3) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in requests]
    ended = []
    for index, token in Decoding(place, requests, rows):
        if token is None:
            ended.append(index)
        else:
            texts[index].append(token)
    assert sorted(ended) == list(range(len(requests)))
    return texts


def greedy_without_cache(model: Decoder, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def in_transformers(ours: Decoder, folder: Path) -> Any:
    """The same model, exported and loaded by transformers."""
    transformers = pytest.importorskip("transformers")
    saved = save_model(folder / "run", ours)
    export_hf(Checkpoint(saved), str(folder / "hf"), "stored", 10**9, lambda *done: None)
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()


QUICK = ("llama", "mistral", "gemma3", "gpt2", "olmoe", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("kind", cases(MODELS, quick=QUICK))
def test_texts_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    """Greedily, of five prompts of unequal lengths over three rows; transformers takes each alone."""
    ours = random_model(model_config(kind))
    theirs = in_transformers(ours, tmp_path)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        expected.append(found[0, len(prompt) :].tolist())
    assert written(Place(ours), [TextRequest(prompt, COUNT) for prompt in PROMPTS]) == expected


@pytest.mark.parametrize("kind", cases(MODELS, quick=("gemma3", "deepseek_v3", "gpt_oss")))
def test_logits_behind_a_cache_are_those_of_the_whole(kind: str) -> None:
    """Rows that begin, that go on alike and each at its own length, that end, and that begin anew beside others."""
    model = random_model(model_config(kind))
    texts = [torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(row)) for row in range(3)]
    cache = KVCache(2, 3, page=8)
    at = [0, 0, 0]

    def check(rows: list[int], logits: torch.Tensor) -> None:
        for row, found in zip(rows, logits[:, 0], strict=True):
            torch.testing.assert_close(found, model(texts[row][: at[row]][None])[0, -1], atol=2e-5, rtol=0)

    def begin(rows: list[int], lengths: list[int], padded: int) -> None:
        for row, length in zip(rows, lengths, strict=True):
            at[row] = length
        cache.fill(rows, lengths, padded)
        tokens = torch.stack([texts[row][:padded] for row in rows])
        check(rows, model(tokens, cache=cache, at=torch.tensor(lengths) - 1))

    def go_on(counts: list[int]) -> None:
        starts = torch.tensor(cache.step(counts, 1)).unsqueeze(1)
        tokens = torch.stack([texts[row][at[row]][None] for row in range(3)])
        for row, count in enumerate(counts):
            at[row] += count
        logits = model(tokens, positions=starts, cache=cache)
        check([row for row in range(3) if counts[row]], logits[[row for row in range(3) if counts[row]]])

    with torch.no_grad():
        begin([0, 1, 2], [9, 9, 9], 9)
        go_on([1, 1, 1])
        go_on([1, 0, 1])
        go_on([1, 1, 1])
        begin([1], [3], 5)
        for counts in ([1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]):
            go_on(counts)
        cache.keep([2, 1])
        texts, at = [texts[2], texts[1], texts[0]], [at[2], at[1]]
        starts = torch.tensor(cache.step([1, 1], 1)).unsqueeze(1)
        logits = model(torch.stack([texts[row][at[row]][None] for row in range(2)]), positions=starts, cache=cache)
        at = [at[0] + 1, at[1] + 1]
        check([0, 1], logits)
    assert cache.lengths == at
    with pytest.raises(ValueError, match="documents"):
        model(texts[0][None], cache=cache, documents=texts[0][None])


def test_the_cache_grows_by_pages(make_model: Make) -> None:
    model = make_model()
    per_page = 2 * 2 * 2 * 12 * 4 * 8  # layers, keys and values, key heads, width, bytes, positions
    cache, sizes = KVCache(2, 3, page=8), []
    with torch.no_grad():
        cache.fill([0, 1, 2], [5, 2, 1], 5)
        model(torch.zeros(3, 5, dtype=torch.int64), cache=cache)
        for _ in range(12):
            starts = torch.tensor(cache.step([1, 0, 1], 1)).unsqueeze(1)
            model(torch.zeros(3, 1, dtype=torch.int64), positions=starts, cache=cache)
            sizes.append(cache.nbytes // per_page)
    assert sizes == [3] * 3 + [6] * 8 + [9]
    cache.keep([1])
    assert cache.nbytes == per_page


def test_passes_without_a_cache_write_the_same(make_model: Make) -> None:
    """As they are made where keys lie on other ranks, and of models of the user's own."""
    model = make_model(sliding_window=5)
    place = Place(model)
    requests = [
        TextRequest(prompt, COUNT, Sampling(1.0 if seed % 2 else 0.0), seed) for seed, prompt in enumerate(PROMPTS)
    ]
    requests[2] = TextRequest(PROMPTS[2][-12:], 30)  # past the window of 32
    expected = written(place, requests)
    place.cached = False
    assert isinstance(Decoding(place, requests).passes, WholePasses)
    assert written(place, requests) == expected


def test_a_text_is_its_own_whatever_is_beside_it(make_model: Make) -> None:
    model = make_model()
    requests = [TextRequest(prompt, 30, Sampling(1.0, top_k=40), seed) for seed, prompt in enumerate(PROMPTS)]
    alone = [written(Place(model), [request])[0] for request in requests]
    for rows in (1, 2, 5):
        assert written(Place(model), requests, rows) == alone
    first, again, other = (list(generate_tokens(model, [1], 30, Sampling(1.0), seed, ())) for seed in (0, 0, 1))
    assert first == again != other


def test_a_row_ends_by_itself(make_model: Make) -> None:
    """By its own stop ids, its own count, or as it is told; the others go on."""
    model = make_model(dropout=0.1).train()
    plain = [TextRequest(prompt, COUNT, Sampling(1.0), 3) for prompt in PROMPTS]
    expected = written(Place(model), plain)
    stop = expected[0][4]
    requests = [TextRequest(PROMPTS[0], COUNT, Sampling(1.0), 3, {stop, 10**6}), *plain[1:]]
    requests[1] = TextRequest(PROMPTS[1], 0, Sampling(1.0), 3)
    requests[3] = TextRequest(PROMPTS[3], 2, Sampling(1.0), 3)
    found: list[list[int]] = [[] for _ in requests]
    decoding = Decoding(Place(model), requests, 4)
    for index, token in decoding:
        if token is not None:
            found[index].append(token)
        if index == 2 and len(found[2]) == 7:
            decoding.end(2)
    first = expected[0][: expected[0].index(stop)]
    assert found == [first, [], expected[2][:7], expected[3][:2], expected[4]]
    assert model.training


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_text_longer_than_the_window_goes_on(make_model: Make, positions: str) -> None:
    """Each row begins anew with the last half of its window when that is full, whatever the others do."""
    model = make_model(max_seq_len=16, positions=positions)
    requests = [TextRequest(list(range(1, length + 1)), 60) for length in (3, 9, 40)]
    found = written(Place(model), requests)
    for request, text in zip(requests, found, strict=True):
        context, expected = list(request.prompt)[-16:], []
        for _ in range(60):
            expected += greedy_without_cache(model, context, 1)
            context.append(expected[-1])
            context = context[-8:] if len(context) > 16 else context
        assert text == expected


def test_what_is_not_finite_or_empty_is_an_error(make_model: Make) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="prompt"):
        Decoding(Place(model), [TextRequest([1], 1), TextRequest([], 1)])
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        list(Decoding(Place(model), [TextRequest([1], 1)]))
