"""Tasks of lm-eval: found by name, or in files of the user's; run on a model; counted as lm-eval counts.

A task's file is data: templates run in jinja's sandbox, and Python beside a file only where the user permits it.
Nothing is fetched from elsewhere unless the user says so.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import evaluator, utils
from lm_eval.api import task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from orchestrator.config.convert import from_dict
from orchestrator.errors import ConfigError, ConfigErrors, DataError, UserError
from orchestrator.evaluation.harness_model import HarnessModel

_LINES = 300  # characters of another library's message
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
_SEED = 1234  # of the few-shot examples: lm-eval's own


@dataclass(frozen=True)
class TaskRequest:
    """What is to be evaluated.

    Attributes:
        names: of tasks and groups, or YAML files of tasks, or folders of them.
        include: folders of such files, whose tasks can be named.
        limit: documents of each task, or the part of them where it is below 1; None: all.
        num_fewshot: examples in front of each question; None: as the task says.
        bootstrap: resamplings for standard errors; 0: no errors.
        download: data that is not here may be fetched.
        task_code: Python that a file of a task names may run.
        system_instruction: in front of each question.
        apply_chat_template: give questions as a user's message.
        fewshot_as_multiturn: give the examples as turns of a conversation.
        samples: keep each document with what the model made of it.
    """

    names: tuple[str, ...]
    include: tuple[str, ...] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    bootstrap: int = 100000
    download: bool = False
    task_code: bool = False
    system_instruction: str | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    samples: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskRequest:
        """Return the request that `asdict` gave, by way of JSON.

        Args:
            data: its fields.
        """
        return from_dict(cls, dict(data))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class HarnessTasks:
    """Tasks, loaded: each is a task or a group of lm-eval's.

    Args:
        request: which.

    Raises:
        ConfigErrors: there are no such tasks.
        DataError: the data of one is not here.
    """

    def __init__(self, request: TaskRequest):
        self._request = request
        if not request.download:
            _stay_offline()
        with _quiet():
            self._tasks = self._load()

    # --- loading ----------------------------------------------------------------------------------

    def _load(self) -> dict[str, Any]:
        folders, specs, names = self._divided()
        manager = TaskManager(include_path=folders or None, include_defaults=False)
        if any(name not in manager.task_index for name in names):
            # To look through all that lm-eval ships takes seconds.
            manager = TaskManager(include_path=folders or None)
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            raise ConfigErrors([_unknown(name, manager.all_tasks) for name in unknown])
        if not self._request.task_code:
            self._refuse_code(folders, [path for path in specs if path.endswith(".yaml")])
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for spec in [*specs, *names]:
            with _explained(spec):
                found = manager.load([spec])
            for part, values in found.items():
                loaded[part] |= values
        return loaded

    def _divided(self) -> tuple[list[Path], list[str], list[str]]:
        """Divide what was named: folders to look into, files, and names."""
        folders = [Path(folder).expanduser() for folder in self._request.include]
        for folder in folders:
            if not folder.is_dir():
                raise ConfigError("there is no such folder of tasks", got=folder, allowed="a folder of YAML files")
        files, names = [], []
        for word in self._request.names:
            path = Path(word).expanduser()
            if path.is_dir():
                folders.append(path)
                found = sorted(TaskIndex.build([path]))
                if not found:
                    raise ConfigError("there are no tasks in the folder", got=path, allowed="YAML files of lm-eval's")
                names += found
            elif path.suffix in (".yaml", ".yml"):
                if not path.is_file():
                    raise ConfigError("there is no such file of a task", got=word, allowed="a YAML file of lm-eval's")
                files.append(str(path))
            else:
                names.append(word)
        return folders, files, list(dict.fromkeys(names))

    def _refuse_code(self, folders: Sequence[Path], files: Sequence[str]) -> None:
        """Refuse tasks of the user's that name Python, which lm-eval would import and run."""
        paths = [*(path for folder in folders for path in sorted(folder.glob("**/*.yaml"))), *map(Path, files)]
        for path in paths:
            if "!function" in path.read_text(errors="replace"):
                raise ConfigError(
                    "the file of a task names Python code, which evaluating it would run",
                    got=path,
                    fix="read that code, and permit it if you trust it: task_code=true",
                )

    @property
    def names(self) -> list[str]:
        """Of the tasks, those of groups among them."""
        return sorted(self._tasks["tasks"])

    # --- running ----------------------------------------------------------------------------------

    def run(self, model: HarnessModel) -> dict[str, Any]:
        """Evaluate a model. Returns results with lm-eval's own keys.

        Args:
            model: on this process.

        Raises:
            ConfigError: what of a task lm-eval cannot make sense of.
        """
        request, began = self._request, time.time()
        for one in self._tasks["tasks"].values():
            _set_examples(one, request.num_fewshot)
        model.problem = None
        states = random.getstate(), np.random.get_state()
        random.seed(0)
        np.random.seed(_SEED)
        try:
            with _quiet(), _sandboxed(), _explained("the tasks", model):
                found = evaluator.evaluate(
                    lm=model,
                    task_dict=self._tasks,
                    limit=request.limit,
                    bootstrap_iters=request.bootstrap,
                    log_samples=request.samples,
                    system_instruction=request.system_instruction,
                    apply_chat_template=request.apply_chat_template,
                    fewshot_as_multiturn=request.fewshot_as_multiturn and request.apply_chat_template,
                )
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        return _plain({**found, **self._about(model), "date": began})

    def _about(self, model: HarnessModel) -> dict[str, Any]:
        """Return what lm-eval's own program adds to its results."""
        request = self._request
        config = {
            "model": "orchestrator",
            "model_args": None,
            **model.get_model_info(),
            "limit": request.limit,
            "bootstrap_iters": request.bootstrap,
            "fewshot_seed": _SEED,
        }
        return {
            "config": config,
            "lm_eval_version": version("lm_eval"),
            "eot_token_id": model.eot_token_id,
            "max_length": model.max_length,
            "system_instruction": request.system_instruction,
            "fewshot_as_multiturn": request.fewshot_as_multiturn and request.apply_chat_template,
        }


def _set_examples(given: Any, count: int | None) -> None:
    """Set the number of examples in front of a question, as lm-eval's own program does."""
    own = given.get_config("num_fewshot")
    if count is None and own is None:
        given.set_config(key="num_fewshot", value=0)
    elif count is not None and own != 0:
        given.set_config(key="num_fewshot", value=count)
    given.set_fewshot_seed(seed=_SEED)


def _unknown(name: str, known: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=3)
    return ConfigError(
        "there is no such task",
        got=name,
        allowed=f"a YAML file, a folder of them, or one of the {len(known):,} names that lm-eval knows",
        fix=f"did you mean {', '.join(close)}?" if close else "see lm-eval's list: lm-eval ls tasks",
    )


@contextlib.contextmanager
def _explained(name: str, model: HarnessModel | None = None) -> Iterator[None]:
    """Say in one error what lm-eval, its data sets or a task's template have raised; what the model raised, stays."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if model is not None and model.problem is not None:
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:_LINES]
        if type(error) is FileNotFoundError:  # what is missing on the hub has a class of its own
            raise DataError(
                f"a file that {name} reads is not there",
                got=said,
                fix="correct data_files in the task's file: a path in it is as seen from the folder that the command "
                "is started in",
            ) from error
        if _is_about_data(error):
            raise DataError(
                f"the data of {name} is not on this machine, and nothing is downloaded unless you say so",
                got=said,
                fix="python -m orchestrator evaluate download=true tasks=... fetches it; or copy the cache of data "
                "sets from a machine that has it (HF_HOME). A path in a task's file is as seen from the folder that "
                "the command is started in",
            ) from error
        if isinstance(error, ModuleNotFoundError):
            fix = f"install it: pip install {error.name}"
            raise ConfigError(f"{name} needs a package that is not here", got=said, fix=fix) from error
        what = "lm-eval cannot make a task of this" if model is None else "lm-eval cannot evaluate this"
        fix = "correct the file; in lm-eval's documentation: task_guide.md"
        raise ConfigError(f"{what}: {name}", got=said, fix=fix) from error


def _is_about_data(error: BaseException | None) -> bool:
    """Whether an exception, or one that it comes from, is that data could not be reached."""
    names = {"DatasetNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "LocalEntryNotFoundError"}
    names |= {"FileNotFoundError", "DataFilesNotFoundError", "HfHubHTTPError", "ConnectTimeout", "ConnectError"}
    while error is not None:
        if names & {kind.__name__ for kind in type(error).__mro__}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _stay_offline() -> None:
    """Keep the libraries of data sets from the network, also those that were imported before."""
    import datasets
    import huggingface_hub.constants

    for name in _OFFLINE:
        os.environ[name] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def _sandboxed() -> Iterator[None]:
    """Render the templates of tasks, which are data, where they reach nothing of Python. lm-eval itself does not."""
    before = utils.env
    sandbox = ImmutableSandboxedEnvironment(
        loader=jinja2.BaseLoader(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    sandbox.filters.update(before.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the announcements and bars of lm-eval and its data sets; their warnings stay."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), datasets.utils.are_progress_bars_disabled()
    level, bar = logger.level, task.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()


def _plain(data: Any) -> Any:
    """Return results as JSON has them, what it cannot carry as lm-eval writes it."""
    return json.loads(json.dumps(data, default=utils.handle_non_serializable, ensure_ascii=False))
