"""Runs that go on, and what small data make of them.

More epochs in a folder end with the bits of a run that was longer from the start, or a sentence says why not. The oracles of the other
tests are PyTorch's own `DataLoader`, and the numbers of the authors' code.
"""
import json
import shutil
import signal
import warnings
import zipfile
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import METHODS, SETTINGS, differences, on_cpu, tree, vectors  # noqa: F401
from test_resume import finished, start, without_seconds  # noqa: F401
from torch.utils.data import DataLoader

from hpl_nb.cli import hpl_train
from hpl_nb.core import HplError, RunFolder, seed_everything
from hpl_nb.data.core import SemiSupervisedData, Streams, StreamSettings, batch_rows
from hpl_nb.data.imdb_wiki import IMDBWiki
from hpl_nb.data.rotated_digits import RotatedDigits
from hpl_nb.data.stsb import STSB
from hpl_nb.data.utkface import UTKFace
from hpl_nb.estimator import SemiSupervisedRegressor
from hpl_nb.experiment import DATASETS, Experiment, run_path
from hpl_nb.methods.cadr import CADR
from hpl_nb.methods.core import PseudoLabel, Released, Supervised
from hpl_nb.methods.hpl import HPL
from hpl_nb.methods.mean_teacher import MeanTeacher
from hpl_nb.methods.rankup import RankUp
from hpl_nb.methods.temporal_ensembling import TemporalEnsembling
from hpl_nb.models import mlp
from hpl_nb.protocols import what_is_missing
from hpl_nb.runner import run_all, train_experiment
from hpl_nb.settings import change
from hpl_nb.store import merge_runs, store_run
from hpl_nb.training import state
from hpl_nb.training.checkpoint import read_checkpoint
from hpl_nb.training.loop import fit, open_training
from hpl_nb.training.run import load_run
from hpl_nb.training.state import Clock, Train, epoch_length

SHORT = replace(SETTINGS, epochs=2)


def dense(): return mlp(3, (16,), dropout=.2)


def on_rows(name):
    "A fresh method on a small network for `vectors()`."
    seed_everything(0)
    return METHODS[name].build(dense())


def train(folder, name="PseudoLabel", settings=SETTINGS, **arguments):
    "The method after a run on rows of features, and the run."
    method = on_rows(name)
    return method, fit(method, vectors(), settings, folder=folder, progress=False, **arguments)


def left(folder, method, run):
    "All that a run leaves behind, without times."
    last = read_checkpoint(RunFolder(folder).checkpoint)
    return {"method": dict(method.state_dict()), "metrics": without_seconds(run.metrics), "log": without_seconds(run.log.to_dict("list")),
            "predictions": run.predictions, "last": without_seconds(last) | {"config": json.loads(last["config"])}, "config": run.config,
            "loaded": without_seconds(load_run(folder).metrics), "files": [*tree(folder)]}


class TestMoreEpochs:
    @pytest.mark.parametrize("name", METHODS)
    def test_equal_a_run_that_was_longer_from_the_start(self, name, tmp_path):
        "Two epochs and then three, to the bit; a method that ramps up over the whole run says so and keeps the two."
        whole = left(tmp_path/"whole", *train(tmp_path/"whole", name))
        train(tmp_path/"run", name, SHORT)
        if share := METHODS[name].share_of_run:
            before = tree(tmp_path/"run")
            with pytest.raises(HplError, match=f"epochs is 2 there and 3 here .{share} is a share of all epochs, so that"):
                train(tmp_path/"run", name)
            assert tree(tmp_path/"run") == before
        else: assert not differences(left(tmp_path/"run", *train(tmp_path/"run", name)), whole)

    @pytest.mark.parametrize("name", METHODS)
    def test_methods_say_whether_they_read_the_length_of_the_run(self, name, monkeypatch):
        read = []
        class Spy(Clock):
            @property
            def steps(self): return read.append(1) or Clock.steps.__get__(self)
        monkeypatch.setattr(state, "Clock", Spy)
        method, _ = train(None, name, change(SHORT, record_every=0))
        assert bool(read) == bool(method.share_of_run)
        assert not method.share_of_run or hasattr(method.settings, method.share_of_run)

    @pytest.mark.parametrize("method", [MeanTeacher(ramp_share=0.), TemporalEnsembling(ramp_share=0.), RankUp(ramp=0.), RankUp.arc()])
    def test_without_its_ramp_a_method_goes_on(self, method): assert not method.share_of_run

    @pytest.mark.parametrize("steps", [1, 5, 7, 10])
    def test_a_stopped_run(self, steps, tmp_path):
        "In an epoch, at its end, and before the last step."
        whole = left(tmp_path/"whole", *train(tmp_path/"whole"))
        train(tmp_path/"run", settings=SHORT, stop_after=steps)
        assert not differences(left(tmp_path/"run", *train(tmp_path/"run")), whole)

    @settings(max_examples=8, deadline=None)
    @given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.sampled_from([None, 1, 2]), st.sampled_from([0, 1, 2]))
    def test_any_lengths(self, tmp_path_factory, epochs, patience, every):
        "Patience that has run out has run out for the longer run too; snapshots and the selected epoch are those of one run."
        folder, lengths = tmp_path_factory.mktemp("run"), sorted(epochs)
        schedule = replace(SETTINGS, patience=patience, record_every=every, optimizer=replace(SETTINGS.optimizer, lr_body=.03, lr_head=.1))
        for length in lengths: ends = train(folder/"run", "Supervised", replace(schedule, epochs=length))
        whole = train(folder/"whole", "Supervised", replace(schedule, epochs=lengths[-1]))
        one, other = (left(folder/name, *pair) for name, pair in (("run", ends), ("whole", whole)))
        assert not differences(one | {"files": 0}, other | {"files": 0})

    @pytest.mark.parametrize("name, moments", [("HPL previous", [*range(1, 9), -9, -5, -3, -2, -1]), ("PseudoLabel", [2, 4, 12, -7, -4])])
    def test_killed_at_any_moment_of_going_on(self, name, moments, start, tmp_path): # noqa: F811
        "What is left is the two epochs, finished, or a run that the same call ends."
        code, whole = finished(start, tmp_path/"whole", name, 0.)
        short = tmp_path/"short"
        assert finished(start, short, name, 0., epochs=2)[0] == code == 0
        shutil.copytree(short, tmp_path/"counted")
        count, metrics = finished(start, tmp_path/"counted", name, 0.)[1]["moments"], load_run(short).metrics
        for moment in moments:
            shutil.copytree(short, folder := tmp_path/f"killed {moment}")
            assert finished(start, folder, name, 0., moment % (count + 1))[0] == -signal.SIGKILL
            try: assert load_run(folder).metrics == metrics or len(load_run(folder).log) == 3
            except HplError as error: assert "is not finished" in str(error)
            code, ended = finished(start, folder, name, 0.)
            assert code == 0 and not differences(ended | {"moments": 0}, whole | {"moments": 0}), moment

    def test_results_without_checkpoints_are_kept(self, tmp_path):
        train(tmp_path, settings=SHORT)
        shutil.rmtree(tmp_path/"checkpoints")
        before = tree(tmp_path)
        with pytest.raises(HplError, match="finished run of 2 epochs and no checkpoint to go on from"): train(tmp_path)
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("stop_after", [None, 7])
    def test_fewer_epochs(self, stop_after, tmp_path):
        train(tmp_path, stop_after=stop_after)
        before = tree(tmp_path)
        with pytest.raises(HplError, match="train.epochs is 3 there and 2 here .a run goes on for more epochs, never for fewer"):
            train(tmp_path, settings=SHORT)
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("change, says", [
        ({"streams": StreamSettings(4, 16)}, "train.streams.labelled_batch is 8 there and 4 here"),
        ({"accumulate": 2}, "train.accumulate is 1 there and 2 here"),
        ({"optimizer": replace(SETTINGS.optimizer, decay=.9)}, "train.optimizer.decay is 0.5 there and 0.9 here")])
    def test_any_other_difference_is_named_by_its_key(self, change, says, tmp_path):
        "With more epochs or without them, and nothing else is said."
        train(tmp_path, settings=SHORT)
        for epochs in (2, 3):
            with pytest.raises(HplError) as error: train(tmp_path, settings=replace(SETTINGS, epochs=epochs, **change))
            assert says in str(error.value) and "{" not in str(error.value) and str(error.value).count(" there and ") == 1


@pytest.mark.parametrize(("settings", "rows"), [
    (MeanTeacher(), "F1"), (RankUp(), "F1, F5"), (RankUp.arc(), "F1"), (RankUp.arc(decay=None), ""), (CADR(prior="predicted"), "F6"),
    (CADR(), "")])
def test_a_run_of_earlier_arithmetic_is_not_resumed(settings, rows, tmp_path):
    "Its config.json names no correction; a method that has none goes on as before."
    def go(**arguments):
        seed_everything(0)
        method = settings.build(dense())
        return fit(method, vectors(), SHORT, folder=tmp_path/"run", progress=False, **arguments)
    go(stop_after=3)
    config = json.loads((tmp_path/"run"/"config.json").read_text())
    assert config["settings"].get("corrections", "") == rows
    config["settings"].pop("corrections", None)
    (tmp_path/"run"/"config.json").write_text(json.dumps(config))
    if rows:
        says = rf"holds another run \(config.json\): hpl_nb has changed the method's arithmetic since \({rows}\)\. "
        with pytest.raises(HplError, match=says): go()
    else: assert go().finished


class TestWhereFoldersAreNamed:
    data = vectors()

    def test_estimator(self, tmp_path):
        x, y = self.data.inputs.numpy(), np.where(np.arange(200) < 40, self.data.targets[:, 0], np.nan)
        def model(folder, epochs, method="pseudo_label", **train):
            schedule = Train(iterations_per_epoch=5, **train)
            return SemiSupervisedRegressor(method, epochs=epochs, train=schedule, folder=folder, random_state=0).fit(x, y)
        model(tmp_path/"run", 2)
        assert np.array_equal(model(tmp_path/"run", 3).predict(x), model(tmp_path/"whole", 3).predict(x))
        with pytest.raises(HplError, match="train.streams.unlabelled_batch is 32 there and 16 here"):
            model(tmp_path/"run", 3, streams=StreamSettings(16, 16))
        model(tmp_path/"mean", 2, "mean_teacher")
        with pytest.raises(HplError, match="ramp_share is a share of all epochs"): model(tmp_path/"mean", 3, "mean_teacher")

    def test_command(self, tmp_path, capsys):
        command = ["supervised", "rotated_digits", "--iterations_per_epoch", "3", "--out", str(tmp_path/"run"), "--epochs"]
        for epochs in "2", "3": hpl_train([*command, epochs])
        assert "of 3 by validation" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="train.streams.labelled_batch is 32 there and 16 here"):
            hpl_train([*command, "3", "--labelled_batch", "16"])

    def experiment(self, epochs):
        return Experiment(RotatedDigits(), Supervised(), train=change(DATASETS[0].train, epochs=epochs, iterations_per_epoch=3))

    def test_experiment(self, tmp_path):
        "The folder's name says how long the run was at first, so only `train_experiment` goes on, and a store names it anew."
        short, long = self.experiment(1), self.experiment(2)
        run_all([short], tmp_path/"runs", 1, progress=False)
        folder = run_path(short, tmp_path/"runs")
        run, whole = train_experiment(long, folder, progress=False), train_experiment(long, tmp_path/"whole", progress=False)
        assert not differences(run.predictions, whole.predictions) and not differences(run.config, whole.config)
        assert run_path(short) != run_path(long)
        with pytest.raises(HplError, match="train.epochs is 2 there and 1 here"): run_all([short], tmp_path/"runs", 1, progress=False)
        merge_runs(tmp_path/"runs", tmp_path/"store")
        assert load_run(run_path(long, tmp_path/"store")).metrics == run.metrics
        table = [what_is_missing([("", (each,))], tmp_path/"store")["done"].item() for each in (short, long)]
        assert table == [0, 1]

    def test_a_run_that_is_only_read(self, tmp_path):
        "A stored run has no checkpoint, and `run_all` takes what is finished for finished."
        short, long = self.experiment(1), self.experiment(2)
        train_experiment(short, tmp_path/"0", progress=False)
        with pytest.raises(HplError, match="epochs is 1 there and 2 here .a stored run has no checkpoint to go on from"):
            train_experiment(long, store_run(tmp_path/"0", tmp_path/"stored").with_suffix(""), progress=False)
        shutil.copytree(tmp_path/"0", run_path(long, tmp_path/"runs"))
        with pytest.raises(HplError, match="epochs is 1 there and 2 here .train_experiment makes such a run longer"):
            run_all([long], tmp_path/"runs", 1, progress=False)


def test_watch_sees_every_step(tmp_path):
    "The last one too, with its row of the log; a true answer there changes nothing."
    for folder in (None, tmp_path):
        seen = []
        def watch(at): return seen.append((at.step, len(at.log))) or at.step == 15
        _, run = train(folder, settings=replace(SETTINGS, record_every=0), watch=watch)
        assert seen == [(step, step//5) for step in range(1, 16)] and run.finished


class TestEpochs:
    """The originals' loops: `len(DataLoader(...))`, with `drop_last` for pictures and without it for STS-B."""
    @pytest.mark.parametrize("ratio, labelled, faces, pairs, imdb", [
        (.05, (500, 9575, 262), 313, 156, 398), (.1, (1000, 19150, 524), 297, 148, 797), (.2, (2000, 38301, 1049), 266, 132, 1595)])
    def test_of_the_released_schedules(self, ratio, labelled, faces, pairs, imdb):
        for data, n, rows, steps in zip((UTKFace(), IMDBWiki(), STSB()), labelled, (10518, 191509, 5249), (faces, imdb, pairs)):
            schedule = Experiment(replace(data, label_ratio=ratio), Supervised()).train
            numbers = np.arange(rows)
            made = SemiSupervisedData("rows", numbers, numbers*1., numbers[:n], numbers[n:], [], [])
            assert epoch_length(made, schedule, schedule.streams) == steps
            one = range(2*n) if schedule.epoch_of == "labelled" else range(rows - n)
            batch = schedule.streams.labelled_batch
            assert len(DataLoader(one, batch, drop_last=not isinstance(data, STSB))) == steps

    @settings(max_examples=40, deadline=None)
    @given(st.integers(3, 60), st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.booleans())
    def test_batches_are_a_loaders(self, labelled, unlabelled, n, m, copies, drop_last):
        "Sizes and number of an epoch's batches are those of PyTorch's loader over the same rows, which come once each."
        n, m, rows = min(n, labelled), min(m, unlabelled), np.arange(labelled + unlabelled)
        data = SemiSupervisedData("rows", rows, rows*1., rows[:labelled], rows[labelled:], [], [])
        streams = StreamSettings(n, m, labelled_copies=copies, drop_last=drop_last, outer_overlap=True)
        seed_everything(0)
        made = open_training(PseudoLabel().build(dense()), data, Train(epochs=2, streams=streams))
        length = made.progress.per_epoch
        assert length == len(DataLoader(data.unlabelled, m, drop_last=drop_last))
        for stream, batch, passed in (("unlabelled", m, data.unlabelled), ("labelled", n, np.tile(data.labelled, copies))):
            sizes = [len(part) for part in DataLoader(passed, batch, drop_last=drop_last)]
            found = [batch_rows(made.streams, step)[stream] for step in range(2*len(sizes))]
            assert [len(part) for part in found] == sizes*2
            if not drop_last: assert sorted(np.concatenate(found)) == sorted(np.tile(passed, 2))

    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_takes_a_smaller_last_batch(self, name):
        "40 labelled rows in batches of 16, 120 unlabelled ones in batches of 32: the last have 8 and 24."
        schedule = Train(epochs=2, streams=StreamSettings(16, 32, drop_last=False))
        _, run = train(None, name, schedule)
        assert run.finished and run.log["step"].tolist() == [4, 8] and np.isfinite(run.metrics["test_mse"])

    def test_parts_that_a_last_batch_does_not_have(self):
        "119 rows in batches of 2 leave one: neither two processes nor two micro-batches can share it."
        data = replace(vectors(), unlabelled=vectors().unlabelled[:119])
        streams = StreamSettings(20, 2, drop_last=False)
        with pytest.raises(HplError, match="with drop_last=False the last unlabelled batch of a pass has 1 rows, which 2 processes cannot"):
            Streams(data, on_rows("PseudoLabel").needs, streams, 10, 0, processes=2)
        with pytest.raises(HplError, match="accumulate is 2, which does not divide the unlabelled batch of 1"):
            open_training(on_rows("PseudoLabel"), data, Train(streams=streams, accumulate=2))


class TestConstants:
    "What the release has by dataset (section 1.1 of the facts); where Python and the commands differ, and where they do not."
    def constants(self, method):
        return method.unlabelled_weight, method.look_ahead.outer_regularizer, method.learner.learner_weight_decay

    @pytest.mark.parametrize("data, facts", [(UTKFace(), (10, .1, 0)), (IMDBWiki(), (10, 0, 0)), (STSB(), (1, 1, 1e-5))])
    def test_of_an_experiment(self, data, facts):
        method = Experiment(data, HPL.release()).method
        assert self.constants(method) == facts == self.constants(method.build(dense()).settings)

    def test_without_a_dataset(self):
        "Built by hand, in the estimator and on a dataset that the release does not have: one number, for every method."
        for each in METHODS.values():
            alone, known = each.build(dense()), Experiment(RotatedDigits(), each)
            assert getattr(known.method, "unlabelled_weight", None) == getattr(each.suited_to(Released()), "unlabelled_weight", None)
            if isinstance(each, PseudoLabel):
                used = alone.settings.unlabelled_weight if isinstance(each, HPL) else getattr(alone, "unlabelled_weight", 1.)
                assert used == known.method.unlabelled_weight
        assert self.constants(HPL.release().build(dense()).settings) == (2, .1, 0)


NAMES = ("HPL paper", "HPL release", "HPL previous", "PseudoLabel", "Supervised", "UCVME", "TNNR", "RankUp")


class TestFewRows:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(4, 70), st.integers(2, 70), st.sampled_from(NAMES), st.integers(1, 3))
    def test_default_batches_fit_any_rows(self, labelled, unlabelled, name, copies):
        "As large as they can be up to 32, with a warning that names the options where they are smaller, and kept in the settings."
        data, schedule = rows_of(labelled, unlabelled), change(Train(epochs=1), labelled_copies=copies)
        apart = name == "HPL paper"
        expected = {"labelled_batch": min(32, labelled//2 if apart else labelled*copies), "unlabelled_batch": min(32, unlabelled)}
        if name == "Supervised": expected["unlabelled_batch"] = 32
        smaller = " and ".join(f"{key}={size}" for key, size in expected.items() if size < 32)
        with pytest.warns(UserWarning, match=smaller) if smaller else nullcontext():
            training = open_training(on_rows(name), data, schedule)
        streams = training.settings.streams
        assert {key: getattr(streams, key) for key in expected} == expected and training.streams[0]

    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 70), st.integers(1, 70), st.integers(1, 90), st.integers(1, 90), st.sampled_from(["HPL paper", "PseudoLabel"]))
    def test_a_size_that_was_chosen_is_refused_by_name(self, labelled, unlabelled, n, m, name):
        most = labelled//2 if name == "HPL paper" else labelled
        data, schedule = rows_of(labelled, unlabelled), Train(epochs=1, streams=StreamSettings(n, m))
        wrong = [(n, most, "labelled"), (m, unlabelled, "unlabelled")]
        wrong = [each for each in wrong if each[0] > each[1] and (each[0] != 32 or each[1] < 2)]
        if not wrong:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                assert open_training(on_rows(name), data, schedule).streams[0]
            return
        size, most, stream = wrong[0]
        with pytest.raises(HplError, match=f"{stream} rows are fewer than .*{size}.* lower {stream}_batch to at most {most}") as error:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                open_training(on_rows(name), data, schedule)
        assert f"{stream}_batch" in str(error.value)

    @pytest.mark.parametrize("name, rows", [("HPL paper", 3), ("PseudoLabel", 1)])
    def test_a_batch_of_one_row_is_not_chosen_for_anybody(self, name, rows):
        "Whoever wants it says so."
        data = rows_of(rows, 20)
        with pytest.raises(HplError, match=f"{rows} labelled rows are fewer than .* lower labelled_batch to at most 1"):
            open_training(on_rows(name), data, Train(epochs=1))
        assert open_training(on_rows(name), data, Train(epochs=1, streams=StreamSettings(1, 20))).streams[0]

    @pytest.mark.parametrize("name", ["HPL paper", "PseudoLabel", "Supervised", "MeanTeacher"])
    def test_a_run(self, name, tmp_path):
        "27 labelled rows and 53 others, by `fit` and default sizes; the same call goes on, and the folder says which sizes were used."
        method, data = on_rows(name), rows_of(27, 53)
        with pytest.warns(UserWarning, match="labelled_batch=13" if name == "HPL paper" else "labelled_batch=27"):
            run = fit(method, data, Train(epochs=1), folder=tmp_path, progress=False)
        assert run.config["train"]["streams"]["labelled_batch"] == (13 if name == "HPL paper" else 27)

    def test_command(self, tmp_path):
        "A default gives way, what was typed is refused by its option, before the first step."
        command = ["hpl_paper", "rotated_digits", "--label_ratio", ".022", "--epochs", "1", "--iterations_per_epoch", "2", "--out"]
        with pytest.warns(UserWarning, match="28 labelled and .* labelled_batch=14 is used"): hpl_train([*command, str(tmp_path/"a")])
        says = "28 labelled rows are fewer than the 48 of --labelled_batch 24 .* --labelled_batch to at most 14"
        with pytest.raises(SystemExit, match=says):
            hpl_train([*command, str(tmp_path/"b"), "--labelled_batch", "24"])


def rows_of(labelled, unlabelled):
    "`vectors` with so many rows, and a few held out."
    rows = np.arange(labelled + unlabelled + 8)
    sets = {"labelled": rows[:labelled], "unlabelled": rows[labelled:-8], "val": rows[-8:-4], "test": rows[-4:]}
    return replace(vectors(rows=max(len(rows), 90)), **sets, normalizer=None)


def test_a_member_that_is_marked_as_a_folder(tmp_path):
    "PyTorch reads nothing of such a member, and a checkpoint would be loaded with other weights."
    path = tmp_path/"a.pt"
    torch.save({"a": torch.arange(100.)}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive: start = archive.start_dir
    for entry in range(start, len(content) - 46):
        if content[entry:entry + 4] == b"PK\x01\x02" and b"/data/0" in content[entry:entry + 90]: content[entry + 38] ^= 16
    path.write_bytes(content)
    with pytest.raises(HplError, match="is marked as a folder"): read_checkpoint(path)
