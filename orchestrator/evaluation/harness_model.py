"""The model of lm-eval's that this package's scorer is: it turns requests into tokens as lm-eval's own does.

Tokens, truncation and scores are those of `lm_eval.models.huggingface.HFLM` on the exported model, where that puts the
same tokens in front of a text. Only this module and `harness_tasks` import lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from orchestrator.data.chat_template import ChatTemplate
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.tokenizer_files import Beside
from orchestrator.errors import ConfigError
from orchestrator.evaluation.scoring import ScoredText, TextScore

_MOST = 4096  # texts that are handed on at a time
_DRAWING = ("top_k", "top_p", "min_p", "repetition_penalty")
_CONTINUED = "<the message goes on here> "
_GENERATED = 256  # tokens, where a task does not say: as lm-eval has it
Score = Callable[[Sequence[ScoredText]], list[TextScore]]
"""Scores texts, in their order."""
Write = Callable[[Mapping[str, Any]], list[str]]
"""Writes what follows on prompts, in their order; it gets the fields of a `WritingRequest`."""
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class HarnessModel(TemplateLM):
    """A model for lm-eval, on one process of a job.

    Args:
        tokenizer: of the model, with the documents that it was trained on.
        score: scores texts on all processes.
        write: writes texts on all processes.
        longest: tokens that the model takes at most.
        bos: put the tokenizer's BOS in front of a text; None: as documents began that the model was trained on.
        facts: of the model, for the file of results.

    Attributes:
        problem: what was raised by the model, and not by a task; None where nothing was.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        score: Score,
        write: Write,
        longest: int,
        *,
        bos: bool | None = None,
        facts: dict[str, Any] | None = None,
    ):
        super().__init__()
        # lm-eval's tokenizers read special tokens that a text spells, as chat templates need it.
        self._words = tokenizer.with_documents(replace(tokenizer.documents, special_tokens_in_text="token"))
        self._score, self._write, self._longest, self._facts = score, write, longest, dict(facts or {})
        named = Beside(tokenizer.files).token("bos_token")
        self._named_bos = None if named is None else self._words.id_of(named)
        self._first = self._first_ids(bos)
        self.problem: BaseException | None = None

    def _first_ids(self, bos: bool | None) -> tuple[int, ...]:
        if bos is False:
            return ()
        first = self._words.documents.bos_ids
        if bos is True and not first:
            if self._named_bos is None:
                raise ConfigError(
                    "the tokenizer names no BOS token to put in front of a text",
                    got="add_bos_token=true",
                    fix="leave add_bos_token out: texts then begin as those that the model was trained on",
                )
            first = (self._named_bos,)
        return first

    # --- what lm-eval asks ------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: BOS where the tokenizer names one, else the end-of-text token."""
        return self.eot_token_id if self._named_bos is None else self._named_bos

    @property
    def max_length(self) -> int:
        """Tokens that the model takes at most."""
        return self._longest

    @property
    def max_gen_toks(self) -> int:
        """Tokens that are generated, where a task does not say."""
        return _GENERATED

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer, for caches."""
        return self._words.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Return what the file of results says of the model."""
        return dict(self._facts)

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self._words)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's chat template, for the file of results.

        Args:
            chat_template: whether it is applied.
        """
        return self._chat.texts.get("default") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation, by the model's own template.

        Args:
            chat_history: its messages.
            add_generation_prompt: the assistant is to answer; else its last message is to be continued.
        """
        if add_generation_prompt:
            return self._chat.render(chat_history, True)
        # As transformers does it: what a template puts behind the last message is left out.
        *before, last = chat_history
        marked = self._chat.render([*before, {**last, "content": last["content"] + _CONTINUED}])
        text, _, behind = marked.rpartition(_CONTINUED.strip())
        return text if behind.startswith(" ") else text.rstrip()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Return the tokens of a text.

        Args:
            string: the text.
            add_special_tokens: put BOS in front of it; None: as this model does, unless the text spells it.
            unused: of other models.
        """
        ids = self._words.encode(string)
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._words.decode([self.prefix_token_id]))
        return [*self._first, *ids] if add_special_tokens else ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the likeliest one.

        Args:
            requests: lm-eval's, each of a context and its continuation.
            disable_tqdm: the bars here are the product's own.
        """
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, each in windows that do not overlap in what they score.

        Args:
            requests: lm-eval's, each of a text.
            disable_tqdm: of other models.
        """
        windows, counts = [], []
        for request in requests:
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in found]
            windows += parts
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **unused: Any) -> list[tuple[float, bool]]:
        texts = [ScoredText([*context, *continuation], len(context)) for _, context, continuation in requests]
        # Like lengths together, also over the borders of what is handed on at a time.
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number].tokens))
        result: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), _MOST):
            numbers = order[start : start + _MOST]
            scores = self._watched(self._score, [texts[number] for number in numbers])
            result |= {n: (one.log_likelihood, one.greedy) for n, one in zip(numbers, scores, strict=True)}
        return [result[number] for number in range(len(texts))]

    def _watched(self, work: Callable[[Asked], Answer], asked: Asked) -> Answer:
        try:
            return work(asked)
        except BaseException as error:
            self.problem = error
            raise

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context.

        Args:
            requests: lm-eval's, each of a context and the settings of its generation.
            disable_tqdm: of other models.

        Raises:
            ConfigError: a task's settings are none of those that are known here.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        result: dict[int, str] = {}
        for numbers in groups.values():
            settings = _settings(requests[numbers[0]].args[1], self._words.decode([self.eot_token_id]))
            room = self.max_length - settings["count"]
            if room < 1:
                raise ConfigError(
                    "a task asks for more tokens than the model can take",
                    got=f"{settings['count']} tokens to generate of {self.max_length} in all",
                    fix="gen_kwargs with max_gen_toks below that, or a model that takes more",
                )
            prompts = [self._prompt(requests[number].args[0])[-room:] for number in numbers]
            texts = self._watched(self._write, {**settings, "prompts": prompts})
            result |= dict(zip(numbers, texts, strict=True))
        return [result[number] for number in range(len(requests))]

    def _prompt(self, text: str) -> list[int]:
        """Return the tokens of a context that is continued."""
        named = None if self._named_bos is None else self._words.token_of(self._named_bos)
        ids = self._words.encode(text)
        spelt = named is not None and text.startswith(named)
        return (ids if spelt else [*self._first, *ids]) or [self.prefix_token_id]


def _settings(given: Mapping[str, Any], end: str) -> dict[str, Any]:
    """Return what a task says of its generation as fields of a `WritingRequest`."""
    known = normalize_gen_kwargs(dict(given), _GENERATED)
    stop = handle_stop_sequences(known.pop("until", None), eos=end)
    count, samples = known.pop("max_gen_toks"), known.pop("do_sample", False)
    temperature = float(known.pop("temperature", 0.0) or 0.0)
    sampling: dict[str, Any] = {"temperature": temperature if samples else 0.0}
    for key in _DRAWING:
        value = known.pop(key, None)
        if value is not None and samples:
            sampling[key] = value
    if known:
        raise ConfigError(
            "a task asks for a way to generate that is not known here",
            got=", ".join(f"{key}={value}" for key, value in known.items()),
            allowed=f"until, max_gen_toks, do_sample, temperature, {', '.join(_DRAWING)}",
        )
    return {"stop": stop, "count": count, "sampling": sampling}
