"""The verb `plan`: what it prints, what it refuses, and that it needs neither torch nor a device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from orchestrator.api.plan_words import PlanOptions
from orchestrator.cli import main

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = """
import sys
from orchestrator.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules and "lightning" not in sys.modules, "torch was imported"
sys.exit(code)
"""


@pytest.fixture
def plan(capsys):
    """Runs the verb; gives exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["plan", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def data(plan):
    """The JSON answer."""

    def call(*words: str) -> dict:
        code, out, _ = plan(*words, "json=true")
        return {**json.loads(out), "code": code}

    return call


def test_one_fleet(plan):
    code, out, _ = plan("model=llama3_8b", "fleet=h100x64", "tokens=15T")
    assert code == 0
    assert "llama3_8b: 8.03B parameters; 15T tokens in sequences of 8,192, bf16" in out
    for name in ("layout", "bound by", "memory", "run", "failures", "saves", "cost", "energy", "runner-up"):
        assert re.search(rf"^  {name}\b", out, re.MULTILINE), name
    assert max(map(len, out.splitlines())) <= 120


def test_several_fleets_side_by_side(plan):
    _, out, _ = plan("model=llama3_8b", "fleet=[h100x64,tpu_v5px64,trn2x16]", "objective=cost")
    table = out.split("\n\n")[1].splitlines()
    assert [re.split(r"\s{2,}", line.lstrip("* "))[0].strip() for line in table[1:4]] != []
    assert {"h100-sxm x 64", "tpu-v5p x 64", "trn2 x 16"} == {re.search(r"\S+ x \d+", row)[0] for row in table[1:4]}
    assert sum("unknown" in row for row in table) == 2, "neither Google nor AWS say what these chips draw"
    assert "by cost" in out


@pytest.mark.parametrize("words", [["model=llama3_70b", "fleet=tpu_v5px1M", "tokens=15T"], ["fleet=h100x8"]])
def test_no_torch(words, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", WITHOUT_TORCH, "plan", *words, f"html={tmp_path / 'plan.html'}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.html"], "Hydra leaves nothing behind"


def test_json_has_every_figure_with_its_marks(data):
    answer = data("model=llama3_8b", "fleet=[tpu_v7xx128,trn2x16]", "tokens=1T")
    by_chip = {entry["chip"]: entry for entry in answer["fleets"]}
    assert by_chip["trn2"]["figures"]["energy"]["value"] is None
    assert by_chip["tpu-v7x"]["figures"]["energy"]["estimated"] is True
    assert by_chip["tpu-v7x"]["slices"] == {"count": 1, "shape": [4, 4, 8]}
    for entry in answer["fleets"]:
        assert entry["figures"]["days"]["sources"]
        assert sum(entry["best"]["step_parts"].values()) == pytest.approx(entry["best"]["step_seconds"])
        assert all(other["why"] for other in entry["runners_up"])


def test_what_the_configuration_says_is_kept(data):
    words = ("model=llama3_8b", "fleet=h100x64", "train.seq_len=4096", "train.global_batch_tokens=1048576")
    answer = data(*words, "train.remat=full", "train.micro_batch_size=2", "layout.tensor=4", "axes=train")
    best = answer["fleets"][0]["best"]
    assert answer["seq_len"] == 4096
    assert best["global_batch_tokens"] == 1048576
    assert (best["plan"]["remat"], best["plan"]["micro_batch"], best["plan"]["tensor"]) == ("full", 2, 4)
    assert best["plan"]["pipeline"] == 1


def test_when_gradients_are_reduced_is_the_configurations(data, plan):
    words = ("model=llama3_8b", "fleet=[h100x16,tpu_v5px16]", "axes=train", "train.micro_batch_size=1")
    late = "train.reduce_gradients=last"
    for answer, wanted in ((data(*words), "each"), (data(*words, late), "last")):
        found = {fleet["chip"]: fleet["best"]["plan"]["reduce_gradients"] for fleet in answer["fleets"]}
        assert found == {"h100-sxm": wanted, "tpu-v5p": "each"}, "a compiler cuts them always"
    # Whole gradients of 70B fit no device, and the layout that fits is one without.
    code, out, _ = plan("model=llama3_70b", "fleet=h100x64", "axes=train", "layout.tensor=1", "layout.pipeline=1", late)
    assert code == 1
    assert "gradients reduced in the last one" in " ".join(out.split())
    assert f"as asked   {late}, layout.pipeline=1, layout.tensor=1" in out
    assert "it fits with " in out


def test_precision_and_compilation_are_the_configurations(data):
    assert data("model=llama3_8b", "fleet=h100x64", "hardware.precision=fp32")["precision"] == "fp32"
    assert data("model=llama3_8b", "fleet=h100x64", "precision=fp8")["precision"] == "fp8"
    eager = data("model=llama3_8b", "fleet=h100x64", "hardware.compile=false")["fleets"][0]["best"]
    assert eager["plan"]["compiled"] is False


def test_an_experiment_is_a_job_with_its_tokens(data):
    answer = data("experiment=llama3_8b", "fleet=h100x64")
    assert answer["model"]["name"] == "llama3_8b"
    assert answer["tokens"]["value"] == 100_000 * 2_097_152
    assert answer["fleets"][0]["best"]["global_batch_tokens"] == 2_097_152


def test_models_that_are_only_planned(data, capsys):
    answer = data("model=mixtral_8x22b", "model.layers=16", "fleet=h100x64")
    assert answer["model"]["experts"] == 8
    assert answer["model"]["layers"] == 16
    assert main(["train", "model=mixtral_8x22b"]) == 2
    assert "can be planned, not trained" in capsys.readouterr().err


def test_explain_prints_the_derivation(plan):
    _, out, _ = plan("model=llama3_8b", "fleet=h100x8", "explain=cost")
    tree = out[out.index("cost of the run") :]
    assert "= chips x days x 24 x price" in tree
    assert "Lambda" in tree
    assert "failures per chip-day" in tree
    code, out, err = plan("model=llama3_8b", "fleet=h100x8", "explain=costs")
    assert (code, out) == (2, "")
    assert "allowed: step, speed" in err
    assert "did you mean 'cost'?" in err


def test_explain_in_json(data):
    entry = data("model=llama3_8b", "fleet=h100x8", "explain=all")["fleets"][0]
    assert set(entry["derivations"]) == set(entry["figures"])
    assert entry["derivations"]["cost"][0].startswith("cost of the run: ")


def test_the_speed_of_which_software(data, plan):
    assert data("model=llama3_8b", "fleet=h100x8")["fleets"][0]["stack"] != "orchestrator"
    assert data("model=llama3_8b", "fleet=h100x8", "axes=train")["fleets"][0]["stack"].startswith("orchestrator")
    assert data("model=llama3_8b", "fleet=h100x8", "stack=torchtitan")["fleets"][0]["stack"] == "torchtitan"
    code, _, err = plan("model=llama3_8b", "fleet=h100x8", "stack=torchtian")
    assert code == 2
    assert "did you mean 'torchtitan'?" in err


def test_overrides_of_prices_power_and_failures(data):
    words = ("model=llama3_8b", "fleet=trn2x16", "price_usd_per_chip_hour=1", "watts_per_chip=1000", "pue=1.25")
    figures = data(*words, "failures_per_chip_day=0.001", "save_stall_seconds=2")["fleets"][0]["figures"]
    days = figures["days"]["value"]
    assert figures["cost"]["value"] == pytest.approx(16 * 24 * days)
    assert figures["power"]["value"] == pytest.approx(16 * 1000 * 1.25 / 1e6)
    assert figures["mtbf"]["value"] == pytest.approx(86400 / 0.016)
    assert figures["stall"]["value"] == 2
    assert not figures["power"]["estimated"]


def test_limits_rank_what_is_over_them_last(data):
    answer = data("model=llama3_8b", "fleet=[h100x64,h100x8]", "tokens=1T", "max_days=1")
    assert all("over max_days=1" in entry["notes"] for entry in answer["fleets"])
    answer = data("model=llama3_8b", "fleet=[h100x8,gb200x72]", "max_usd=1e9")
    assert answer["fleets"][-1]["chip"] == "gb200"
    assert "not known to be within max_usd=1e+09" in answer["fleets"][-1]["notes"]


def test_a_model_that_does_not_fit(plan):
    code, out, _ = plan("model=llama3_70b", "fleet=h100x8")
    assert code == 1
    assert "does not fit" in out
    assert re.search(r"take \d+ or more h100-sxm: the smallest fleet that fits", out)
    code, out, _ = plan("model=llama3_8b", "fleet=h100x8", "train.remat=none", "train.seq_len=131072")
    assert code == 1
    assert "as asked   train.remat=none" in out
    assert "let go of that: it fits with" in out


def test_all_mistakes_at_once(plan):
    code, _, err = plan("model=llama3_80b", "fleet=[h1000x8,nonsense,h100x8]", "train.seqlen=3", "tokens=many")
    assert code == 2
    assert err.startswith("error: 5 problems")
    for hint in ("did you mean 'h100'?", "not a fleet", "'llama3_8", "'train.seq_len'?", "15T, 200B"):
        assert hint in err
    code, _, err = plan("fleets=h100x8")
    assert "did you mean 'fleet'?" in err or "'fleet' is missing" in err
    assert code == 2


def test_files_of_fleets_and_jobs(plan, data, tmp_path):
    fleets = tmp_path / "fleets.yaml"
    mine = {"chip": "h100", "chips": 64, "name": "mine", "price_usd_per_chip_hour": 1.5}
    jobs = [{"model": "llama3_8b", "tokens": "1T"}, {"name": "big", "model": "mixtral_8x7b", "tokens": "2T"}]
    fleets.write_text(yaml.safe_dump({"fleets": ["trn2x64", mine], "jobs": jobs}))
    answer = data("model=llama3_8b", f"fleet={fleets}")
    assert {entry["fleet"] for entry in answer["fleets"]} == {"trn2 x 64", "mine"}
    code, out, _ = plan(f"fleet={fleets}", f"jobs={fleets}")
    assert code == 0
    assert re.search(r"^big +", out, re.MULTILINE)
    assert "all assignments compared" in out
    split = data(f"fleet={fleets}", f"jobs={fleets}", "objective=cost")
    assert set(split["jobs"]) == {"1-llama3_8b", "big"}
    code, _, err = plan("fleet=h100@$5M", f"jobs={fleets}", "html=x.html", "max_days=3")
    assert code == 2
    assert err.startswith("error: 3 problems")
    fleets.write_text(yaml.safe_dump({"fleets": [{"chip": "h100", "chip_count": 3}, 7], "jobs": [{"modle": "x"}]}))
    code, _, err = plan(f"fleet={fleets}", f"jobs={fleets}")
    assert code == 2
    assert "chip_count" in err
    assert "fleets[1]" in err
    assert "modle" in err


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "line", "rect", "path", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        elif tag not in ("line", "rect", "path", "circle"):
            raise AssertionError(f"</{tag}> closes {self.open[-3:]}")


def test_the_page_is_whole_and_needs_nothing_else(plan, tmp_path):
    page = tmp_path / "plan.html"
    fleets = tmp_path / "fleets.yaml"
    named = {"chip": "h100", "chips": 64, "name": "<script>alert(1)</script>"}
    fleets.write_text(yaml.safe_dump({"fleets": [named, "trn2x64", "h100x1"]}))
    plan("model=llama3_8b", f"fleet={fleets}", f"html={page}")
    text = page.read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert "script" not in tags.seen, "names are escaped, and the page has no script"
    assert set(tags.links) == {"data:,"}
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 2 + 2 * 2, "cost and time, scaling; memory and step of the two that fit"
    for picture in pictures:
        xml.dom.minidom.parseString(picture)
    assert "does not fit" in text
    assert "binds" in text
    assert "failures.yaml" in text or "arXiv 2407.21783" in text, "the derivations have their sources"


def test_plain_text_where_the_terminal_knows_no_blocks(monkeypatch, capsys):
    from orchestrator.cli import plan

    monkeypatch.setattr(plan, "_is_plain", lambda: True)
    main(["plan", "model=llama3_8b", "fleet=h200x64"])
    out = capsys.readouterr().out
    assert out.isascii()
    assert "[####" in out


def test_help_names_every_option_and_model(plan):
    code, out, _ = plan("--help")
    assert code == 0
    assert all(f"{name}=" in out for name in PlanOptions.__dataclass_fields__)
    assert "deepseek_v3" in out


def test_the_recipe_of_a_gigawatt():
    """A million TPU chips within a gigawatt beside 400,000 Trainium2 and two GPU clusters; the jobs are all known."""
    from orchestrator.api.plan_words import read_fleets, read_requests
    from orchestrator.chips.load import load_catalogue

    recipe = str(ROOT / "recipes" / "gigawatt.yaml")
    options, problems = PlanOptions(fleet=recipe, jobs=recipe), []
    fleets = {fleet.cluster.chip.key: fleet for fleet in read_fleets(options, load_catalogue(), problems)}
    requests = read_requests([], options, problems)
    assert problems == []
    assert set(fleets) == {"tpu-v7x", "tpu-v5p", "trn2", "gb300", "h100-sxm"}
    assert fleets["tpu-v7x"].cluster.chips * 1085 * 1.09 <= 1e9
    assert fleets["trn2"].cluster.chips == 400_000
    assert set(requests) == {"dense", "sparse", "trillion", "small"}
