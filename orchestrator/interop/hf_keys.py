"""Track the keys of a `config.json`: those read, those known to change nothing, and those not understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.errors import CheckpointError, shown

READ = "read"
KEPT = "changes nothing that is computed; kept for export"
_MISSING = object()
# Of every configuration of transformers, and of its generation settings (which stand in old ones); version 5.23.
_ANY = """
    architectures bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id mask_token_id
    decoder_start_token_id dtype torch_dtype transformers_version use_cache id2label label2id num_labels problem_type
    output_hidden_states output_attentions return_dict torchscript task_specific_params finetuning_task tokenizer_class
    prefix chunk_size_feed_forward use_bfloat16 tf_legacy_loss name_or_path is_decoder tie_encoder_decoder
    gradient_checkpointing attn_implementation experts_implementation bos_token eos_token pad_token unk_token
    max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams
    num_beam_groups penalty_alpha temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff diversity_penalty
    repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids force_words_ids
    renormalize_logits constraints forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    exponential_decay_length_penalty begin_suppress_tokens num_return_sequences output_scores return_dict_in_generate
    encoder_no_repeat_ngram_size
"""
# Written into configurations of these families by public models and tools; the classes of transformers read none.
_SEEN = """
    pretraining_tp max_sequence_length model_max_length is_llama_config transformers.js_config unsloth_version
    unsloth_fixed neftune_noise_alpha n_ctx n_special predict_special_tokens output_past summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn
"""
HARMLESS = frozenset(_ANY.split()) | frozenset(_SEEN.split())
# Keys that may stand there, with the values that leave the computation as it is.
_ONLY: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "use_bidirectional_attention": (False,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "activation": ("swiglu",),
    "pruned_heads": ({},),
    "transformers_weights": (),
    "per_layer_config": (),
}
# Of no use without the code or the files that they name, which are not taken.
LEFT_OUT = {
    "auto_map": "names code, which is never run; an export leaves it out",
    "quantization_config": "empty; an export leaves it out",
}


class Keys(Mapping[str, Any]):
    """A configuration that records which of its keys were read.

    Args:
        config: the parsed `config.json`.

    Attributes:
        notes: what is worth telling a user about them.
    """

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._fates: dict[str, str] = {}
        self.notes: list[str] = []

    def __getitem__(self, key: str) -> Any:
        value = self._config[key]
        self._fates.setdefault(key, READ)
        return value

    def __iter__(self) -> Any:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, which then counts as understood, or `default` where it is missing."""
        return self[key] if key in self._config else default

    def need(self, key: str) -> Any:
        """Return the value of a key that must be there.

        Args:
            key: of the `config.json`.

        Raises:
            CheckpointError: it is not, or null.
        """
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"config.json lacks '{key}'", got=f"model_type={self._config.get('model_type')}")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """Take a key that may be missing, and may otherwise have these values alone.

        Args:
            key: of the `config.json`.
            *allowed: the values.

        Raises:
            CheckpointError: it has another.
        """
        value = self.get(key, _MISSING)
        if value is not _MISSING and not any(value == one and type(value) is type(one) for one in allowed):
            raise unsupported(key, value, " or ".join(map(str, allowed)) or "none")

    def tell(self, key: str, fate: str) -> None:
        """Record what became of a key.

        Args:
            key: of the `config.json`.
            fate: in words.
        """
        if key in self._config:
            self._fates[key] = fate

    def fates(self, ignored: frozenset[str]) -> dict[str, str]:
        """Return what became of every key.

        Args:
            ignored: keys of which the user says that they change nothing.

        Raises:
            CheckpointError: some were not understood.
        """
        for key, allowed in _ONLY.items():
            if key not in ignored and self._config.get(key) is not None:
                self.expect(key, *allowed)
        unknown = []
        for key, value in self._config.items():
            if key in self._fates:
                continue
            if key in ignored:
                self._fates[key] = f"{KEPT}: said on the command line"
            elif value is None or key in HARMLESS or key.startswith("_") or key in _ONLY:
                self._fates[key] = KEPT
            elif key in LEFT_OUT:
                self._fates[key] = LEFT_OUT[key]
            elif _is_dropout(key):
                self._fates[key] = f"{KEPT}; training here does not apply it"
                if value and isinstance(value, (int, float)):
                    self.notes.append(
                        f"{key}={value} is not applied in training here; model.dropout=... is the own key"
                    )
            else:
                unknown.append(key)
        if unknown:
            raise CheckpointError(
                "config.json has keys of which it is not known what they change",
                got=", ".join(f"{shown(key, 60)}={shown(self._config[key], 60)}" for key in unknown[:6])[:400],
                fix=f"where the model computes the same without them: ignore_keys={shown(','.join(unknown), 200)}",
            )
        return {key: self._fates[key] for key in self._config}


def _is_dropout(key: str) -> bool:
    return key.endswith(("_dropout", "_pdrop", "_dropout_prob"))


def unsupported(key: str, value: object, allowed: str) -> CheckpointError:
    """Make the error for a value that changes what is computed in a way that is not known here.

    Args:
        key: of the `config.json`.
        value: what was found.
        allowed: the values that are.
    """
    return CheckpointError(
        f"a model with this '{shown(key, 60)}' cannot be computed here",
        got=f"{shown(key, 60)}={shown(value, 100)}",
        allowed=allowed,
    )
