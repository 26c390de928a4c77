"""Rotary positions in a `config.json`, as transformers reads them.

The precedence is that of `convert_rope_params_to_dict` and `standardize_rope_params` in transformers 5.23
(modeling_rope_utils.py), which also reads what version 4 wrote: `rope_theta` and `rope_scaling` beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.interop.hf_keys import Keys, unsupported

DEFAULT_THETA = 10000.0
_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_ORIGINAL = "original_max_position_embeddings"
# kind -> their key, and ours.
_NAMES: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        _ORIGINAL: "original_max_seq_len",
    },
    "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", _ORIGINAL: "original_max_seq_len"},
}
_NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
_YARN_ONLY = {"attention_factor", "mscale", "mscale_all_dim", "truncate"}
_KNOWN = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "finetuned", *_YARN_ONLY}
_KNOWN |= {theirs for names in _NAMES.values() for theirs in names}


def read_rope(
    keys: Keys,
    max_seq_len: Any,
    default_theta: float = DEFAULT_THETA,
    default_share: float | None = None,
    latent: bool = False,
) -> dict[str, Any]:
    """Read `rope_theta`, `rope_scaling` and `rope_share` of a `ModelConfig`; values are not checked yet.

    Args:
        keys: of the `config.json`.
        max_seq_len: of the model.
        default_theta: the family's.
        default_share: the family's part of a head that is turned; None: all of it, always.
        latent: the model has latent attention, whose scores YaRN scales, too.

    Raises:
        CheckpointError: a kind, or a parameter, that cannot be computed here.
    """
    given = _chosen(keys, default_theta)
    if unknown := sorted(str(key) for key in given if key not in _KNOWN and given[key] is not None):
        raise unsupported(f"rope: {unknown[0]}"[:100], given[unknown[0]], ", ".join(sorted(_KNOWN)))
    theta = given.get("rope_theta", keys.get("rope_theta", default_theta))
    if given.get("rope_theta") is not None and keys.get("rope_theta") not in (None, given["rope_theta"]):
        keys.tell("rope_theta", f"not used: {theta} stands beside the kind of rope, where transformers looks first")
    named = str(given.get("rope_type", given.get("type", "default")))
    if named not in _KINDS:
        raise unsupported("rope_type", named, ", ".join(_KINDS))
    share = _share(keys, given, default_share)
    return {"rope_theta": theta, "rope_scaling": _scaling(keys, given, _KINDS[named], max_seq_len, latent), **share}


def _share(keys: Keys, given: Mapping[str, Any], default: float | None) -> dict[str, Any]:
    shares = [given.get("partial_rotary_factor"), keys.get("partial_rotary_factor")]
    if default is None:
        for share in shares:
            if share not in (None, 1, 1.0):
                raise unsupported("partial_rotary_factor", share, "1: all of a head is turned")
        return {}
    return {"rope_share": next((share for share in shares if share is not None), default)}


def _scaling(keys: Keys, given: Mapping[str, Any], kind: str, max_seq_len: Any, latent: bool = False) -> dict[str, Any]:
    for key in _NEEDED.get(kind, ()):
        # Null has a meaning for YaRN: the ratio of the lengths.
        if key not in given or (given[key] is None and kind != "yarn"):
            raise CheckpointError("config.json lacks a key of rope_scaling", got=f"rope_type={kind}", allowed=key)
    scaling = {ours: given[theirs] for theirs, ours in _NAMES[kind].items() if given.get(theirs) is not None}
    if "original_max_seq_len" in _NAMES[kind].values():
        _settle_original(keys, scaling, max_seq_len)
    if kind == "yarn":
        _settle_yarn(given, scaling, max_seq_len, latent)
    elif latent and given.get("mscale_all_dim"):
        raise unsupported("mscale_all_dim", given["mscale_all_dim"], f"none, with rope_type={kind}")
    return {"kind": kind, **scaling}


def read_layered_rope(
    keys: Keys, max_seq_len: Any, defaults: tuple[float, float], local_key: str | None
) -> dict[str, Any]:
    """Read the fields of a family whose layers with a window have rotary positions of their own, without scaling.

    As Gemma 3's and OLMo 3's `convert_rope_params_to_dict`: a mapping for each kind of layer in `rope_parameters`, into
    that of the others `rope_scaling` is merged; thetas beside them count where they have none.

    Args:
        keys: of the `config.json`.
        max_seq_len: of the model.
        defaults: theta of the layers that see everything, and of the others.
        local_key: the key of the latter beside the mappings; None: there is none.

    Raises:
        CheckpointError: a kind, or a parameter, that cannot be computed here.
    """
    both = keys.get("rope_parameters") or {}
    if not isinstance(both, Mapping) or not set(both) <= {"full_attention", "sliding_attention"}:
        raise unsupported("rope_parameters", both, "full_attention and sliding_attention, a mapping each")
    if (outside := keys.get(_ORIGINAL)) is not None:
        raise unsupported(_ORIGINAL, outside, "among the parameters of rope alone")
    added = keys.get("rope_scaling") or {}
    whole, local = both.get("full_attention") or {}, both.get("sliding_attention") or {}
    for given in (added, whole, local):
        if not isinstance(given, Mapping):
            raise unsupported("rope_parameters", given, "a mapping")
    whole = {**whole, **added}
    for given in (whole, local):
        if unknown := sorted(str(key) for key in given if key not in _KNOWN and given[key] is not None):
            raise unsupported(f"rope: {unknown[0]}"[:100], given[unknown[0]], ", ".join(sorted(_KNOWN)))
        _share(keys, given, None)
    named = [str(given.get("rope_type", given.get("type", "default"))) for given in (whole, local)]
    if named[0] not in _KINDS:
        raise unsupported("rope_type", named[0], ", ".join(_KINDS))
    if named[1] != "default":
        raise unsupported("rope_type of sliding_attention", named[1], "default")
    theta, beside = keys.get("rope_theta", defaults[0]), keys.get(local_key, defaults[1]) if local_key else defaults[1]
    return {
        "rope_theta": whole.get("rope_theta", theta),
        "rope_local_theta": local.get("rope_theta", beside),
        "rope_scaling": _scaling(keys, whole, _KINDS[named[0]], max_seq_len),
    }


def write_layered_rope(config: ModelConfig) -> dict[str, Any]:
    """Return `rope_parameters` of such a family.

    Args:
        config: of the model.
    """
    full = write_rope(config, nested=True)["rope_parameters"]
    local = config.rope_theta if config.rope_local_theta is None else config.rope_local_theta
    sliding = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def _chosen(keys: Keys, default_theta: float) -> Mapping[str, Any]:
    """`rope_scaling` before `rope_parameters`, also where the latter is what version 5 itself wrote."""
    old, new = keys.get("rope_scaling"), keys.get("rope_parameters")
    given = old or new or {}
    if not isinstance(given, Mapping):
        raise unsupported("rope_scaling", given, "a mapping")
    if old and new:
        keys.tell("rope_parameters", "not used: rope_scaling stands beside it, which transformers takes")
        keys.notes.append(
            "config.json has rope_scaling beside rope_parameters: the former was taken, as in transformers"
        )
        hidden = new.get("rope_theta") if isinstance(new, Mapping) else None
        theta = given.get("rope_theta", keys.get("rope_theta", default_theta))
        if hidden is not None and hidden != theta:
            keys.notes.append(
                f"WARNING: rope_theta={hidden} stands in rope_parameters alone and is lost with it: transformers "
                f"computes with {theta}, and so does this checkpoint. Where that is not meant, put rope_theta into "
                "rope_scaling and import again"
            )
    return given


def _settle_original(keys: Keys, scaling: dict[str, Any], max_seq_len: Any) -> None:
    """Beside the other keys of the model it goes before all; else among those of rope; else the model's own length."""
    if (outside := keys.get(_ORIGINAL)) is not None:
        scaling["original_max_seq_len"] = outside
    scaling.setdefault("original_max_seq_len", max_seq_len)


def _settle_yarn(given: Mapping[str, Any], scaling: dict[str, Any], max_seq_len: Any, latent: bool) -> None:
    """See `models.rope` for what is computed."""
    numbers = [max_seq_len, scaling["original_max_seq_len"]]
    if "factor" not in scaling and all(_is_positive(number) for number in numbers):
        scaling["factor"] = numbers[0] / numbers[1]  # as transformers where the key is null
    for ours in ("beta_fast", "beta_slow"):
        if not scaling.get(ours, 1):  # 0 is none there
            del scaling[ours]
    factor = scaling.get("factor")
    if factor is None or not _is_positive(factor):
        return
    amplitude, usual = given.get("attention_factor"), 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    scales = [given.get(key) for key in ("mscale", "mscale_all_dim")]
    for key, scale in zip(("mscale", "mscale_all_dim"), scales, strict=True):
        if scale is not None and not (latent and (_is_positive(scale) or scale == 0)):
            raise unsupported(key, scale, "none")
    if amplitude is None and all(scales):
        stretched = [0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0 for scale in scales if scale]
        amplitude = stretched[0] / stretched[1]
    if amplitude is not None and amplitude != usual:
        scaling["attention_factor"] = amplitude
    if scales[1]:
        scaling["mscale_all_dim"] = scales[1]
    if given.get("truncate") is not None:
        scaling["truncate"] = given["truncate"]


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def write_rope(config: ModelConfig, nested: bool) -> dict[str, Any]:
    """Return the keys of a `config.json` that describe the position encoding.

    Args:
        config: of the model.
        nested: as version 5 of transformers writes them, in `rope_parameters`; else as version 4 does, which both read.
    """
    scaling = config.rope_scaling
    values = {theirs: getattr(scaling, ours) for theirs, ours in _NAMES[scaling.kind].items()}
    if scaling.kind == "yarn":
        values |= {} if scaling.truncate else {"truncate": False}
        for key in ("attention_factor", "mscale_all_dim"):
            values |= {} if getattr(scaling, key) is None else {key: getattr(scaling, key)}
    kind = next(theirs for theirs, ours in _KINDS.items() if ours == scaling.kind)
    if nested:
        return {"rope_parameters": {"rope_theta": config.rope_theta, "rope_type": kind, **values}}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": kind, **values} if scaling.kind != "none" else None,
    }
