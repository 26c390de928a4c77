"""From the command line to the configuration: everything in conf/ is strict, every mistake is named at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.config.compose import compose, conf_dir, group_options, read_config, read_plain
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, ConfigErrors

OPTIONS = [(group, option) for group, options in group_options([conf_dir()]).items() for option in options]
EXPERIMENT = "# @package _global_\ndefaults:\n  - override /model: tiny_gpt2\n  - _self_\noptim: {lr: 5e-4}\n"

RUN = """
import sys
from orchestrator.config.compose import run_composed
from orchestrator.errors import UserError
def task(composed):
    print("task", composed.config.name, composed.config.optim.lr, composed.overrides)
    if composed.config.name == "crash":
        raise RuntimeError("a defect")
    if composed.config.name.startswith("exit"):
        sys.exit(int(composed.config.name[4:]))
    if composed.config.name.startswith("code"):
        return int(composed.config.name[4:])
    return 3 if composed.config.optim.lr < 5e-4 else 0
try:
    sys.exit(run_composed(sys.argv[1:], "orchestrator train", task))
except UserError as error:
    print("raised", error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def run(tmp_path_factory):
    """Hydra's entry point keeps global state, so it gets a process of its own; `run.cwd` is its directory."""
    cwd = tmp_path_factory.mktemp("cwd")
    environment = {**os.environ, "PYTHONPATH": str(conf_dir().parent)}

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", RUN, *argv]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)

    call.cwd = cwd
    return call


def _problems(*overrides: str, config_dir: Path | None = None) -> list[ConfigError]:
    with pytest.raises(ConfigErrors) as caught:
        compose(overrides, config_dir and str(config_dir))
    for problem in caught.value.problems:
        assert str(problem) in str(caught.value)
    return caught.value.problems


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    # A sequence that the smallest window holds; base files stand for themselves too.
    own = ["optim._target_=torch.optim.RAdam"] if (group, option) == ("optim", "own") else []
    composed = compose([f"{group}={option}", "train.seq_len=64", *own])
    assert composed.choices[group] == option
    wanted = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text())
    if group != "experiment":
        for key in set(wanted) - {"defaults"}:
            assert key in composed.data[group]
    assert to_dict(composed.config).keys() == composed.data.keys()


def test_an_optimizer_is_named_by_its_class_alone():
    composed = compose(["optim._target_=a.B", "optim.arguments.rho=1e-3", "optim.lr=2"])
    assert (composed.config.optim._target_, composed.config.optim.arguments) == ("a.B", {"rho": 1e-3})
    assert composed.config.optim.lr == 2.0
    # Of the group the user has said nothing: what is resumed keeps its other keys.
    assert composed.overrides == {"optim._target_": False, "optim.arguments.rho": False, "optim.lr": False}
    assert compose(["optim=own", "optim._target_=a.B"]).overrides["optim"] is True


def test_a_key_of_another_option_is_said_to_be_that():
    (problem,) = _problems("optim=muon", "optim.betas=[0.9,0.9]")
    assert (problem.got, problem.allowed) == ("optim.betas=[0.9,0.9]", "with optim=adamw")
    (problem,) = _problems("optim.momentum=0.9")
    assert problem.allowed == "with optim=muon or optim=sgd"


def test_the_yaml_files_name_every_key_of_the_schema():
    """Nothing can be set that `--cfg job` does not show."""

    def keys(value, prefix=""):
        for key, item in value.items():
            yield prefix + key
            if isinstance(item, dict):
                yield from keys(item, f"{prefix}{key}.")

    missing = set(keys(to_dict(RunConfig()))) - set(keys(compose().data))
    assert missing <= {"hardware.name"}


def test_a_key_and_a_group_are_told_apart():
    composed = compose(["model=tiny_gpt2", "optim.lr=1e-3", "++seed=3"])
    assert composed.overrides == {"model": True, "optim.lr": False, "seed": False}
    assert (composed.config.model.name, composed.config.optim.lr, composed.config.seed) == ("tiny_gpt2", 1e-3, 3)


def test_a_run_is_named_by_its_model_unless_it_has_a_name():
    assert compose(["model=tiny_qwen3"]).config.name == "tiny_qwen3"
    assert compose(["model=tiny_qwen3", "name=mine"]).config.name == "mine"


def test_variables_of_workers_are_a_free_mapping():
    assert compose(["+hardware.environment.FOO=bar"]).config.hardware.environment == {"FOO": "bar"}


@pytest.mark.parametrize(
    ("override", "what", "allowed", "fix"),
    [
        ("train.max_step=3", "no key 'train.max_step'", "max_steps", "did you mean 'train.max_steps'?"),
        ("lr=1e-3", "no key 'lr'", "optim", "did you mean 'optim.lr'?"),
        ("model.max_steps=3", "no key 'model.max_steps'", "max_seq_len", "did you mean 'train.max_steps'?"),
        ("+newkey=1", "no key 'newkey'", "train", "--cfg job"),
        ("++train.newkey=1", "no key 'train.newkey'", "max_steps", None),
        ("optim.lr.x=1", "no key 'optim.lr.x'", None, "optim.lr"),
        ("model=tinyy", "no model 'tinyy'", "tiny_gpt2", "did you mean 'tiny'?"),
        ("data=/my/files", "no data '/my/files'", "builtin", "data.sources='[{path: /my/files, weight: 1}]'"),
        ("data.path=docs", "no key 'data.path'", "sources", "data.sources='[{path: docs, weight: 1}]'"),
        ("modle=tiny", "no key 'modle'", "model", "did you mean 'model'?"),
        ("model=null", "no model 'None'", "tiny_gpt2", None),
        ("~model", "cannot be removed", None, "model="),
        ("~optim.lr", "cannot be removed", None, "optim.lr="),
        ("optim.lr=abc", "'optim.lr' has the wrong type", "a number", "optim.lr"),
        ("train.max_steps=1.5", "'train.max_steps' has the wrong type", "a whole number", "train.max_steps"),
        ("train.remat=half", "'train.remat' has the wrong type or value", "selective", "train.remat"),
        ("train=5", "'train' is not a mapping", "max_steps", "train."),
        ("train.max_steps=0", "'train.max_steps' is out of range", "1 or more", "train.max_steps"),
        ("optim.lr=nan", "'optim.lr' is out of range", "more than 0", "optim.lr"),
        ("seed=???", "seed", None, None),
        ("optim.lr=${nope}", "'optim.lr' cannot be worked out", None, "give optim.lr a value"),
        ("name=${oc.env:NO_SUCH_VARIABLE}", "'NO_SUCH_VARIABLE' not found", None, "give name a value"),
        ("name=${evil:1}", "'name' cannot be worked out: Unsupported interpolation type evil", None, "give name"),
        ("name=${name}", "cannot be", None, None),
        ("seed=9999999999999999999999", "'seed' is out of range", "0 to 9223372036854775807", "seed"),
        ("runs_dir='a\0b'", "'runs_dir' is no text", "printable", "runs_dir"),
        ("train.sample=null", "'train.sample' is not a mapping", "tokens", "train.sample."),
        ("train.sample=5", "'train.sample' is not a mapping", "tokens", "train.sample."),
        ("checkpoint.dir=memory://x", "would be gone", "s3://", None),
        ("hardware=gpu", "no hardware 'gpu'", "cuda", "hardware=rocm (AMD)"),
        ("hardware=mps", "no hardware 'mps'", "cpu", "hardware=cpu"),
        ("optim.lr=1e-3,3e-4", "--multirun", None, None),
        ("model@foo=tiny", "model@foo", None, None),
        ("experiment=nothing_like_it", "nothing_like_it", None, None),
        ("just words", "not an override", None, "key=value"),
        ("optim.lr=[1,", "not an override", None, "quote"),
    ],
)
def test_one_mistake_is_one_clear_error(override, what, allowed, fix):
    (problem,) = _problems(override)
    assert what in problem.what
    assert str(problem.got) in override or "U+0000" in str(problem.got)
    assert allowed is None or allowed in problem.allowed
    assert problem.fix
    assert fix is None or fix in problem.fix


BROKEN = {
    "bracket": (b"defaults: [base, _self_]\nname: mine\ndim: [36\n", "line 4", "close the bracket"),
    "tab": (b"name: mine\n\tdim: 3\n", "line 2", "spaces instead of a tab"),
    "double key": (b"defaults: [base, _self_]\ndim: 3\ndim: 4\n", "line 3", "one of the two"),
    "nested double key": (b"rope_scaling:\n  factor: 1\n  factor: 2\n", "line 3", "one of the two"),
    "list": (b"- a\n- b\n", "a list in", "key: value"),
    "scalar": (b"hello\n", "text in", "key: value"),
    "number": (b"3\n", "int in", "key: value"),
    "deep": (b"name: " + b"[" * 3000 + b"]" * 3000, "line 1", "mend"),
    "deep and open": (b"name: " + b"{a: " * 3000, "line 1", "mend"),
    "defaults are no list": (b"defaults: 3\n", "3 in", "defaults: [base"),
    "another encoding": (b"dim: 3\nname: caf\xe9\n", "line 2", "UTF-8"),
    "code": (b"name: !!python/object/apply:os.system [ls]\n", "line 1", "plain data"),
    "an open quote": (b"name: 'mine\n", "line 2", "quote"),
    "key of no kind": (b"name: a\n? [1]\n: 2\n", "line 2", "mend"),
    "nul": (b"name: a\0b\n", "mine.yaml", "mend"),
}


@pytest.mark.parametrize(("content", "where", "fix"), BROKEN.values(), ids=BROKEN)
def test_a_mistake_in_an_option_of_ones_own_has_its_file_and_line(tmp_path, content, where, fix):
    """Also where another option brings the file in."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(content)
    (tmp_path / "model" / "over.yaml").write_text("defaults: [mine, _self_]\ndim: 64\n")
    for word in ("model=mine", *(["model=over"] if content != BROKEN["scalar"][0] else [])):
        (problem,) = _problems(word, config_dir=tmp_path)
        assert str(tmp_path / "model" / "mine.yaml") in str(problem.got)
        assert where in str(problem.got)
        assert fix in problem.fix


def test_options_that_name_each_other_or_what_is_not_there(tmp_path):
    (tmp_path / "model").mkdir()
    for name, text in (("a", "defaults: [b]\n"), ("b", "defaults: [a]\n"), ("c", "defaults: [nope]\n")):
        (tmp_path / "model" / f"{name}.yaml").write_text(text)
    os.mkfifo(tmp_path / "model" / "pipe.yaml")
    (tmp_path / "model" / "folder.yaml").mkdir()
    assert "circle" in _problems("model=a", config_dir=tmp_path)[0].what
    assert "nope" in _problems("model=c", config_dir=tmp_path)[0].what
    for word in ("pipe", "folder"):
        assert f"no model '{word}'" in _problems(f"model={word}", config_dir=tmp_path)[0].what


def test_a_base_is_no_choice():
    for problem in _problems("model=nothing", "data=nothing", "hardware=nothing"):
        assert "base" not in problem.allowed.split(", ")


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("--resume", "write resume=latest"),
        ("--train.max-steps", "write train.max_steps=latest"),
        ("--max_steps", "write train.max_steps=latest"),
        ("--experimental-rerun", "compose the run again"),
        ("--exper", "compose the run again"),
        ("--experimental-rerun=x.pickle", "compose the run again"),
    ],
)
def test_a_flag_that_is_a_key_or_reads_a_pickle(word, fix):
    with pytest.raises(ConfigError) as caught:
        compose([word, "latest"])
    assert fix in caught.value.fix


def test_several_mistakes_are_one_report():
    wrong = ["train.max_step=5", "modl=tiny", "+newkey=1", "optim.lr=abc", "optim.eps=-1", "oh dear", "model=tinyy"]
    got = {str(problem.got) for problem in _problems(*wrong, "train.seq_len=1", "seed=3")}
    assert got == {"train.max_step=5", "modl=tiny", "+newkey=1", "abc", "-1.0", "oh dear", "model=tinyy", "1"}


def test_a_wrong_type_brings_no_made_up_problems():
    """The default in place of `heads` does not divide the given `kv_heads`; that is nobody's mistake."""
    assert [problem.what for problem in _problems("model.heads=many", "model.kv_heads=8", "model.dim=256")] == [
        "'model.heads' has the wrong type or value"
    ]


def test_options_of_the_users_own(tmp_path):
    for group, name, text in (
        ("model", "mine", "defaults: [base, _self_]\nname: mine\ndim: 64\n"),
        ("experiment", "theirs", EXPERIMENT),
        ("optim", "wrong", "defaults: [adamw, _self_]\nlr: fast\nmomentum: 0.9\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    assert compose(["model=mine"], str(tmp_path)).config.model.dim == 64
    composed = compose(["experiment=theirs"], str(tmp_path))
    assert (composed.config.experiment, composed.config.name) == ("theirs", "tiny_gpt2")
    assert (composed.config.model.positions, composed.config.optim.lr) == ("learned", 5e-4)
    # The command line has the last word.
    assert compose(["experiment=theirs", "optim.lr=1e-4"], str(tmp_path)).config.optim.lr == 1e-4
    assert compose(["experiment=theirs", "model=tiny"], str(tmp_path)).config.model.name == "tiny"
    assert {problem.what.split("'")[1] for problem in _problems("optim=wrong", config_dir=tmp_path)} == {
        "optim.lr",
        "optim.momentum",
    }
    assert "mine" in _problems("model=min", config_dir=tmp_path)[0].allowed


def test_a_config_dir_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="--config-dir is not a folder"):
        compose([], str(tmp_path / "none"))


def test_composing_leaves_nothing_behind():
    before = compose(["model=tiny_gpt2"]).config
    _problems("model=tinyy")
    assert compose(["model=tiny_gpt2"]).config == before
    assert compose().config.model.name == "tiny"


def test_one_run(run):
    done = run("optim.lr=1e-3", "model=tiny_gpt2")
    assert done.stdout == "task tiny_gpt2 0.001 {'optim.lr': False, 'model': True}\n"
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(run.cwd.iterdir()), "Hydra writes nothing"


def test_multirun_runs_every_combination_and_tells_the_worst(run):
    done = run("-m", "optim.lr=1e-3,3e-4", "model=tiny,tiny_gpt2")
    assert [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("task")] == [
        ["tiny", "0.001"],
        ["tiny_gpt2", "0.001"],
        ["tiny", "0.0003"],
        ["tiny_gpt2", "0.0003"],
    ]
    assert done.returncode == 3
    assert [str(path.relative_to(run.cwd)) for path in run.cwd.rglob("*")] == ["runs", "runs/multirun.yaml"]


def test_a_wrong_job_of_a_multirun_is_said_once_and_the_others_run(run):
    done = run("-m", "optim.lr=1e-3,-1,2e-3")
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("task")] == ["0.001", "0.002"]
    assert done.stderr.count("'optim.lr' is out of range") == 1
    assert done.returncode == 2


def _names(done):
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("task")]


@pytest.mark.parametrize("code", [130, 143])
def test_a_stopped_job_of_a_multirun_is_the_last(run, code):
    done = run("-m", f"name=code0,code{code},code0,code1")
    assert (_names(done), done.returncode) == (["code0", f"code{code}"], code)
    assert "the sweep was stopped" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("names", "code"), [("code0,crash,exit0,code2", 1), ("exit3,code2,code0", 3), ("exit0,code0", 0)]
)
def test_a_multirun_of_which_jobs_failed_says_which_and_is_no_success(run, names, code):
    done = run("-m", f"name={names}")
    assert (_names(done), done.returncode) == (names.split(","), code), "all of them were run"
    failed = [name for name in names.split(",") if name not in ("code0", "exit0")]
    assert (f"{len(failed)} of {len(names.split(','))} jobs did not end well" in done.stderr) is bool(failed)
    assert all(f"name={name}  (exit code" in done.stderr for name in failed)
    assert done.stderr.count("RuntimeError: a defect") == names.count("crash"), "every error is printed"
    assert "HYDRA_FULL_ERROR" not in done.stderr


def test_a_defect_keeps_its_own_traceback_and_exit_code(run):
    done = run("name=crash")
    assert done.returncode == 1
    assert "RuntimeError: a defect" in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr


def test_cfg_job_prints_the_configuration_and_runs_nothing(run):
    done = run("--cfg", "job", "model=tiny_gpt2", "optim.lr=1e-3")
    shown = yaml.safe_load(done.stdout)
    assert done.returncode == 0
    assert (float(shown["optim"]["lr"]), shown["model"]["name"]) == (1e-3, "tiny_gpt2")
    assert not [line for line in done.stdout.splitlines() if line.startswith("task ")]
    assert shown.keys() <= to_dict(RunConfig()).keys()


def test_a_config_dir_on_the_command_line(run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [base, _self_]\nname: mine\n")
    for flags in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        assert run(*flags, "model=mine").stdout.startswith("task mine")


def test_mistakes_on_the_command_line_are_the_users(run):
    done = run("train.max_step=5", "model=tinyy", "optim.lr=abc")
    assert done.returncode == 2
    assert "3 problems in the configuration" in done.stderr
    assert "Traceback" not in done.stderr
    for word in ("optim.lr=1e-3,3e-4", "--nonsense"):
        assert (run(word).returncode, "Traceback" in run(word).stderr) == (2, False)


def test_what_hydra_raises_is_one_error_of_the_users(run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: a\n\tdim: 3\n")
    (tmp_path / "model" / "over.yaml").write_text("defaults: [mine]\n")
    (tmp_path / "evil.pickle").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for words in (
        ["--config-dir", str(tmp_path), "model=over"],
        ["name=${oc.env:NO_SUCH_VARIABLE}"],
        ["hydra.run.dir=${nope}"],
        ["hydra.mode=RUNN"],
        ["--config-name", "nothing"],
        ["-m", "hydra/launcher=nothing"],
        ["--cfg", "job", "--resolve", "optim.lr=${nope}"],
        [f"--experimental-rerun={tmp_path / 'evil.pickle'}"],
    ):
        done = run(*words)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert done.stdout == ""
        assert not (run.cwd / "pwned").exists()
    done = run("-m", "optim.lr=1e-3", "name=${nope},good")
    assert (done.returncode, done.stdout.count("task good"), "Traceback" in done.stderr) == (2, 1, False), done.stderr


def test_a_saved_configuration_is_read_without_hydra(tmp_path):
    config = compose(["model=tiny_gpt2", "seed=5"]).config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("text", "what"),
    [(None, "no configuration file"), ("a: [1", "not YAML"), ("- 1", "not a mapping"), ("", "not a mapping")],
)
def test_a_saved_configuration_that_is_none(tmp_path, text, what):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_plain(path)


def test_a_saved_configuration_that_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"a: 1\n" * 300_000)
    for path in (tmp_path / "pipe", tmp_path / "large", tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError):
            read_plain(path)


def test_a_saved_configuration_is_never_code(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(ConfigError, match="not YAML"):
        read_plain(path)
