"""Find and construct the parts that a user's configuration names by `_target_`.

A part is named by Hydra's convention, `_target_: package.module.Name` with its arguments, or by the name of an
installed entry point (`_target_: name`, without a dot; its group is in `GROUPS`). Code comes from the user, never from
a file: a dotted name is imported only where the user of this process has named it, on the command line or in a folder
given as --config-dir (`permit`). One that a checkpoint or a run directory brings is refused and not imported. No torch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import yaml

from orchestrator.errors import ConfigError, ConfigErrors

TARGET = "_target_"
GROUPS = {
    "model": "orchestrator.models",
    "optimizer": "orchestrator.optimizers",
    "schedule": "orchestrator.schedules",
    "callback": "orchestrator.callbacks",
    "logger": "orchestrator.loggers",
    "data reader": "orchestrator.readers",
    "document transform": "orchestrator.transforms",
}
"""Kind of a part -> group of entry points in which installed packages offer some."""

_LONGEST = 1000  # of what is shown of a value

_permitted: set[str] = set()
_INTERPOLATION = "${"
_FREE_TEXT = ("train.sample.prompt",)  # what a person writes there is not looked into


def permit(names: Iterable[str]) -> None:
    """Allow this process to import these dotted names, which its user has given.

    Args:
        names: dotted paths of code.
    """
    _permitted.update(names)


def permitted() -> list[str]:
    """List the dotted names that may be imported, for a process that this one starts."""
    return sorted(_permitted)


def is_dotted(named: str) -> bool:
    """Return whether a name is a dotted path of code, rather than an installed entry point.

    Args:
        named: value of a `_target_`.
    """
    return "." in named or ":" in named


def targets(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each `_target_` in plain data, at any depth: its dotted key, and its value.

    Args:
        data: plain data.
        key: dotted key of `data` itself.
    """
    for path, name, value in _walk(data, key):
        if name == TARGET and value is not None:
            yield path, value


def refuse_stored(stored: Mapping[str, Any], given: Mapping[str, Any], where: object) -> None:
    """See that a configuration of a checkpoint or a run directory names no code that the user has not named here.

    Args:
        stored: plain data, with what the user gives on top of it in place.
        given: the user's own configuration, composed now. What it names at the same key is the user's.
        where: `stored` comes from, for the message.

    Raises:
        ConfigErrors: a dotted `_target_`, or an interpolation, that is not the user's.
    """
    ours = {path: value for path, _, value in _walk(given, "")}
    problems = []
    for path, name, value in _walk(stored, ""):
        if value is None or ours.get(path) == value:
            continue
        if name == TARGET and not (isinstance(value, str) and not is_dotted(value)):
            problems.append(_refused(path, value, where, _override(stored, path)))
        elif isinstance(value, str) and _INTERPOLATION in value and path not in _FREE_TEXT:
            problems.append(
                ConfigError(
                    "a stored configuration has no interpolations: nothing in it is worked out",
                    got=f"{path}={value} in {where}"[:300],
                    fix=f"give the key on the command line: {path}=...",
                )
            )
    if problems:
        raise ConfigErrors(problems)


def _refused(path: str, value: Any, where: object, override: str) -> ConfigError:
    return ConfigError(
        "a stored configuration names code, and code is run only if you name it yourself",
        got=f"{path}={value} in {where}"[:300],
        allowed="in a stored configuration: the name of an installed entry point",
        fix=f"if you trust it, give it again on the command line: {override}, or the option that sets it",
    )


def _override(stored: Any, path: str) -> str:
    """Return the word of a command line that sets the value at `path`: of a list, the whole list."""
    key, _, inside = path.partition("[")
    for part in key.split("."):
        stored = stored.get(part) if isinstance(stored, Mapping) else None
    if not inside:
        return f"{key}={stored}"[:_LONGEST]
    shown = yaml.safe_dump(stored, default_flow_style=True, sort_keys=False, width=_LONGEST).strip()
    return f"'{key}={shown}'"[:_LONGEST]


def _walk(data: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the leaves of plain data, and every `_target_` whatever it holds: dotted key, last name, value."""
    pending = [(path, "", data)]
    while pending:
        at, name, value = pending.pop()
        if name == TARGET or not isinstance(value, (Mapping, list, tuple)):
            yield at, name, value
        elif isinstance(value, Mapping):
            pending += [(f"{at}.{key}" if at else str(key), str(key), item) for key, item in value.items()]
        else:
            pending += [(f"{at}[{number}]", "", item) for number, item in enumerate(value)]


@dataclass(frozen=True)
class OwnPart:
    """A part of the user's own, as the configuration names it.

    Attributes:
        kind: key of `GROUPS`.
        named: `package.module.Name`, or the name of an installed entry point.
        key: where in the configuration it stands, for messages.
        arguments: by name, plain data.
    """

    kind: str
    named: str
    key: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, entry: Any, key: str) -> OwnPart:
        """Read the part that the mapping `entry` describes: `_target_`, and the arguments beside it.

        Args:
            kind: what it is, such as `optimizer`.
            entry: the mapping.
            key: dotted key of `entry`, for messages.

        Raises:
            ConfigError: it is no such mapping.
        """
        named = entry.get(TARGET) if isinstance(entry, Mapping) else None
        if not isinstance(named, str) or not named:
            raise ConfigError(
                f"a {kind} is named by {TARGET}",
                got=f"{key}={entry}"[:300],
                allowed=f"a mapping: {{{TARGET}: package.module.Name, ARGUMENT: VALUE, ...}}",
            )
        return cls(kind, named, key, {name: value for name, value in entry.items() if name != TARGET})

    def find(self, expected: type | None = None) -> Callable[..., Any]:
        """Import what is named.

        Args:
            expected: what it has to be a subclass of, where it is a class.

        Raises:
            ConfigError: it is not the user's, cannot be imported, or is of another kind.
        """
        found = self._load()
        if not callable(found):
            raise self._error(f"the {self.kind} that is named cannot be called", got=f"a {type(found).__name__}")
        if expected is not None and inspect.isclass(found) and not issubclass(found, expected):
            raise self._error(
                f"what is named is no {self.kind}", got=f"a class that is none of {_name(expected)}", allowed=expected
            )
        return found

    def check(self, *given: Any, expected: type | None = None, **named: Any) -> None:
        """Import what is named and check the arguments against its signature; nothing is made.

        Args:
            given: the arguments that the product gives, in order.
            expected: as of `find`.
            named: those that it gives by name.

        Raises:
            ConfigError: as `find`, or the arguments do not fit.
        """
        self._bind(self.find(expected), given, named)

    def make(self, *given: Any, expected: type | None = None, **named: Any) -> Any:
        """Import what is named and call it; arguments as of `check`.

        Args:
            given: positional arguments.
            expected: the class that the result has to be of; None: any.
            named: value of a `_target_`.

        Raises:
            ConfigError: as `check`, or the call raises, or gives something of another kind.
        """
        found = self.find(expected)
        self._bind(found, given, named)
        try:
            result = found(*given, **named, **self.arguments)
        except Exception as error:
            raise self._error(f"the {self.kind} cannot be made", got=trace(error, __file__)) from error
        if expected is not None and not isinstance(result, expected):
            got = f"a {_name(type(result))}"
            raise self._error(f"what is named gives no {self.kind}", got=got, allowed=expected)
        return result

    def _load(self) -> Any:
        if not is_dotted(self.named):
            return self._load_installed()
        if self.named not in _permitted:
            key = f"{self.key}.{TARGET}"
            raise _refused(key, self.named, "a stored configuration", f"{key}={self.named}")
        module, _, name = self.named.replace(":", ".").rpartition(".")
        try:
            home = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise self._error(f"the {self.kind} cannot be imported", got=trace(error, __file__)) from error
            fix = "install its package, or add the folder that holds it: PYTHONPATH=FOLDER"
            raise self._error(
                f"the {self.kind} cannot be imported", got=f"there is no module '{error.name}'", fix=fix
            ) from None
        except Exception as error:
            raise self._error(f"the {self.kind} cannot be imported", got=trace(error, __file__)) from error
        try:
            return getattr(home, name)
        except AttributeError:
            close = difflib.get_close_matches(name, [known for known in vars(home) if known[0] != "_"], n=1)
            hint = f"did you mean '{module}.{close[0]}'?" if close else None
            got = f"the module {module} has no '{name}'"
            raise self._error(f"the {self.kind} cannot be imported", got=got, fix=hint) from None

    def _load_installed(self) -> Any:
        group = GROUPS[self.kind]
        found: Sequence[EntryPoint] = list(entry_points(group=group))
        for entry in found:
            if entry.name == self.named:
                try:
                    return entry.load()
                except Exception as error:
                    raise self._error(f"the {self.kind} cannot be imported", got=trace(error, __file__)) from error
        offered = ", ".join(sorted(entry.name for entry in found)) or "none is installed"
        raise self._error(
            f"no installed package offers this {self.kind}",
            got=f"no entry point '{self.named}' of {group}",
            allowed=f"package.module.Name, or one of the installed: {offered}",
        )

    def _bind(self, found: Callable[..., Any], given: Sequence[Any], named: Mapping[str, Any]) -> None:
        odd = [name for name in self.arguments if name.startswith("_") and name.endswith("_")]
        if odd or any(targets(dict(self.arguments))):
            what = f"the arguments of a {self.kind} are plain data: no part is made within them"
            raise self._error(what, got=", ".join(odd) or TARGET)
        try:
            signature = inspect.signature(found)
        except (ValueError, TypeError):
            return  # of a builtin: the call will tell
        try:
            signature.bind(*given, **named, **self.arguments)
        except TypeError as error:
            own = [name for name in list(signature.parameters)[len(given) :] if name not in named]
            unknown = [name for name in self.arguments if name not in signature.parameters]
            close = difflib.get_close_matches(unknown[0], own, n=1) if unknown else []
            raise self._error(
                f"the arguments do not fit the {self.kind}",
                got=str(error),
                allowed=f"{self.named.rpartition('.')[2]}({', '.join(own)})",
                fix=f"did you mean '{close[0]}'?" if close else None,
            ) from None

    def _error(self, what: str, *, got: str, allowed: str | type | None = None, fix: str | None = None) -> ConfigError:
        said = f"{self.key}.{TARGET}={self.named}: {got}"
        return ConfigError(what, got=said, allowed=_name(allowed) if isinstance(allowed, type) else allowed, fix=fix)


def trace(error: BaseException, ours: str) -> str:
    """Return an exception of the user's code with its traceback, from the first frame outside of the file `ours`.

    Args:
        error: the exception.
        ours: path of the file that called the user's code.
    """
    frames = traceback.extract_tb(error.__traceback__)
    last = max((number for number, frame in enumerate(frames) if frame.filename == ours), default=-1)
    theirs = [frame for frame in frames[last + 1 :] if not frame.filename.startswith("<frozen importlib")]
    return "".join(
        [*traceback.format_exception_only(error)[-1:], *traceback.format_list(theirs)],
    ).rstrip()


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
