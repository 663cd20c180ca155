"Many runs: one file per run, gathered from anywhere; deadlines, Ray, protocols, conversion, and the tables beside the paper's."
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from joblib import cpu_count
from small_runs import differences, on_cpu  # noqa: F401

from hpl_nb import report, runner
from hpl_nb.convert import convert_runs
from hpl_nb.core import HplError, RunFolder, content_digest
from hpl_nb.data.rotated_digits import RotatedDigits
from hpl_nb.data.stsb import STSB
from hpl_nb.experiment import DATASETS, Experiment, run_path
from hpl_nb.methods.core import Supervised
from hpl_nb.methods.hpl import HPL
from hpl_nb.protocols import Files, cpu_protocol, gpu_protocol, what_is_missing
from hpl_nb.runner import is_finished, run_all, train_experiment
from hpl_nb.settings import change
from hpl_nb.store import merge_runs, run_summary, store_run
from hpl_nb.training.loop import fit
from hpl_nb.training.run import load_run

TRAIN = change(DATASETS[0].train, epochs=3, iterations_per_epoch=4, record_every=1)
EXPERIMENTS = [Experiment(RotatedDigits(), method, train=TRAIN, seed=seed) for seed in (0, 1) for method in (Supervised(), HPL.paper())]


SCRIPT = """from __future__ import annotations
import json
import os
import sys
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from hpl_nb import HPL, run_all
from hpl_nb.data.rotated_digits import RotatedDigits
from hpl_nb.experiment import DATASETS, Experiment
from hpl_nb.methods.core import PseudoLabel, PseudoLabelMethod
from hpl_nb.settings import change

@dataclass(frozen=True)
class Agreement(PseudoLabel):
    short:ClassVar[str] = "agreement"
    scale:float=.1
    def build(self, regressor): return AgreementMethod(regressor, change(self, scale=2*self.scale))

class AgreementMethod(PseudoLabelMethod):
    def weigh(self, passes):
        return passes.pseudo_label, 1/(1 + ((passes.prediction - passes.pseudo_label)/self.settings.scale)**2)

@dataclass(frozen=True)
class Digits(RotatedDigits):
    "Of this script; says which process trains, and in what surroundings."
    def load(self):
        said = os.getpid(), os.getppid(), "torch._dynamo" in sys.modules, torch.get_num_threads(), os.environ["CALL"]
        with open("said.jsonl", "a") as file: file.write(json.dumps(said) + "\\n")
        return super().load()

def learner(inputs): return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, 1))

short = change(DATASETS[0].train, epochs=1, iterations_per_epoch=3)
mine = [Experiment(Digits(), method, DATASETS[0].model, short) for method in (Agreement(), HPL.paper(learner=learner))]
for call, jobs in (("first", 2), ("second", 2), ("alone", 1)):
    os.environ["CALL"] = call
    print(json.dumps([run.metrics["test_mae"] for run in run_all(mine, call, jobs, progress=False)]))
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "Two methods, two seeds."
    folder = tmp_path_factory.mktemp("runs")
    run_all(EXPERIMENTS, folder, 1, progress=False)
    return folder


class TestStore:
    def test_is_the_run(self, out, tmp_path):
        for each in EXPERIMENTS:
            run, copy = load_run(run_path(each, out)), load_run(store_run(run_path(each, out), tmp_path/"0").with_suffix(""))
            assert not differences(copy.config, run_summary(run)["config"]) and not differences(copy.metrics, run.metrics)
            assert copy.environment == run.environment and "torch" in copy.environment and copy.environment["hardware"]
            pd.testing.assert_frame_equal(copy.log, run.log, rtol=1e-5, check_dtype=False)
            test, kept = (table.predictions.query("split == 'test'") for table in (run, copy))
            assert set(kept["epoch"]) == {run.metrics["epoch"]} # the others are of the unlabelled rows
            np.testing.assert_allclose(kept["y_pred"], test[test["epoch"] == run.metrics["epoch"]]["y_pred"], rtol=1e-5)

    def test_names_no_folder_of_this_machine(self, out):
        run = load_run(run_path(EXPERIMENTS[0], out))
        data, model = replace(DATASETS[1].data, root="/home/x/secret", cache="/tmp/y"), replace(DATASETS[1].model, weights="/home/x/w.pth")
        faces = Experiment(data, Supervised(), model)
        run.config["experiment"] = runner.as_json(faces)
        text = json.dumps(run_summary(run))
        assert "secret" not in text and "/home" not in text and '"w.pth"' in text

    def test_without_predictions(self, out, tmp_path):
        store_run(run_path(EXPERIMENTS[1], out), tmp_path/"0", predictions=False)
        bare, whole = load_run(tmp_path/"0"), load_run(run_path(EXPERIMENTS[3], out))
        assert not (tmp_path/"0.parquet").exists() and bare.predictions.empty and report.pseudo_labels([bare]).empty
        assert len(report.results_table(report.results_frame([bare, load_run(run_path(EXPERIMENTS[0], out))]))) == 2
        assert report.one_of_each([bare, whole]) == [whole] and report.one_of_each([bare]) == [bare]

    def test_a_damaged_file_is_refused(self, out, tmp_path):
        path = store_run(run_path(EXPERIMENTS[0], out), tmp_path/"0")
        content = json.loads(path.read_text())
        path.write_text(path.read_text()[:100])
        with pytest.raises(HplError, match="0.json cannot be read"): load_run(tmp_path/"0")
        path.write_text(json.dumps({"config": content["config"]}))
        with pytest.raises(HplError, match="has no log, metrics, environment"): load_run(tmp_path/"0")
        path.write_text(json.dumps(content | {"config": {}}))
        with pytest.raises(HplError, match="written by an earlier version; `hpl_store --convert"): load_run(tmp_path/"0")

    def test_merge(self, out, tmp_path):
        store = tmp_path/"store"
        new = merge_runs(out, store)
        assert len(new) == 4 and merge_runs(out, store) == [] and len(list(store.rglob("*.parquet"))) == 2
        assert len(merge_runs(store, tmp_path/"again")) == 4 # stored runs can be gathered as well
        content = json.loads(new[0].read_text())
        new[0].write_text(json.dumps(content | {"metrics": content["metrics"] | {"test_mae": 1.}}))
        with pytest.raises(HplError, match="two results of one run: metrics.test_mae"): merge_runs(out, store)
        assert json.loads(new[0].read_text())["metrics"]["test_mae"] == 1.

    @pytest.mark.parametrize("above", range(4))
    def test_one_run_goes_where_all_look_for_it(self, out, tmp_path, above, monkeypatch):
        "A run folder, and the folders above it; also as `.`."
        run, store = run_path(EXPERIMENTS[3], out), tmp_path/"store"
        assert RunFolder(run_path(EXPERIMENTS[3], store)).stored in merge_runs([run, *run.parents][above], store)
        assert not list(tmp_path.glob("*.json")) and what_is_missing([("digits", (EXPERIMENTS[3],))], store)["done"].tolist() == [1]
        monkeypatch.chdir(run)
        assert merge_runs(".", store) == []

    def test_one_run_without_an_experiment(self, tmp_path):
        data = EXPERIMENTS[0].load()
        fit(EXPERIMENTS[0].build(data), data, TRAIN, folder=tmp_path/"mine"/"0", progress=False)
        with pytest.raises(HplError, match=f"one run without an experiment. Give the folder that holds it, {tmp_path}/mine"):
            merge_runs(tmp_path/"mine"/"0", tmp_path/"store")
        assert merge_runs(tmp_path/"mine", tmp_path/"store") == [tmp_path/"store"/"0.json"]

    def test_conversion_reads_a_damaged_file_as_such(self, tmp_path):
        place = tmp_path/"rotated_digits"/"0.055"/"hpl-paper"/"0.json"
        place.parent.mkdir(parents=True)
        place.write_text('{"config": {}}')
        with pytest.raises(HplError, match="0.json cannot be read"): convert_runs([tmp_path])
        assert place.exists()


class TestTraining:
    def test_what_is_stored_is_skipped(self, out, tmp_path):
        assert len(run_all(EXPERIMENTS, out, 1, store=tmp_path/"store", progress=False)) == 4
        assert len(list((tmp_path/"store").rglob("*.json"))) == 4
        assert len(run_all(EXPERIMENTS, tmp_path/"other", 1, store=tmp_path/"store", progress=False)) == 4
        assert not (tmp_path/"other").exists()

    def test_a_folder_belongs_to_one_experiment(self, out, tmp_path):
        "Said before data are read, with the settings that differ; stored or not. Where data are does not count."
        other = replace(EXPERIMENTS[1], method=HPL.paper(outer_every=5), train=change(TRAIN, epochs=5))
        says = "settings: method.look_ahead.outer_every is 1 there and 5 here"
        store_run(run_path(EXPERIMENTS[1], out), tmp_path/"0")
        for folder in (run_path(EXPERIMENTS[1], out), tmp_path/"0"):
            with pytest.raises(HplError, match=says): train_experiment(other, folder)
        runner.check_folder(EXPERIMENTS[1], tmp_path/"0")

    @pytest.mark.parametrize("parallel", [1, 2])
    def test_a_deadline_stops_and_the_same_call_goes_on(self, out, tmp_path, parallel, monkeypatch):
        pair, first = EXPERIMENTS[:2], run_path(EXPERIMENTS[0], tmp_path)
        assert run_all(pair, tmp_path, parallel, progress=False, minutes=0) == [] and not list(tmp_path.iterdir())
        ticks = iter(range(10**6))
        monkeypatch.setattr(runner.time, "time", lambda: next(ticks)) # each step asks once; the ninth is too late
        assert run_all(pair[:1], tmp_path, 1, progress=False, minutes=8/60) == [] and not is_finished(first)
        monkeypatch.undo()
        assert (first/"checkpoints"/"last.pt").exists()
        for run, each in zip(run_all(pair, tmp_path, parallel, progress=False), pair):
            assert not differences(run.predictions, load_run(run_path(each, out)).predictions)

    def test_classes_of_a_script(self, tmp_path):
        """Its own method, dataset and learner train in two processes, without a guard, and as they do in one. On Linux the workers of both
        calls are forked from one process that has imported all, and have the cores and the environment of the call."""
        script = tmp_path/"mine.py"
        script.write_text(SCRIPT)
        environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stderr
        one, two, alone = map(json.loads, done.stdout.splitlines()) # printed once: no process runs the script again
        assert one == two == alone and len(one) == len({*one}) == 2
        said = [json.loads(line) for line in (tmp_path/"said.jsonl").read_text().splitlines()]
        main, (*workers, _, _) = said[-1][0], said
        assert [call for *_, call in said] == ["first"]*2 + ["second"]*2 + ["alone"]*2 and main not in {pid for pid, *_ in workers}
        assert {threads for *_, threads, _ in workers} == {max(1, cpu_count()//2)}
        if sys.platform == "linux":
            assert len({above for _, above, *_ in workers} - {main}) == 1 and all(ready for _, _, ready, *_ in workers)

    def test_a_single_run_needs_no_other_process(self, tmp_path, monkeypatch):
        monkeypatch.setattr(runner, "ProcessPoolExecutor", None)
        assert len(run_all(EXPERIMENTS[:1], tmp_path, 4, progress=False)) == 1

    def test_workers_make_no_batches_on_the_device(self, tmp_path):
        faces = Experiment(replace(DATASETS[1].data, pixels="device"), Supervised())
        with pytest.raises(HplError, match="workers is 2, but with pixels='device'"): train_experiment(faces, tmp_path/"run", workers=2)


@pytest.fixture(scope="module")
def ray_session():
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300") # before Ray is imported: a busy machine may need longer than 30 s
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


class TestRay:
    def test_gives_what_processes_give(self, ray_session, out, tmp_path):
        runs = run_all(EXPERIMENTS, tmp_path, 2, progress=False, backend=runner.ray_cluster())
        assert [run.config["seed"] for run in runs] == [0, 0, 1, 1]
        for run, each in zip(runs, EXPERIMENTS): assert not differences(run.predictions, load_run(run_path(each, out)).predictions)

    def test_deadline_and_errors(self, ray_session, tmp_path):
        backend = runner.ray_cluster()
        assert run_all(EXPERIMENTS, tmp_path, 2, progress=False, minutes=0, backend=backend) == []
        bad = Experiment(STSB(str(tmp_path)), train=change(DATASETS[3].train, epochs=1))
        with pytest.raises(HplError, match="sts.tsv"): run_all([bad], tmp_path/"run", 1, progress=False, backend=backend)

    def test_files_come_back_where_no_disk_is_shared(self, out, tmp_path):
        packed = runner.train_and_pack((EXPERIMENTS[0], tmp_path/"there"), None, 1)
        runner.unpack_run(packed, tmp_path/"here")
        assert load_run(tmp_path/"here").metrics["test_mse"] == load_run(run_path(EXPERIMENTS[0], out)).metrics["test_mse"]
        assert runner.train_and_pack((EXPERIMENTS[0], tmp_path/"late"), time.time(), 1) is None


class TestProtocol:
    def test_no_run_is_named_twice(self):
        for protocol in (cpu_protocol(), gpu_protocol(Files("faces", "pairs"))):
            paths = [run_path(each) for entry in protocol for each in entry.experiments]
            assert len({*paths}) == len(paths) > 90

    def test_stored_runs_are_found(self, root):
        "All 44 stored runs are runs of the protocol, at the place that their experiment has."
        table = what_is_missing(cpu_protocol(), root/"data"/"results"/"cpu")
        stored = list((root/"data"/"results"/"cpu").rglob("*.json"))
        assert table["done"].sum() == len(stored) >= 44
        for path in stored:
            experiment = runner.read_experiment(load_run(path.with_suffix("")).config["experiment"])
            assert path.with_suffix("") == run_path(experiment, path.parents[3])

    def test_what_is_missing(self, out):
        table = what_is_missing([("digits", tuple(replace(each, seed=each.seed + 1) for each in EXPERIMENTS))], out)
        assert table["done"].tolist() == [2] and table["missing"].tolist() == ["Supervised 6%: 2; HPL (paper) 6%: 2"]


class TestTables:
    def results(self):
        rows = [("HPL (paper)", seed, 5.6 + .01*seed) for seed in range(4)] + [("PseudoLabel", seed, 6. - .02*seed) for seed in range(4)]
        rows = [dict(protocol="gpu", dataset="UTKFace", benchmark="utkface", label_ratio=.05, method=m, in_paper=m.partition(" ")[0],
                     seed=s, mae=e, mse=e**2) for m, s, e in rows]
        return pd.DataFrame([*rows, rows[0] | {"protocol": "cpu"}])

    def test_beside_the_paper(self):
        from scipy.stats import ttest_rel
        results = self.results()
        table = report.beside_paper(results, "mae").set_index(["protocol", "method"])
        hpl = table.loc[("gpu", "HPL (paper)")]
        assert hpl["error_mean"] == 5.639 and hpl["difference"] == pytest.approx(5.615 - 5.639) and hpl["seeds"] == "0,1,2,3"
        errors = results.query("protocol == 'gpu'").pivot(index="seed", columns="method", values="mae")
        expected = ttest_rel(errors["PseudoLabel"], errors["HPL (paper)"]).pvalue
        assert table.loc[("gpu", "PseudoLabel"), "p_value"] == pytest.approx(expected)
        assert np.isnan(table.loc[("cpu", "HPL (paper)"), "std"]) and np.isnan(table.loc[("cpu", "HPL (paper)"), "p_value"])

    def test_without_runs(self):
        results = report.errors_of({"cpu": []}, "stsb")
        assert results.empty and report.beside_paper(results, "mse").empty

    @pytest.mark.parametrize("benchmark, paper", [("utkface", "5.639 ± 0.035 MAE"), ("imdb_wiki", "9.177 ± 0.061 MAE"),
                                                  ("stsb", "1.540 ± 0.006 MSE")])
    def test_the_paper_beside_ours(self, benchmark, paper):
        "HPL's presets are the paper's HPL; RankUp without its second half is not the paper's RankUp."
        methods = {"HPL (paper)": "HPL", "Supervised": "Supervised", "RankUp": "RankUp", "RankUp (arc)": ""}
        results = pd.DataFrame([{"dataset": benchmark, "benchmark": benchmark, "label_ratio": .05, "method": name, "in_paper": row,
                                 "seed": seed, "mae": 6. + .2*seed, "mse": 1., "r2": .5, "pseudo_label_mae": 5., "log_variance": 0.,
                                 "seconds": 1.}
                                for name, row in methods.items() for seed in (0, 1)])
        table = report.results_table(results).set_index("method")
        assert isinstance(table.loc["RankUp", "paper"], str) and pd.isna(table.loc["RankUp (arc)", "paper"])
        assert table.loc["HPL (paper)", "paper"] == paper and table.loc["Supervised", "mae"] == "6.10 ± 0.14"

    def test_the_papers_row_is_told_by_the_settings(self, out):
        "Not by how a table calls the method."
        rows = report.results_frame([load_run(run_path(each, out)) for each in EXPERIMENTS])
        assert rows["in_paper"].tolist() == ["Supervised", "HPL"]*2 and set(rows["benchmark"]) == {"rotated_digits"}
        run = load_run(run_path(EXPERIMENTS[1], out))
        run.config["settings"]["label"] = "paper, outer_every=5"
        assert report.results_frame([run])["in_paper"].tolist() == [""]


def test_a_run_folder_of_the_first_form_is_converted(out, tmp_path):
    "A finished one reads as before, its checksums too; an unfinished one is refused with what to do."
    run = load_run(run_path(EXPERIMENTS[1], out))
    shutil.copytree(run_path(EXPERIMENTS[1], out), tmp_path/"run")
    config = {name: value for name, value in run.config.items() if name not in ("format", "experiment")}
    flat = {"unlabelled_weight": 1., "outer_every": 1, "learner_lr": 1e-4, "half_weight": False, "preset": "paper"}
    folder = RunFolder(tmp_path/"run")
    folder.write_json("config.json", config | {"settings": flat})
    folder.write_json("checksums.json", folder.read_json("checksums.json") | {"config.json": content_digest(folder.path/"config.json")})
    (tmp_path/"run"/"options.json").write_text(json.dumps({"dataset": "rotated_digits", "label_ratio": .055, "strength": 1.,
                                                           "dropout": 0.}))
    with pytest.raises(HplError, match="earlier version; `hpl_store --convert"): load_run(tmp_path/"run")
    metrics = (tmp_path/"run"/"metrics.json").rename(tmp_path/"metrics.json")
    with pytest.raises(HplError, match="is not finished, and this version cannot resume it"): convert_runs([tmp_path])
    metrics.rename(tmp_path/"run"/"metrics.json")
    assert convert_runs([tmp_path]) == [tmp_path/"run"] and convert_runs([tmp_path]) == []
    again = load_run(tmp_path/"run")
    assert runner.read_experiment(again.config["experiment"]) == EXPERIMENTS[1] and not differences(again.predictions, run.predictions)
    runner.check_folder(EXPERIMENTS[1], tmp_path/"run")
