"One file per run, gathered from anywhere; deadlines, Ray, protocols, and the tables beside the paper's."
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_runs import differences, on_cpu  # noqa: F401

from hpl_nb import cli, pipeline
from hpl_nb.cli import Job, Options, is_finished, run_jobs
from hpl_nb.core import HplError
from hpl_nb.training.run import load_run

OPTIONS = Options(epochs=3, iterations=4, record_every=1)


def jobs_in(folder, methods=("supervised", "hpl:paper"), seeds=(0,), options=OPTIONS):
    return [Job(spec, seed, options, cli.run_path(str(folder), options, spec, seed)) for seed in seeds for spec in methods]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "Two methods, two seeds."
    jobs = jobs_in(tmp_path_factory.mktemp("runs"), seeds=(0, 1))
    run_jobs(jobs, 1, progress=False)
    return jobs


class TestStore:
    def test_is_the_run(self, finished, tmp_path):
        for job in finished:
            run, copy = load_run(job.folder), load_run(pipeline.store_run(job.folder, tmp_path/"0").with_suffix(""))
            assert not differences(copy.config, run.config) and not differences(copy.metrics, run.metrics)
            assert copy.environment == run.environment and "torch" in copy.environment and copy.environment["hardware"]
            assert copy.options["epochs"] == 3 and copy.options["dataset"] == "rotated_digits"
            pd.testing.assert_frame_equal(copy.log, run.log, rtol=1e-5, check_dtype=False)
            test = run.predictions.query("split == 'test'")
            kept = copy.predictions.query("split == 'test'")
            assert set(kept["epoch"]) == {run.metrics["epoch"]} # the others are of the unlabelled rows
            np.testing.assert_allclose(kept["y_pred"], test[test["epoch"] == run.metrics["epoch"]]["y_pred"], rtol=1e-5)

    def test_names_no_folder_of_this_machine(self, finished, tmp_path):
        options = replace(OPTIONS, root=str(tmp_path/"secret"), weights="/home/x/w.pth")
        job = replace(finished[0], folder=str(tmp_path/"run"), options=options)
        cli.train_job(job, progress=False)
        text = pipeline.store_run(job.folder, tmp_path/"0").read_text()
        assert "secret" not in text and "/home" not in text and '"w.pth"' in text

    def test_without_predictions(self, finished, tmp_path):
        pipeline.store_run(finished[1].folder, tmp_path/"0", predictions=False)
        assert not (tmp_path/"0.parquet").exists() and load_run(tmp_path/"0").predictions.empty
        table = cli.results_table(cli.results_frame([load_run(tmp_path/"0"), load_run(finished[0].folder)]))
        assert len(table) == 2 and cli.pseudo_labels([load_run(tmp_path/"0")]).empty

    def test_prefers_runs_that_can_be_drawn(self, finished, tmp_path):
        pipeline.store_run(finished[1].folder, tmp_path/"0", predictions=False)
        bare, whole = load_run(tmp_path/"0"), load_run(finished[3].folder)
        assert cli.one_of_each([bare, whole]) == [whole] and cli.one_of_each([bare]) == [bare]

    def test_a_damaged_file_is_refused(self, finished, tmp_path):
        path = pipeline.store_run(finished[0].folder, tmp_path/"0")
        path.write_text(path.read_text()[:100])
        with pytest.raises(HplError, match="0.json cannot be read"): load_run(tmp_path/"0")
        path.write_text(json.dumps({"config": {}}))
        with pytest.raises(HplError, match="has no log, metrics, environment, options"): load_run(tmp_path/"0")

    def test_merge(self, finished, tmp_path):
        source, store = Path(finished[0].folder).parents[3], tmp_path/"store"
        new = pipeline.merge_runs(source, store)
        assert len(new) == 4 and pipeline.merge_runs(source, store) == [] and len(list(store.rglob("*.parquet"))) == 2
        assert len(pipeline.merge_runs(store, tmp_path/"again")) == 4 # stored runs can be gathered as well
        first = new[0]
        content = json.loads(first.read_text())
        first.write_text(json.dumps(content | {"metrics": content["metrics"] | {"test_mae": 1.}}))
        with pytest.raises(HplError, match="two results of one run: metrics test_mae"): pipeline.merge_runs(source, store)
        assert json.loads(first.read_text())["metrics"]["test_mae"] == 1.


class TestTraining:
    def test_what_is_stored_is_skipped(self, finished, tmp_path):
        out = str(Path(finished[0].folder).parents[3])
        runs = pipeline.run_and_store(finished, 1, out, str(tmp_path))
        assert len(runs) == 4 and len(list(tmp_path.rglob("*.json"))) == 4
        moved = jobs_in(tmp_path/"other", seeds=(0, 1))
        assert len(pipeline.run_and_store(moved, 1, str(tmp_path/"other"), str(tmp_path))) == 4
        assert not (tmp_path/"other").exists()
        other = jobs_in(tmp_path/"other", options=replace(OPTIONS, epochs=5))
        with pytest.raises(HplError, match="epochs=3 there, 5 here"):
            pipeline.run_and_store(other, 1, str(tmp_path/"other"), str(tmp_path))

    @pytest.mark.parametrize("parallel", [1, 2])
    def test_a_deadline_stops_and_the_same_call_goes_on(self, finished, tmp_path, parallel, monkeypatch):
        jobs = jobs_in(tmp_path)
        assert run_jobs(jobs, parallel, progress=False, until=time.time()) == [] and not list(tmp_path.iterdir())
        ticks = iter(range(10**6))
        monkeypatch.setattr(cli.time, "time", lambda: next(ticks)) # each step asks once; the seventh is too late
        assert run_jobs(jobs[:1], 1, progress=False, until=7) == [] and not is_finished(jobs[0])
        monkeypatch.undo()
        assert (Path(jobs[0].folder)/"checkpoints"/"last.pt").exists()
        runs = run_jobs(jobs, parallel, progress=False)
        for run, job in zip(runs, finished): assert not differences(run.predictions, load_run(job.folder).predictions)

    def test_compare_keeps_and_goes_on(self, tmp_path, capsys):
        arguments = dict(methods="supervised,hpl:paper", seeds="0,1", out=str(tmp_path/"runs"), store=str(tmp_path/"store"), jobs=1,
                         options="epochs=1 iterations=2")
        pipeline.hpl_compare(**arguments, minutes=0)
        assert "0 of 4 runs are finished; the same command goes on" in capsys.readouterr().out
        pipeline.hpl_compare(**arguments)
        assert "HPL (paper)" in capsys.readouterr().out and len(list((tmp_path/"store").rglob("*.json"))) == 4
        with pytest.raises(SystemExit, match="--backend is 'cloud'"): pipeline.hpl_compare(**arguments, backend="cloud")


@pytest.fixture(scope="module")
def ray_session():
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


class TestRay:
    def test_gives_what_processes_give(self, ray_session, finished, tmp_path):
        jobs = jobs_in(tmp_path, seeds=(0, 1))
        runs = run_jobs(jobs, 2, progress=False, backend=pipeline.ray_cluster())
        assert [run.config["seed"] for run in runs] == [0, 0, 1, 1]
        for run, job in zip(runs, finished): assert not differences(run.predictions, load_run(job.folder).predictions)

    def test_deadline_and_errors(self, ray_session, tmp_path):
        backend = pipeline.ray_cluster()
        assert run_jobs(jobs_in(tmp_path), 2, progress=False, until=time.time(), backend=backend) == []
        bad = [Job("hpl:paper", 0, Options(dataset="stsb", root=str(tmp_path), epochs=1), str(tmp_path/"run"))]
        with pytest.raises(HplError, match="sts.tsv"): run_jobs(bad, 1, progress=False, backend=backend)

    def test_files_come_back_where_no_disk_is_shared(self, finished, tmp_path):
        packed = pipeline.train_and_pack(replace(finished[0], folder=str(tmp_path/"there")), None, 1)
        pipeline.unpack_run(packed, tmp_path/"here")
        assert load_run(tmp_path/"here").metrics["test_mse"] == load_run(finished[0].folder).metrics["test_mse"]
        assert pipeline.train_and_pack(replace(finished[0], folder=str(tmp_path/"late")), time.time(), 1) is None


class TestProtocol:
    def test_the_projects_own(self):
        roots = {"utkface": "F", "stsb": "P", "WEIGHTS": "w.pth", "VECTORS": "g.txt"}
        for name in ("cpu", "gpu"):
            jobs = pipeline.protocol_jobs(pipeline.read_protocol(name), roots, "runs")
            assert len({job.folder for job in jobs}) == len(jobs), "a run is named twice"
            for job in jobs: cli.check_job(job)
        with pytest.raises(HplError, match="protocol is 'tpu'"): pipeline.read_protocol("tpu")

    def test_queue(self, tmp_path, capsys):
        path = tmp_path/"mine.csv"
        path.write_text("protocol,dataset,methods,label_ratios,seeds,options,what\n"
                        'mine,rotated_digits,"supervised,hpl:paper",0.055,"0,1",epochs=1 iterations=2,digits\n'
                        "mine,stsb,supervised,0.05,0,vectors=VECTORS,pairs\n")
        arguments = dict(protocol=str(path), out=str(tmp_path/"runs"), store=str(tmp_path/"store"), jobs=1)
        pipeline.hpl_queue(**arguments, show=True)
        assert "supervised 6%: 0,1; hpl:paper 6%: 0,1" in capsys.readouterr().out and not (tmp_path/"runs").exists()
        pipeline.hpl_queue(**arguments) # there is no folder for stsb, which is left out
        table = pipeline.what_is_missing(pipeline.read_protocol(str(path)), tmp_path/"store")
        assert table["done"].tolist() == [4, 0] and table["missing"].tolist() == ["", "supervised 5%: 0"]
        with pytest.raises(SystemExit, match="pass --vectors"): pipeline.hpl_queue(**arguments, stsb=str(tmp_path))
        path.write_text(path.read_text().replace("rotated_digits", "digits"))
        with pytest.raises(SystemExit, match="--dataset is 'digits'"): pipeline.hpl_queue(**arguments)
        path.write_text("dataset\nstsb\n")
        with pytest.raises(SystemExit, match="has no column 'protocol'"): pipeline.hpl_queue(**arguments)

    def test_store_command(self, finished, tmp_path, capsys):
        pipeline.hpl_store([str(Path(finished[0].folder).parents[3])], store=str(tmp_path))
        assert "4 new run(s)" in capsys.readouterr().out


class TestTables:
    def results(self):
        rows = [("HPL (paper)", seed, 5.6 + .01*seed) for seed in range(4)] + [("PseudoLabel", seed, 6. - .02*seed) for seed in range(4)]
        rows = [dict(protocol="gpu", dataset="UTKFace", label_ratio=.05, method=m, seed=s, mae=e, mse=e**2) for m, s, e in rows]
        return pd.DataFrame([*rows, rows[0] | {"protocol": "cpu"}])

    def test_beside_the_paper(self):
        from scipy.stats import ttest_rel
        results = self.results()
        table = pipeline.beside_paper(results, "utkface", "mae").set_index(["protocol", "method"])
        hpl = table.loc[("gpu", "HPL (paper)")]
        assert hpl["error_mean"] == 5.639 and hpl["difference"] == pytest.approx(5.615 - 5.639) and hpl["seeds"] == "0,1,2,3"
        errors = results.query("protocol == 'gpu'").pivot(index="seed", columns="method", values="mae")
        expected = ttest_rel(errors["PseudoLabel"], errors["HPL (paper)"]).pvalue
        assert table.loc[("gpu", "PseudoLabel"), "p_value"] == pytest.approx(expected)
        assert np.isnan(table.loc[("cpu", "HPL (paper)"), "std"]) and np.isnan(table.loc[("cpu", "HPL (paper)"), "p_value"])

    def test_without_runs(self):
        results = pipeline.errors_of({"cpu": []}, "stsb")
        assert results.empty and pipeline.beside_paper(results, "stsb", "mse").empty
