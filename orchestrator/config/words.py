"""Check the words of a command line against the schema, before Hydra composes.

Hydra reports the first wrong override and stops, and lets `+newkey=1` through; here every mistake is found.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.config.convert import dataclasses_of
from orchestrator.config.files import check_option
from orchestrator.config.islands_schema import Algorithm, IslandsConfig
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, ConfigErrors

_VALUED = ("--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c", "--info", "-i")
_ANY_GPU = "say whose it is: hardware=cuda (NVIDIA) or hardware=rocm (AMD); hardware=auto takes what is there"
_NO_MPS = "train on the Mac's processor: hardware=cpu"
# What people call a target, and what to do.
_HARDWARE = {
    **dict.fromkeys(("gpu", "gpus"), _ANY_GPU),
    **dict.fromkeys(("mps", "metal", "mac", "apple"), _NO_MPS),
    **dict.fromkeys(("nvidia", "h100", "h200", "a100", "b200"), "hardware=cuda is NVIDIA"),
    **dict.fromkeys(("amd", "hip", "mi300x"), "hardware=rocm is AMD"),
    **dict.fromkeys(("neuron", "trn1", "trn2", "aws"), "hardware=trainium is AWS Trainium"),
}
_OPTIM, _ISLANDS, _MEMBERS = "optim", "islands", "islands.members"
BASE = "base"
"""The option of a group that the others build on: every key with its comment, and no choice of its own."""


def group_options(directories: Sequence[Path]) -> dict[str, list[str]]:
    """List the options of each config group in the folders.

    Args:
        directories: folders of config groups.
    """
    groups: dict[str, set[str]] = {}
    for directory in directories:
        for file in sorted(directory.glob("*/*.yaml")):
            if file.is_file():
                groups.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in groups.items()}


def split_flags(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Separate overrides from the value of --config-dir.

    Args:
        argv: words of the command line.

    Raises:
        ConfigError: a flag that is none here, or a --config-dir that is no folder.
    """
    words, config_dir, skip = [], None, False
    for index, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if skip:
            skip = False
        elif flag in ("--config-dir", "-cd"):
            config_dir = value or (argv[index + 1] if index + 1 < len(argv) else None)
            skip = not value
        elif flag in _VALUED:
            skip = not value and not (flag in ("--info", "-i") and "=" in "".join(argv[index + 1 : index + 2]))
        elif not word.startswith("-"):
            words.append(word)
        else:
            _check_flag(flag, word, argv[index + 1 : index + 2])
    if config_dir and not _is_folder(config_dir):
        raise ConfigError("--config-dir is not a folder", got=config_dir, fix="give a folder that holds group folders")
    return words, config_dir


def _check_flag(flag: str, word: str, following: Sequence[str]) -> None:
    # argparse takes the beginning of a flag for the flag.
    if len(flag) > 2 and "--experimental-rerun".startswith(flag):
        raise ConfigError(
            "Hydra's rerun reads a pickle, a format that can carry code",
            got=word,
            fix="compose the run again: train with the same words, or resume=RUN_DIRECTORY",
        )
    key = flag.lstrip("-").replace("-", "_")
    known = [name for name in schema_keys(RunConfig) if name == key or name.endswith(f".{key}")]
    if flag.startswith("--") and known:
        value = word.partition("=")[2] or "".join(next_word for next_word in following if not next_word.startswith("-"))
        name = min(known, key=len)
        raise ConfigError("a key is given without dashes", got=word, fix=f"write {name}={value or '...'}")


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def complete_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Complete the words by what Hydra has to be told and users may leave out.

    `optim._target_=...` chooses `optim=own` where no optimizer is chosen, `islands=[...]` stands for
    `islands.members=[...]` and chooses an option of that group beside it, and the keys of free mappings
    (`optim.arguments.KEY=...`, `data.transform={KEY: ...}`) need no plus sign.

    Args:
        argv: words of the command line.

    Returns:
        The words, and those groups among them that were chosen here.
    """
    free = [key for key, is_free in schema_keys(RunConfig).items() if is_free]
    within = tuple(end for key in free for end in (f"{key}.", f"{key}={{"))
    words = [f"{_MEMBERS}={word.partition('=')[2]}" if word.startswith(f"{_ISLANDS}=[") else word for word in argv]
    words = [f"++{word}" if word.startswith(within) and "=" in word else word for word in words]
    given = {key.lstrip("+").partition("@")[0]: value for key, _, value in (word.partition("=") for word in words)}
    chosen: dict[str, str] = {}
    if f"{_OPTIM}._target_" in given and _OPTIM not in given:
        chosen[_OPTIM] = "own"
    if _MEMBERS in given and _ISLANDS not in given:
        algorithm = given.get(f"{_ISLANDS}.algorithm")
        known = algorithm in typing.get_args(Algorithm)
        chosen[_ISLANDS] = str(algorithm) if known else IslandsConfig.algorithm
    return [*words, *(f"{group}={option}" for group, option in chosen.items())], list(chosen)


def not_chosen(key: str, word: str) -> ConfigError:
    """Return what is wrong with a key of the schema that the chosen option of its group does not have.

    Args:
        key: dotted.
        word: the override.
    """
    if key.startswith("hydra.sweeper."):
        return ConfigError("the sweeper has no such key", got=word, fix="see train -m hydra/sweeper=optuna --cfg hydra")
    group, _, rest = key.partition(".")
    hint = typing.get_type_hints(RunConfig).get(group)
    options = [kind.name for kind in dataclasses_of(hint) if rest in schema_keys(kind)]
    return ConfigError(
        f"'{key}' is no key of the option of '{group}' that was chosen",
        got=word,
        allowed=f"with {' or '.join(f'{group}={option}' for option in options)}" if options else None,
        fix=f"leave it out; the keys there are: train {group}=... --cfg job",
    )


def parse_words(words: Sequence[str]) -> tuple[list[tuple[str, Any]], list[ConfigError]]:
    """Parse each word by Hydra's grammar. Returns words with their parsed overrides, and the errors of the others.

    Args:
        words: of the command line.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed, problems = [], []
    for word in words:
        try:
            parsed.append((word, parser.parse_override(word)))
        except (HydraException, RecursionError, ValueError) as error:
            problems.append(_not_parsed(word, error))
    return parsed, problems


def _not_parsed(word: str, error: Exception) -> ConfigError:
    if "=" not in word:
        return ConfigError("not an override: it sets nothing", got=word, fix="write key=value")
    # Its parser speaks in names of tokens: where in the word it stopped is what helps.
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if any(word in said for word in ("expecting", "token", "viable")) or isinstance(error, RecursionError):
        said = "a bracket, a quote or a character is out of place"
    return ConfigError(f"not an override: {said}"[:300], got=word, fix="quote special characters: 'key=\"value\"'")


def combinations(words: Sequence[str]) -> list[list[str]]:
    """Return the command lines that `key=a,b` stands for, in the order of Hydra's own sweeper.

    Args:
        words: overrides.

    Raises:
        ConfigErrors: words that are no overrides, or that ask for more than a list of values.
    """
    parsed, problems = parse_words(words)
    choices: list[list[str]] = []
    for word, override in parsed:
        if not override.is_sweep_override():
            choices.append([word])
        elif override.is_discrete_sweep() and not _is_glob(override.value()):
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            fix = "list the values: key=1,2,3 or key=range(1,4)"
            problems.append(ConfigError("this sweep is no list of values", got=word, fix=fix))
    if problems:
        raise ConfigErrors(problems)
    return [list(one) for one in itertools.product(*choices)]


def _is_glob(value: Any) -> bool:
    from hydra.core.override_parser.types import Glob

    return isinstance(value, Glob)


def check_word(override: Any, groups: dict[str, list[str]], config_dir: str | None) -> ConfigError | None:
    """Check one override: an unknown key or option, or one that cannot be removed. None where it is right.

    Args:
        override: parsed by Hydra.
        groups: options of each config group.
        config_dir: the user's own folder of options.
    """
    key, written = override.key_or_group, override.input_line
    if key.split(".")[0].split("/")[0] == "hydra":
        return None
    if key in groups and override.package is None:
        return _check_choice(override, groups[key], config_dir)
    known = schema_keys(RunConfig)
    if key in known or any(key.startswith(f"{parent}.") for parent, free in known.items() if free):
        if override.is_delete():
            return ConfigError(
                "a key of the configuration cannot be removed", got=written, fix=f"give it a value: {key}=..."
            )
        return None
    parent = key.rpartition(".")[0]
    beside = [name for name in known if name.rpartition(".")[0] == (parent if parent in known else "")]
    what, allowed = f"there is no key '{key}'", ", ".join(beside)
    if key.endswith("epochs"):
        fix = "a run's length is train.max_steps; it says at its start how often that passes over the data"
    else:
        fix = _own_data(str(override.value())) if key == "data.path" else _hint(key, [*known, *groups])
    return ConfigError(what, got=written, allowed=allowed, fix=fix)


def _own_data(path: str) -> str:
    return f"name files, a folder or a prepared store as a source: data.sources='[{{path: {path}, weight: 1}}]'"


def _check_choice(override: Any, options: list[str], config_dir: str | None) -> ConfigError | None:
    from hydra.core.override_parser.types import Glob

    key, written = override.key_or_group, override.input_line
    if override.is_delete():
        fix = f"choose another option: {key}=..."
        return ConfigError("a group of the configuration cannot be removed", got=written, fix=fix)
    value = override.value()
    if isinstance(value, Glob):
        return None
    choices: list[Any] = getattr(value, "list", [value])
    for choice in map(str, choices):
        # Only this group may be left empty.
        if choice not in options and not (key == "experiment" and choice in ("None", "null")):
            allowed = [option for option in options if option != BASE]
            fix = (_HARDWARE.get(choice.lower()) if key == "hardware" else None) or _hint(choice, allowed)
            if key == "data" and ("/" in choice or "." in choice or Path(choice).exists()):
                fix = _own_data(choice)
            return ConfigError(f"there is no {key} '{choice}'", got=written, allowed=", ".join(allowed), fix=fix)
        try:
            if config_dir and (file := Path(config_dir, key, f"{choice}.yaml")).is_file():
                check_option(file)
        except ConfigError as error:
            return error
    return None


def schema_keys(cls: type[Any], prefix: str = "") -> dict[str, bool]:
    """Map the dotted keys of the schema to whether any key may follow below (a free mapping).

    Args:
        cls: the dataclass.
        prefix: of the keys.
    """
    keys: dict[str, bool] = {}
    for name, hint in typing.get_type_hints(cls).items():
        keys[prefix + name] = any(typing.get_origin(one) is dict for one in (hint, *typing.get_args(hint)))
        for part in [hint] if dataclasses.is_dataclass(hint) else dataclasses_of(hint):
            keys |= schema_keys(typing.cast(type, part), f"{prefix}{name}.")
    return keys


def _hint(word: str, known: Sequence[str]) -> str:
    # The right name in the wrong place, else a wrong name.
    close = [key for key in known if "." in key and key.split(".")[-1] == word.split(".")[-1]][:1]
    close = close or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "see python -m orchestrator train --cfg job"
