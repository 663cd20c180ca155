"The commands, as a user types them: results on disk, what is printed, and sentences instead of tracebacks."
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from fastcore.script import anno_parser

from hpl_nb import bench, cli, pipeline
from hpl_nb.core import PREDICTION_COLUMNS
from hpl_nb.experiments import given_options
from hpl_nb.methods.hpl import PAPER
from hpl_nb.models import mlp

METHODS = {"Supervised", "PseudoLabel", "JointUncertainty", "HPL (paper)", "HPL (release)", "FullySupervised"}


def test_demo_writes_table_report_and_predictions(tmp_path, capsys):
    cli.hpl_demo(out=str(tmp_path), seeds="0", jobs=2, iterations=2)
    printed = capsys.readouterr().out
    results = pd.read_csv(tmp_path/"results.csv")
    assert set(results["method"]) == METHODS and all(name in printed for name in METHODS)
    predictions = pd.read_parquet(tmp_path/"predictions.parquet")
    assert tuple(predictions) == PREDICTION_COLUMNS and set(predictions["split"]) == {"labelled", "unlabelled", "val", "test"}
    report = (tmp_path/"report.html").read_text()
    assert report.count("<figure") >= 6 and "Plotly" in report
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    cli.hpl_demo(out=str(tmp_path), seeds="0", jobs=2, iterations=2) # finished runs are only read
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")} and len(before) == 6
    with pytest.raises(SystemExit, match="iterations=2 there, 3 here"): cli.hpl_demo(out=str(tmp_path), seeds="0", iterations=3)


def test_compare_runs_every_method(tmp_path, capsys):
    "Each with its presets, in the table and with predictions; what is done is skipped."
    arguments = dict(methods="all", seeds="0", out=str(tmp_path), options="epochs=1 iterations=2")
    pipeline.hpl_compare(**arguments)
    results = pd.read_csv(tmp_path/"rotated_digits"/"results.csv")
    names = {make.__name__ for make in cli.METHODS.values()} - {"HPL"} | {"HPL (paper)", "HPL (release)", "RankUp (arc)"}
    assert set(results["method"]) == names and len(results) == len(cli.method_names()) == 18
    assert results[["mae", "mse", "val_mae"]].notna().all(axis=None)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert set(pd.read_parquet(tmp_path/"rotated_digits"/"predictions.parquet")["method"]) == names
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    pipeline.hpl_compare(**arguments)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")} and len(before) == 18


def test_train_stops_resumes_and_draws(tmp_path, capsys):
    run, page = tmp_path/"run", tmp_path/"figures.html"
    arguments = dict(epochs=2, iterations=5, out=str(run), settings="outer=previous")
    cli.hpl_train(**arguments, stop_after=7)
    assert "the same command goes on" in capsys.readouterr().out and not (run/"metrics.json").exists()
    cli.hpl_train(**arguments)
    assert "selected at epoch" in capsys.readouterr().out and len(pd.read_csv(run/"log.csv")) == 2
    cli.hpl_figures([str(tmp_path)], out=str(page))
    assert "outer=previous" in page.read_text()


@pytest.mark.parametrize("dataset, paper", [("UTKFace", "5.639 ± 0.035 MAE"), ("IMDB-WIKI", "9.177 ± 0.061 MAE"),
                                            ("stsb", "1.540 ± 0.006 MSE")])
def test_compare_puts_the_paper_beside_ours(dataset, paper):
    "HPL's presets are the paper's HPL; RankUp without its second half is not the paper's RankUp."
    methods = ["HPL (paper)", "HPL (paper)", "Supervised", "Supervised", "RankUp", "RankUp (arc)"]
    results = pd.DataFrame({"dataset": dataset, "label_ratio": .05, "method": methods,
                            "seed": [0, 1, 0, 1, 0, 0], "mae": [5.6, 5.8, 6., 6.2, 6., 6.], "mse": 1., "r2": .5, "pseudo_label_mae": 5.,
                            "log_variance": 0., "seconds": 1.})
    table = cli.results_table(results).set_index("method")
    assert isinstance(table.loc["RankUp", "paper"], str) and pd.isna(table.loc["RankUp (arc)", "paper"])
    assert table.loc["HPL (paper)", "paper"] == paper and table.loc["Supervised", "mae"] == "6.10 ± 0.14"


@pytest.mark.parametrize("command, arguments, says", [
    (cli.hpl_train, dict(method="bogus", dataset="utkface", root="nowhere"), "is unknown; choose supervised"),
    (cli.hpl_train, dict(dropout=1.5), "below 1"), (cli.hpl_train, dict(lr=-1.), "lr_body is -1"),
    (cli.hpl_train, dict(settings="preset=release"), "write name=value"),
    (cli.hpl_train, dict(settings="outer_every=2.5"), "outer_every is 2.5"),
    (cli.hpl_train, dict(settings="outer_every=often"), "outer_every is often; give a whole number"),
    (cli.hpl_train, dict(method="pim", settings="passes=2.5"), "passes is 2.5; give a whole number"),
    (cli.hpl_train, dict(method="cadr", settings="threshold=95"), "from 0 to 1"),
    (pipeline.hpl_compare, dict(options="label_ratio=0.2"), "write name=value"),
    (pipeline.hpl_compare, dict(options="epochs=abc"), "whole number"),
    (pipeline.hpl_compare, dict(seeds="0,x"), "--seeds is '0,x'"),
    (pipeline.hpl_compare, dict(label_ratios="5%"), "--label_ratios is '5%'"),
    (pipeline.hpl_compare, dict(jobs=0), "--jobs is 0"),
    (pipeline.hpl_compare, dict(methods="supervised,pim", options="dropout=0"), "--dropout 0.05")])
def test_what_is_wrong_is_said_before_the_first_run(command, arguments, says, tmp_path):
    with pytest.raises(SystemExit, match=says): command(**arguments, out=str(tmp_path/"out"))
    assert not list(tmp_path.iterdir())


def test_settings_are_part_of_the_name():
    "So that runs of one method with different settings do not mix in a table; what a search found is not."
    names = [make_name("mean_teacher", settings="decay=0.9"), make_name("mean_teacher", tuned="decay=0.9"),
             make_name("rankup:arc", settings="ramp=0"), make_name("hpl:paper", settings="outer=previous")]
    assert names == ["decay=0.9", "", "arc, ramp=0", "paper, outer=previous"]


def make_name(spec, **options):
    method = cli.make_method(spec, lambda: mlp(2), cli.Options(**options))
    return method.settings.preset if spec.startswith("hpl") else method.preset


def test_start_weight_and_rates_are_those_asked_for():
    "Lambda is doubled where the weight is exp(-z)/2, whoever says so; a rate of zero is zero."
    def made(spec, **options): return cli.make_method(spec, lambda: mlp(2), cli.Options("utkface", **options)).settings
    changes = ("hpl:paper", ""), ("hpl:release", ""), ("hpl:paper", "half_weight=true"), ("hpl:release", "half_weight=false")
    assert [made(spec, settings=change).unlabelled_weight for spec, change in changes] == [5, 10, 10, 5]
    assert made("hpl:paper", learner_lr=0.).learner_lr == 0 and made("hpl:paper").learner_lr == PAPER.learner_lr


def test_how_a_run_was_made_is_a_command():
    options = cli.Options("utkface", "/data/my faces", compile=True, deduplicate=True, tuned="decay=0.97", settings="ramp_share=0", size=64)
    words = shlex.split(given_options(asdict(options)))
    given = vars(anno_parser(cli.hpl_train).parse_args(words))
    assert {name: given[name] for name in ("dataset", "root", "compile", "deduplicate", "settings", "size")} == {
        "dataset": "utkface", "root": "FOLDER", "compile": True, "deduplicate": True, "settings": "decay=0.97,ramp_share=0", "size": 64}


@pytest.mark.parametrize("arguments, says", [
    (["hpl_train", "--dataset", "utkface"], "--root is missing"), (["hpl_train", "--dataset", "agedb"], "choose rotated_digits"),
    (["hpl_train", "--dataset", "utkface", "--root", "nowhere"], "nowhere"), (["hpl_train", "--method", "magic"], "is unknown"),
    (["hpl_train", "--method", "pim", "--dropout", "0"], "--dropout 0.05"),
    (["hpl_train", "--method", "mean_teacher", "--settings", "alpha=1"], "one of unlabelled_weight, ramp_share"),
    (["hpl_train", "--settings", "outer=later"], "'fresh' or 'previous'"), (["hpl_train", "--label_ratio", "0.001"], "raise label_ratio"),
    (["hpl_figures", "nowhere"], "no finished run below nowhere"), (["hpl_compare", "--options", "epoch=3"], "write name=value"),
    (["hpl_compare", "--methods", "supervised,mean_teacher", "--options", "settings=decay=2"], "there are none here")])
def test_bad_arguments_cost_a_sentence(arguments, says, tmp_path):
    command, *rest = arguments
    done = subprocess.run([Path(sys.executable).parent/command, *rest], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_documented_lines_are_understood(root):
    "Each command in README and in the experiments' README parses; placeholders in capitals are words like any other."
    commands = {"hpl_demo": cli.hpl_demo, "hpl_train": cli.hpl_train, "hpl_figures": cli.hpl_figures, "hpl_compare": pipeline.hpl_compare,
                "hpl_queue": pipeline.hpl_queue, "hpl_store": pipeline.hpl_store, "hpl_bench": bench.hpl_bench}
    text = "".join((root/name).read_text() for name in ("README.md", "nbs/experiments/README.md"))
    lines = {line.strip() for line in re.findall(r"(?:^|`)(hpl_[a-z]+ [^`\n]+)(?:$|`)", text, re.MULTILINE)}
    found = {line: anno_parser(commands[shlex.split(line)[0]]).parse_args(shlex.split(line.replace(" ...", ""))[1:]) for line in lines}
    assert {line.split()[0] for line in found} == set(commands) and len(found) > 12
    assert found["hpl_queue cpu --stsb FOLDER --vectors FILE"].protocol == "cpu"
    assert anno_parser(pipeline.hpl_queue).parse_args([]).protocol == "cpu"
