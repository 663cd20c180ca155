"The commands, as a user types them: results on disk, what is printed, and sentences instead of tracebacks."
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_runs import differences

from hpl_nb import cli
from hpl_nb.core import PREDICTION_COLUMNS
from hpl_nb.experiment import DATASETS, Experiment, run_path
from hpl_nb.methods.hpl import HPL
from hpl_nb.methods.known import known_methods
from hpl_nb.settings import change
from hpl_nb.training.run import load_run

COMMANDS = {name: getattr(cli, name) for name in (
    "hpl_demo", "hpl_train", "hpl_compare", "hpl_queue", "hpl_store", "hpl_figures", "hpl_bench")}
METHODS = {"Supervised", "PseudoLabel", "JointUncertainty", "HPL (paper)", "HPL (release)", "FullySupervised"}


def typed(line):
    command, *rest = shlex.split(line) if isinstance(line, str) else line
    COMMANDS[command](rest)


def parsed(line, monkeypatch):
    "What a command line means, without carrying it out."
    made, whole = [], cli.tyro.cli
    class Parsed:
        def __init__(self, value): made.append(value)
        def run(self): pass
    monkeypatch.setattr(cli.tyro, "cli", lambda *args, **named: Parsed(whole(*args, **named)))
    typed(line)
    monkeypatch.undo()
    return made[0]


def test_demo_writes_table_report_and_predictions(tmp_path, capsys):
    line = f"hpl_demo --out {tmp_path} --seeds 0 --jobs 2 --iterations 2"
    typed(line)
    printed = capsys.readouterr().out
    assert set(pd.read_csv(tmp_path/"results.csv")["method"]) == METHODS and all(name in printed for name in METHODS)
    predictions = pd.read_parquet(tmp_path/"predictions.parquet")
    assert tuple(predictions) == PREDICTION_COLUMNS and set(predictions["split"]) == {"labelled", "unlabelled", "val", "test"}
    report = (tmp_path/"report.html").read_text()
    assert report.count("<figure") >= 6 and "Plotly" in report
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    typed(line) # finished runs are only read
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")} and len(before) == 6


def test_compare_runs_every_method(tmp_path, capsys):
    "Each with its presets, in the table and with predictions; what is done is skipped."
    line = f"hpl_compare rotated_digits --methods all --seeds 0 --out {tmp_path} --epochs 1 --iterations_per_epoch 2"
    typed(line)
    results, names = pd.read_csv(tmp_path/"rotated_digits"/"results.csv"), {method.title for method in known_methods().values()}
    assert set(results["method"]) == names and len(results) == 18 and results[["mae", "mse", "val_mae"]].notna().all(axis=None)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert set(pd.read_parquet(tmp_path/"rotated_digits"/"predictions.parquet")["method"]) == names
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    typed(line)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")} and len(before) == 18


def test_compare_keeps_and_goes_on(tmp_path, capsys):
    line = (f"hpl_compare rotated_digits --methods supervised hpl_paper --seeds 0 1 --out {tmp_path}/runs --store {tmp_path}/store "
            "--jobs 1 --epochs 1 --iterations_per_epoch 2")
    typed(f"{line} --minutes 0")
    assert "0 of 4 runs are finished; the same command goes on" in capsys.readouterr().out
    typed(line)
    assert "HPL (paper)" in capsys.readouterr().out and len(list((tmp_path/"store").rglob("*.json"))) == 4


def test_train_stops_resumes_and_draws(tmp_path, capsys):
    "The run that was stopped is the run that was not, to the bit."
    line = "hpl_train hpl_paper --outer previous rotated_digits --epochs 2 --iterations_per_epoch 5 --out"
    run, page = tmp_path/"run", tmp_path/"figures.html"
    typed(f"{line} {run} --stop_after 7")
    assert "the same command goes on" in capsys.readouterr().out and not (run/"metrics.json").exists()
    typed(f"{line} {run}")
    assert "selected at epoch" in capsys.readouterr().out and len(pd.read_csv(run/"log.csv")) == 2
    typed(f"{line} {tmp_path}/whole")
    assert not differences(load_run(run).predictions, load_run(tmp_path/"whole").predictions)
    typed(f"hpl_figures {run} --out {page}")
    assert "outer=previous" in page.read_text()
    with pytest.raises(SystemExit, match="lr_head is 0.003 there and 0.5 here"): typed(f"{line} {run} --lr_head 0.5")
    typed(f"{line.replace('--epochs 2', '--epochs 3')} {run}") # more epochs go on
    assert len(pd.read_csv(run/"log.csv")) == 3


def test_flags_are_settings(monkeypatch):
    "A flag changes one setting, the rest is the dataset's own; the schedule of the text keeps what is typed."
    given = parsed("hpl_train hpl_release --outer_every 2 utkface --root F --label_ratio 0.1 --epochs 3 --lr_head 0.1 --seed 4",
                   monkeypatch)
    experiment = given.on.flags.experiment(given.on, given.method)
    assert experiment == replace(Experiment(DATASETS[1].data, HPL.release(outer_every=2), seed=4), data=replace(
        DATASETS[1].data, root="F", label_ratio=.1), train=change(DATASETS[1].train, epochs=3, lr_head=.1))
    assert experiment.method.title == "HPL (release, outer_every=2)" and experiment.method.unlabelled_weight == 10
    text = parsed("hpl_train supervised utkface --schedule paper --weight_decay_head 0.5", monkeypatch)
    rates = text.on.flags.experiment(text.on, text.method).train.optimizer
    assert (rates.decay_every, rates.weight_decay_body, rates.weight_decay_head) == (None, 0, .5)
    many = parsed("hpl_compare utkface --schedule paper --weight_decay_head 0.5", monkeypatch)
    assert many.flags.train_of(many).optimizer == rates


@pytest.mark.parametrize("command", ["hpl_demo", "hpl_train", *(f"hpl_train {name}" for name in known_methods()), "hpl_compare",
                                     *(f"hpl_train hpl_paper {known.data.short}" for known in DATASETS), "hpl_queue",
                                     *(f"hpl_compare {known.data.short}" for known in DATASETS),
                                     "hpl_store", "hpl_figures", "hpl_bench"])
def test_help_fits_a_screen(command, monkeypatch, capsys):
    "And the page that is made without the classes is the one that they make."
    monkeypatch.setenv("COLUMNS", "140")
    def page():
        with pytest.raises(SystemExit, match="0"): typed(f"{command} --help")
        return capsys.readouterr().out
    assert 5 < len((stored := page()).splitlines()) <= 72, stored # without its frames; the longest is STS-B's
    monkeypatch.setattr(cli, "_Stored", cli._Known)
    assert stored == page()


@pytest.mark.parametrize("line, says, code", [
    ("hpl_train hpl_paper utkface", "--root is missing", "hpl_nb"), ("hpl_train hpl_paper agedb", "rotated_digits", 2),
    ("hpl_train hpl_paper utkface --root nowhere", "nowhere", "hpl_nb"), ("hpl_train mean_techer", "did you mean 'mean_teacher'", "hpl_nb"),
    ("hpl_compare utkfac", "did you mean 'utkface'", "hpl_nb"),
    ("hpl_train pim rotated_digits --dropout 0", "dropout is 0", "hpl_nb"),
    ("hpl_train mean_teacher --alpha 1 rotated_digits", "--alpha", 2),
    ("hpl_train mean_teacher --dekay 1 rotated_digits", "--decay", 2), ("hpl_train hpl_paper --outer later rotated_digits", "previous", 2),
    ("hpl_train hpl_paper --outer_every 2.5 rotated_digits", "outer_every", 2),
    ("hpl_train hpl_paper rotated_digits --dropout 1.5", "below 1", "hpl_nb"),
    ("hpl_train hpl_paper rotated_digits --lr_body -1", "--lr_body is -1", "hpl_nb"),
    ("hpl_train pim --passes 0 rotated_digits", "--passes is 0", "hpl_nb"), ("hpl_train HPL utkface", "did you mean 'hpl_", "hpl_nb"),
    ("hpl_train pim rotated_digits --epochs 0", "hpl_nb: --epochs is 0", "hpl_nb"), ("hpl_compare UTKFace", "did you mean 'utkf", "hpl_nb"),
    ("hpl_compare utkface --epochs=0", "hpl_nb: --epochs is 0", "hpl_nb"), ("hpl_train Pseudo-Label stsb", "mean 'pseudo_label'", "hpl_nb"),
    ("hpl_train pim rotated_digits --labelled_batch -1", "hpl_nb: --labelled_batch is -1", "hpl_nb"),
    ("hpl_train pim rotated_digits --labelled-batch 70", "lower --labelled_batch to at most 69", "hpl_nb"),
    ("hpl_train hpl_paper --evaluate teacher rotated_digits", "set --teacher_decay", "hpl_nb"),
    ("hpl_train hpl_paper --outer_batch 3 --outer previous rotated_digits", "with --outer previous the", "hpl_nb"),
    ("hpl_train cadr --threshold 95 rotated_digits", "from 0 to 1", "hpl_nb"),
    ("hpl_train hpl_paper rotated_digits --epochs many", "epochs", 2),
    ("hpl_train supervised rotated_digits --label_ratio 0.001 --labelled_batch 4", "raise --label_ratio", "hpl_nb"),
    ("hpl_figures nowhere", "no finished run below nowhere", "hpl_nb"), ("hpl_compare rotated_digits --epoch 3", "--epochs", 2),
    ("hpl_compare rotated_digits --methods magic", "mean_teacher", "hpl_nb"), ("hpl_compare rotated_digits --seeds 0 x", "seeds", 2),
    ("hpl_compare rotated_digits --label_ratios 5%", "label_ratios", 2), ("hpl_compare rotated_digits --jobs 0", "--jobs is 0", "hpl_nb"),
    ("hpl_compare rotated_digits --methods supervised pim --dropout 0", "dropout is 0", "hpl_nb"),
    ("hpl_compare rotated_digits --backend cloud", "processes", 2), ("hpl_queue tpu", "cpu", 2),
    ("hpl_queue cpu --stsb PAIRS --vectors nowhere", "pass --vectors", "hpl_nb"), ("hpl_bench --rounds 0", "--rounds is 0", "hpl_nb"),
    ("hpl_bench --methods Baseline", "PseudoLabel", "hpl_nb"), ("hpl_bench --end_to_end --pixels gpu", "device", 2)])
def test_bad_arguments_cost_a_sentence(line, says, code, tmp_path, monkeypatch, capsys):
    "Before the first run, and nothing is written; a wrong name is answered with the nearest ones."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit: typed(line)
    said = str(exit.value) + "".join(capsys.readouterr())
    assert says in said and "Traceback" not in said
    assert exit.value.code == code if isinstance(code, int) else str(exit.value).startswith(code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["hpl_train", "hpl_compare", "hpl_store", "hpl_figures"])
def test_without_words_a_command_prints_its_help(command, capsys):
    "Where it needs some; the others begin their work."
    pages = []
    for line in (command, f"{command} --help"):
        with pytest.raises(SystemExit, match="0"): typed(line)
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1] and pages[0].startswith(f"usage: {command}")


def test_help_is_what_the_classes_say(root, tmp_path):
    "Help reads it from a file, since the classes import PyTorch."
    cli.write_commands(tmp_path/"commands.json")
    now, stored = (path.read_text(encoding="utf-8") for path in (tmp_path/"commands.json", root/"data"/"commands.json"))
    assert now == stored, """python -c "from hpl_nb.cli import write_commands; write_commands()" and commit data/commands.json"""
    assert set(json.loads(stored)["methods"]) == set(known_methods())


FILES = st.text(st.characters(exclude_categories=["Cc"], exclude_characters="\0/"), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FILES)
@example("-out")
@example("--out")
@example("--help")
@example("a=b %s {x} 'y'")
@example("\udcff")
def test_any_file_name_arrives_as_typed(monkeypatch, name):
    "After = or -- it may begin with a dash; letters that are no text, as a Linux disk may have them, stay."
    assert parsed(["hpl_figures", f"--out={name}", "--", name, name], monkeypatch) == cli._Figures((name, name), name)
    assert parsed(["hpl_store", f"--store={name}", "--", name], monkeypatch) == cli._Store((name,), name)
    if not name.startswith("-"): assert parsed(["hpl_demo", "--out", name], monkeypatch).out == name


@pytest.mark.parametrize("name", ["-two words", "größe 字 %s", "--out=x.y"])
def test_a_run_lives_in_a_folder_of_any_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.hpl_train(["supervised", "rotated_digits", "--epochs=1", "--iterations_per_epoch=1", f"--out={name}"])
    cli.hpl_figures([f"--out={name}.html", "--", name])
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.html"}
    assert f"Figures: hpl_figures {name}" in (printed := capsys.readouterr().out) and printed.endswith(f"1 run(s): {name}.html\n")


def test_a_terminal_without_a_letter_shows_another(tmp_path):
    command, environ = [Path(sys.executable).parent/"hpl_store", tmp_path, "--store=größe"], {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environ)
    assert done.returncode == 0 and done.stdout == "0 new run(s) in gr\\xf6\\xdfe.\n"


def test_an_installed_command_ends_without_traceback(tmp_path):
    done = subprocess.run([Path(sys.executable).parent/"hpl_train", "hpl_paper", "utkface"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("hpl_nb: --root is missing") and "Traceback" not in done.stderr


def test_queue_shows_what_is_missing(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    typed("hpl_queue cpu --show")
    printed = capsys.readouterr().out
    assert "STS-B, 10 %" in printed and re.search(r"STS-B, 10 % +15 +15", printed)


def test_store_gathers(tmp_path, capsys):
    typed(f"hpl_compare rotated_digits --methods supervised --seeds 0 --jobs 1 --out {tmp_path}/runs --epochs 1 --iterations_per_epoch 2")
    typed(f"hpl_store {tmp_path}/runs --store {tmp_path}/store")
    assert "1 new run(s)" in capsys.readouterr().out and len(list((tmp_path/"store").rglob("*.json"))) == 1
    typed(f"hpl_store {tmp_path}/store --convert")
    assert "0 run(s) converted" in capsys.readouterr().out


def test_documented_lines_are_understood(root, monkeypatch):
    "Each command in README and in the experiments' README parses; placeholders in capitals are words like any other."
    text = "".join((root/name).read_text() for name in ("README.md", "nbs/experiments/README.md"))
    lines = {line.strip() for line in re.findall(r"(?:^|`)(hpl_[a-z]+ [^`\n]+)(?:$|`)", text, re.MULTILINE)}
    for line in lines: parsed(line.replace(" ...", ""), monkeypatch)
    assert {line.split()[0] for line in lines} == set(COMMANDS) and len(lines) > 12


def test_run_path_of_a_command(monkeypatch):
    "The folder that a command trains in is the one that Python names."
    given = parsed("hpl_train rankup_arc stsb --root P", monkeypatch)
    experiment = given.on.flags.experiment(given.on, given.method)
    assert run_path(experiment).as_posix().startswith("runs/stsb/0.05/rankup-arc-")
