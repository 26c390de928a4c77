"""The rules of the code's structure, read from the syntax trees.

Which package may import which, no circle of files, what is imported nowhere, sizes, and names.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from orchestrator.hardware.target_table import TARGETS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "orchestrator"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES = 400, 55  # without docstrings
# The front door: the order of a run, one statement after the other.
LONGER = {("training/job.py", "_assemble"): 60}

# Modules that import nothing of the product, and that all may import.
LEAVES = {
    "atomic_files.py",
    "constants.py",
    "errors.py",
    "installing.py",
    "lazy_exports.py",
    "output.py",
    "stopping.py",
}
# package -> packages of the product that it may import, beside itself, those and, for all, `config.schema`.
ALLOWED: dict[str, set[str]] = {
    "sweeps": set(),
    "config": {"sweeps"},
    "chips": set(),
    "sharding": set(),
    "distributed": set(),
    "data": {"config"},
    "hardware": {"chips", "distributed"},
    "models": {"sharding"},
    "optim": {"config", "sharding"},
    "checkpoint": {"distributed", "sharding"},
    "planner": {"chips", "sharding"},
    "observe": {"chips", "hardware"},
    "islands": {"checkpoint", "config", "distributed", "observe", "sharding"},
    "report": {"chips", "observe", "planner", "sweeps"},
    "strategies": {"checkpoint", "distributed", "hardware", "sharding", "models"},
    "runs": {"config", "checkpoint", "data", "distributed", "models", "observe", "optim", "sharding"},
    "inference": {"checkpoint", "data", "distributed", "hardware", "models", "runs", "sharding", "strategies"},
    "interop": {"config", "checkpoint", "data", "distributed", "models", "runs", "sharding"},
    "evaluation": {
        *("config", "checkpoint", "data", "distributed", "hardware", "inference", "models", "observe", "runs"),
        *("sharding", "strategies"),
    },
    "training": {
        *("config", "chips", "sharding", "distributed", "hardware", "models", "data", "checkpoint", "planner"),
        *("observe", "optim", "strategies", "runs", "inference", "evaluation", "sweeps", "islands"),
    },
    "rehearsal": {
        *("config", "data", "distributed", "hardware", "models", "runs", "sharding", "strategies", "training"),
    },
    "certify": {
        *("config", "sharding", "distributed", "hardware", "models", "checkpoint", "strategies", "training"),
    },
    "launch": {
        *("config", "data", "distributed", "hardware", "checkpoint", "observe", "report", "runs", "strategies"),
        *("evaluation", "interop", "islands", "optim", "sharding", "training", "certify"),
    },
    "engines": {"config", "chips", "distributed", "hardware", "runs"},
    "api": {
        *("config", "chips", "data", "hardware", "models", "checkpoint", "planner", "observe", "report", "runs"),
        *("inference", "interop", "islands", "strategies", "training", "rehearsal", "launch"),
    },
    "cli": {
        *("api", "config", "chips", "data", "distributed", "hardware", "checkpoint", "planner", "observe", "report"),
        *("runs", "inference", "interop", "training", "rehearsal", "certify", "launch", "engines"),
        *("islands", "sweeps"),
    },
}
# What `import orchestrator` hands out, each when it is used.
EXPORTED = {"api", "checkpoint", "config", "strategies", "training"}
# Of `config`, every package may have the schema; these read options or YAML by themselves.
CONFIG_EVERYWHERE = {"schema"}
XLA_FILES = {"rehearsal/stage.py", "strategies/xla.py", "strategies/xla_shards.py"}
XLA_FILES |= {"hardware/tpu.py", "hardware/trainium_xla.py", "hardware/xla_target.py"}
# third-party module -> where it may be imported; a name ending in / is a folder.
ONLY_IN: dict[str, set[str]] = {
    "torch_xla": XLA_FILES,
    "torch_neuronx": XLA_FILES,
    "neuronx_distributed": XLA_FILES,
    "libneuronxla": XLA_FILES,
    "lightning": {"strategies/", "training/", "launch/", "rehearsal/", "observe/", "runs/own_parts.py"},
    "lm_eval": {"evaluation/harness_model.py", "evaluation/harness_tasks.py"},
    "torchft": {"strategies/group_manager.py", "strategies/group_transport.py", "launch/lighthouse.py"},
    "hydra": {"config/compose.py", "config/optuna_sweeper.py", "config/words.py"},
    "optuna": {"sweeps/"},
    "omegaconf": {"config/compose.py"},
    "torch.distributed": {
        *(
            "distributed/coordinator.py",
            "distributed/lane.py",
            "strategies/",
            "rehearsal/traced_strategy.py",
            "interop/dcp.py",
        ),
    },
}
NOT_IN: dict[str, set[str]] = {
    "torch": {"planner/", "chips/", "config/", "report/", "cli/", "checkpoint/format.py", "checkpoint/checkpoint.py"},
    "safetensors": {"models/", "planner/", "strategies/"},
}
# The one module that reads other software's pickle, when a user says so: by an unpickler of its own that makes nothing
# but records, and by torch.load of weights alone.
PICKLE_READER = "interop/pickle_reader.py"
# Modules that import by name: what the product's own tables name, and what the user does (`config.registry`).
IMPORT_BY_NAME = {"cli/__init__.py", "cli/checkpoint.py", "hardware/target_table.py", "config/registry.py"}
IMPORT_BY_NAME |= {"engines/engine_table.py", "launch/model_job.py"}
IMPORT_BY_NAME |= {"lazy_exports.py"}  # a package's own names, when they are used
# unittest: what a test needs to replace by a mock is a parameter or a method of the product.
NOWHERE = {"unittest", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN_CALLS |= {"yaml.full_load", "np.load", "numpy.load", "os.system", "os.popen"}

# Packages that find a run resolved.
BELOW_THE_LAUNCHER = {"checkpoint", "data", "distributed", "inference", "models", "observe", "optim", "report"}
BELOW_THE_LAUNCHER |= {"sharding", "strategies", "training"}
# Their modules that compare with "auto" all the same, and why.
READS_AUTO = {
    "training/check.py": "the launcher's: a vocabulary that follows the tokenizer",
    "training/layout_choice.py": "the launcher's: the plan of what is open",
    "training/resolved.py": "the launcher's: decides",
    "sharding/layout.py": "the rule for degrees that nobody has planned, which `training.resolved` applies",
    "strategies/parallel_strategy.py": "a Trainer of the user's has no launcher: `from_environment`",
    "data/agreement.py": "BOS and EOS of a prepared store may be as they are",
    "data/make_tokenizer.py": "BOS as the tokenizer's files say, or none beside tokens made elsewhere",
    "data/prepare.py": "threads of this host",
    "data/store_cache.py": "where this host keeps its cache",
}
# What decides, and the modules that may import it: those that start a run or a part of one.
DECIDED_IN = {
    "orchestrator.training.layout_choice": {
        *("launch/certifying.py", "launch/model_job.py", "launch/plan.py", "launch/start.py", "training/resolved.py"),
    },
    "orchestrator.training.resolved.resolve_run": {
        *("api/rehearsing.py", "launch/certifying.py", "launch/model_job.py", "launch/start.py"),
        "rehearsal/memory_trace.py",
    },
    "orchestrator.hardware.target_table.resolve": {
        *("api/rehearsing.py", "api/trained_models.py", "cli/text_words.py", "launch/model_job.py", "launch/plan.py"),
        *("launch/certifying.py", "rehearsal/memory_trace.py", "strategies/parallel_strategy.py"),
        "cli/coordinate_check.py",
    },
    "orchestrator.checkpoint.signing.trust": {
        *("certify/certificate.py", "cli/checkpoint.py", "launch/model_job.py", "launch/plan.py", "launch/run.py"),
        "launch/hub_process.py",
        "runs/resume.py",
    },
}


@functools.cache
def _tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text())


def _imports(tree: ast.AST) -> Iterator[str]:
    """Dotted modules that are imported anywhere, also within functions and for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _within(name: str, places: set[str]) -> bool:
    return any(name.startswith(place) if place.endswith("/") else name == place for place in places)


def _is(module: str, wanted: str) -> bool:
    return module == wanted or module.startswith(f"{wanted}.")


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_down(name):
    package = name.partition("/")[0]
    if package in ("__init__.py", "__main__.py", *LEAVES):
        allowed = {"__main__.py": {"cli"}, "__init__.py": EXPORTED}.get(package, set())
    else:
        assert package in ALLOWED, f"say in ALLOWED what {package} may import"
        allowed = ALLOWED[package] | {package}
    for module in _imports(_tree(name)):
        first, *rest = module.split(".")
        if first != "orchestrator" or f"{rest[0]}.py" in LEAVES or rest[0] == "__version__":
            continue
        if rest[0] == "config" and "config" not in allowed:
            assert rest[1] in CONFIG_EVERYWHERE, f"{name} imports {module}"
        else:
            assert rest[0] in allowed, f"{name} imports {module}"


def test_the_arrows_have_no_circle():
    order: list[str] = []
    while len(order) < len(ALLOWED):
        free = [package for package in ALLOWED if package not in order and ALLOWED[package] <= set(order)]
        assert free, f"a circle among {set(ALLOWED) - set(order)}"
        order += free


def test_the_table_names_the_packages_that_there_are():
    assert set(ALLOWED) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def _module_name(name: str) -> str:
    return "orchestrator." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and _dotted(node.test) == "TYPE_CHECKING"


def _imported_files(name: str, files: Mapping[str, str]) -> Iterator[str]:
    """Files of the product that a file imports, also within functions and for types only.

    What a package exports does not count (`lazy_exports`): it is imported by whoever asks for it.
    """
    tree = _tree(name)
    if name.endswith("__init__.py"):
        tree = ast.Module([node for node in tree.body if not _is_type_checking(node)], [])
    for module in _imports(tree):
        found = files.get(module) or files.get(module.rpartition(".")[0])
        if found and found != name:
            yield found


def test_files_have_no_circle_of_imports():
    """Of every import counts, wherever it stands: a circle that is hidden in a function is one, too."""
    files = {_module_name(name): name for name in FILES}
    waiting = {name: set(_imported_files(name, files)) for name in FILES}
    while free := {name for name, needs in waiting.items() if not needs}:
        waiting = {name: needs - free for name, needs in waiting.items() if name not in free}
    assert waiting == {}, "these files import each other, or import such files"


@pytest.mark.parametrize("name", FILES)
def test_vendors_and_frameworks_stay_where_they_belong(name):
    for module in _imports(_tree(name)):
        for wanted, places in ONLY_IN.items():
            assert not _is(module, wanted) or _within(name, places), f"{name} imports {module}"
        for wanted, places in NOT_IN.items():
            assert not _is(module, wanted) or not _within(name, places), f"{name} imports {module}"
        assert module.split(".")[0] not in NOWHERE or (name, module) == (PICKLE_READER, "pickle"), (
            f"{name} imports {module}"
        )


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_is_loaded_is_executed(name):
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Call):
            called = _dotted(node.func)
            if (name, called) == (PICKLE_READER, "torch.load"):
                safe = [keyword.value for keyword in node.keywords if keyword.arg == "weights_only"]
                assert [ast.unparse(value) for value in safe] == ["True"], f"{name}:{node.lineno} may execute"
                continue
            assert called not in FORBIDDEN_CALLS, f"{name}:{node.lineno} calls {called}"
            by_name = called.rpartition(".")[2] in ("import_module", "entry_points", "load_module", "exec_module")
            assert not by_name or name in IMPORT_BY_NAME, f"{name}:{node.lineno} imports by name"
            shell = [keyword for keyword in node.keywords if keyword.arg in ("shell", "allow_pickle")]
            assert not shell, f"{name}:{node.lineno} passes {shell[0].arg}"


def test_of_pickle_only_the_unpickler_is_used_that_makes_records():
    used = {_dotted(node) for node in ast.walk(_tree(PICKLE_READER)) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {"pickle.Unpickler", "pickle.UnpicklingError"}
    names = [node for node in ast.walk(_tree(PICKLE_READER)) if isinstance(node, ast.ClassDef)]
    unpicklers = [node for node in names if any(_dotted(base) == "pickle.Unpickler" for base in node.bases)]
    assert len(unpicklers) == 1
    assert [part.name for part in unpicklers[0].body if isinstance(part, ast.FunctionDef)] == ["find_class"]
    readers = [
        name for name in FILES if any(_is(m, "orchestrator.interop.pickle_reader") for m in _imports(_tree(name)))
    ]
    assert readers == ["interop/importing.py"], "which asks the user first"


def _docstring_lines(node: ast.AST) -> int:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [each.body[0] for each in ast.walk(node) if isinstance(each, kinds) and ast.get_docstring(each) is not None]
    return sum(text.end_lineno - text.lineno + 1 for text in texts)


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    tree, lines = _tree(name), len((PACKAGE / name).read_text().splitlines())
    assert lines - _docstring_lines(tree) <= MAX_LINES
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1 - _docstring_lines(node)
            assert length <= LONGER.get((name, node.name), MAX_FUNCTION_LINES), (
                f"{name}: {node.name} has {length} lines"
            )


@pytest.mark.parametrize("name", [name for name in FILES if name.partition("/")[0] in BELOW_THE_LAUNCHER])
def test_nothing_below_the_launcher_reads_an_auto(name):
    """What is open in a configuration is decided once, by `training.resolved`, for whoever starts a run."""
    found = []
    for node in ast.walk(_tree(name)):
        if isinstance(node, (ast.Compare, ast.match_case)):
            compared = node.pattern if isinstance(node, ast.match_case) else node
            found += [part for part in ast.walk(compared) if isinstance(part, ast.Constant) and part.value == "auto"]
    if name in READS_AUTO:
        assert found, f"{name} reads no auto any more: take it out of READS_AUTO"
    else:
        assert not found, f"{name}:{found[0].lineno} compares with 'auto'"


def test_only_who_starts_a_run_decides_what_is_open():
    for decider, places in DECIDED_IN.items():
        importers = {name for name in FILES if any(_is(module, decider) for module in _imports(_tree(name)))}
        importers -= {name for name in importers if name.endswith("__init__.py")}  # exports
        assert importers == places, f"{decider} is imported elsewhere"


# Methods that a library calls by these names: it documents them.
HOOKS = {"forward", "setup", "training_step", "on_train_start", "on_train_batch_end", "on_train_end"}
HOOKS |= {"on_train_batch_start", "validation_step", "on_save_checkpoint", "on_load_checkpoint"}


def _overrides(cls: ast.ClassDef, method: str, classes: Mapping[str, ast.ClassDef]) -> bool:
    bases = [classes[base] for base in map(_dotted, cls.bases) if base in classes]
    own = (part.name for base in bases for part in base.body if isinstance(part, ast.FunctionDef))
    return method in own or any(_overrides(base, method, classes) for base in bases)


def _public_functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, ast.ClassDef | None]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, None
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            parts = (part for part in node.body if isinstance(part, ast.FunctionDef))
            yield from ((part, node) for part in parts if not part.name.startswith("_"))


@functools.cache
def _all_classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for name in FILES for node in _tree(name).body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("name", FILES)
def test_public_functions_describe_every_parameter(name):
    """In `Args`, or in the text between backquotes. An override is described where its base class defines it."""
    for function, cls in _public_functions(_tree(name)):
        if cls and (function.name in HOOKS or _overrides(cls, function.name, _all_classes())):
            continue
        given = function.args
        names = [
            each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if each
        ]
        text = ast.get_docstring(function) or ""
        missing = [each for each in names if not re.search(rf"^ +\*{{0,2}}{each}:|`{each}\b", text, re.MULTILINE)]
        assert not set(missing) - {"self", "cls"}, (
            f"{name}:{function.lineno} {function.name} does not describe {missing}"
        )


def _repeated(names: Iterator[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def test_no_two_public_classes_share_a_name():
    nodes = (node for name in FILES for node in _tree(name).body if isinstance(node, ast.ClassDef))
    assert _repeated(node.name for node in nodes if not node.name.startswith("_")) == []


def test_no_two_modules_share_a_name():
    """But for the modules of `cli`, which are named after their verbs."""
    assert _repeated(Path(name).name for name in FILES if not name.startswith("cli/") and "__init__" not in name) == []


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("__init__.py")])
def test_every_package_says_what_it_exports(name):
    """In `__all__`; the same names for type checkers and for `lazy_exports`, in the modules that define them."""
    tree = _tree(name)
    assert ast.get_docstring(tree), "what the package is for"
    values = {_dotted(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    exported = ast.literal_eval(values["__all__"])
    assert exported, "the names that others use"
    modules = {Path(other).stem for other in FILES if Path(other).parent == Path(name).parent}
    assert not modules & set(exported), "a module of this name would take the place of what is exported"
    if name == "cli/__init__.py":
        return  # defines what it exports
    (block,) = (node for node in tree.body if _is_type_checking(node))
    for_types = {f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    table = ast.literal_eval(block.orelse[0].value.args[1])
    assert for_types == {f"orchestrator.{module}.{each}" for module, names in table.items() for each in names}
    assert sorted(exported) == sorted(each for names in table.values() for each in names)
    for module, names in table.items():
        assert set(names) <= _defined(f"{module.replace('.', '/')}.py"), f"{name} exports what {module} has not"


def _defined(name: str) -> set[str]:
    found: set[str] = set()
    for node in _tree(name).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {_dotted(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])}
    return found


def test_adding_a_hardware_target_is_a_module_a_line_and_a_yaml():
    """Each target is that, and no module outside the package imports it: nothing else has to change."""
    conf = ROOT / "conf" / "hardware"
    assert {path.stem for path in conf.glob("*.yaml")} == {*TARGETS, "auto", "base"}
    for target, place in TARGETS.items():
        module, _, attribute = place.partition(":")
        assert module == f"orchestrator.hardware.{target}"
        names = {node.name for node in _tree(f"hardware/{target}.py").body if isinstance(node, ast.ClassDef)}
        assert attribute in names
        assert yaml.safe_load((conf / f"{target}.yaml").read_text())["target"] == target
        others = [name for name in FILES if not name.startswith("hardware/")]
        importers = [name for name in others if any(_is(m, module) for m in _imports(_tree(name)))]
        assert importers == [], f"only the table names {module}"
