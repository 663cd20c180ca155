"What the trainer refuses, what it never loses, and what its settings promise."
import errno
import importlib.util
import os
import re
import resource
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.tracking import GeneralTracker
from small_runs import METHODS, differences, make, on_cpu, tree, vectors  # noqa: F401
from torch import nn

from hpl_nb.core import HplError, RunFolder, atomic_write
from hpl_nb.data.core import PerSample, SemiSupervisedData, StreamSettings, synthetic
from hpl_nb.methods.core import FullySupervised, PseudoLabelMethod, SupervisedMethod
from hpl_nb.methods.hpl import HPLMethod
from hpl_nb.metrics import evaluate
from hpl_nb.models import mlp
from hpl_nb.training.checkpoint import read_checkpoint
from hpl_nb.training.loop import fit
from hpl_nb.training.run import load_run
from hpl_nb.training.state import OptimizerSettings, Train

SMALL = Train(epochs=3, iterations_per_epoch=5, streams=StreamSettings(8, 8), optimizer=OptimizerSettings(1e-2, 1e-2))
dense = partial(mlp, 3, (16,), dropout=.2)


def train(name="HPL paper", data=None, settings=SMALL, seed=0, regressor=dense, **arguments):
    "A run and the method that it trained."
    method = make(name, seed, regressor)
    return fit(method, data or vectors(), settings, seed=seed, progress=False, **arguments), method


def interrupted(folder, **arguments):
    "A folder with a run that has stopped in the middle of its second epoch."
    train(folder=folder, stop_after=7, **arguments)
    return folder


def relabelled(data, rows, seed=1):
    "The data with the true labels of some rows shuffled."
    targets = data.targets.copy()
    targets[rows] = targets[np.random.default_rng(seed).permutation(rows)]
    return replace(data, targets=targets)


class TestBadInput:
    "Each is one clear error, before any training, and the folder stays as it was."

    @pytest.fixture(autouse=True)
    def untouched(self, tmp_path):
        "An interrupted run which is the same after the test, and no other file; refused before the first step."
        self.folder, self.other = interrupted(tmp_path/"run"), tmp_path/"other"
        before = tree(tmp_path)
        yield
        assert tree(tmp_path) == before

    @pytest.fixture(autouse=True)
    def no_training(self, untouched, monkeypatch):
        for kind in (SupervisedMethod, PseudoLabelMethod, HPLMethod):
            monkeypatch.setattr(kind, "training_step", lambda *_: pytest.fail("it trained"))

    def refused(self, match, folder=None, **arguments):
        with pytest.raises(HplError, match=match): train(folder=folder or self.other, **arguments)

    def test_fewer_labelled_rows_than_a_batch(self):
        few = synthetic(200, dimensions=3, label_ratio=.04) # 6 labelled rows
        self.refused("6 labelled rows are fewer than the 8 .* raise label_ratio or lower labelled_batch", data=few, name="PseudoLabel")

    def test_too_few_rows_for_an_outer_batch_of_its_own(self):
        few = synthetic(200, dimensions=3, label_ratio=.08) # 13: enough for the inner batch, not for both
        self.refused("13 labelled rows are fewer than the 16 .* outer batch", data=few)

    def test_no_unlabelled_rows(self):
        data = vectors()
        data = replace(data, unlabelled=data.unlabelled[:0])
        for name in ("PseudoLabel", "HPL paper"): self.refused("unlabelled set is empty; use the method `Supervised`", data=data, name=name)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("split", ["labelled", "val", "test"])
    def test_label_that_is_no_number(self, split, value):
        data = vectors()
        targets = data.targets.copy()
        targets[data.rows(split)[3]] = value
        with pytest.raises(HplError, match=f"label of {split} row {data.rows(split)[3]} .*{value}"): replace(data, targets=targets)

    def test_label_that_is_text(self):
        with pytest.raises(HplError, match="row 1"):
            SemiSupervisedData("text", torch.zeros(3, 1), ["4", "four", "5"], [0, 1], [2], [], [])

    @pytest.mark.parametrize("change, match", [
        ({"seed": 1}, "seed is 0 there and 1 here"), ({"name": "PseudoLabel"}, "method is 'HPL .paper.' there"),
        ({"regressor": partial(mlp, 3, (17,), dropout=.2)}, "parameters"), ({"regressor": partial(mlp, 3, (16,), dropout=.3)}, "network"),
        ({"settings": replace(SMALL, epochs=2)}, "train.epochs is 3 there and 2 here .a run goes on for more")],
        ids=["seed", "method", "width", "dropout", "epochs"])
    def test_folder_of_another_run(self, change, match):
        self.refused(match, folder=self.folder, **change)

    def test_every_key_that_differs_is_named(self):
        self.refused("seed is 0 there and 1 here; train.accumulate is 1 there and 2 here", folder=self.folder, seed=1,
                     settings=replace(SMALL, accumulate=2))

    def test_other_labelled_rows(self):
        data = vectors()
        self.refused("rows_digest", folder=self.folder, data=replace(data, labelled=data.unlabelled[:40], unlabelled=data.labelled))

    @pytest.mark.parametrize("name, value, match", [("accumulate", 3, "which does not divide the labelled batch of 8"),
                                                    ("precision", "fp16", "which the cpu does not have")])
    def test_settings_that_cannot_work(self, name, value, match):
        self.refused(f"{name} is '?{value}'?, {match}", settings=replace(SMALL, **{name: value}))

    def test_snapshots_without_a_folder(self):
        with pytest.raises(HplError, match="record_every .* give a folder"): train(settings=replace(SMALL, record_every=2))

    @pytest.mark.parametrize("name, value", [("epochs", 0), ("accumulate", 0), ("patience", 0), ("iterations_per_epoch", 0),
                                             ("precision", "half"), ("epoch_of", "labeled"), ("record_every", -1)])
    def test_setting_out_of_range(self, name, value):
        with pytest.raises(HplError, match=name): Train(**{name: value})

    @pytest.mark.parametrize("name", ["labelled_batch", "unlabelled_batch", "outer_batch", "labelled_copies"])
    def test_batch_of_no_rows(self, name):
        with pytest.raises(HplError, match=name): train(settings=replace(SMALL, streams=StreamSettings(**{name: 0})), folder=self.other)

    def test_true_labels_needed(self):
        data = vectors()
        targets = data.targets.copy()
        targets[data.unlabelled[0]] = float("nan")
        with pytest.raises(HplError, match="fully supervised training needs the true labels"):
            fit(FullySupervised().build(dense()), replace(data, targets=targets), SMALL, folder=self.other, progress=False)


class TestDamage:
    "A damaged or foreign file is named and refused, or makes no difference; it is never taken for good."

    @pytest.mark.parametrize("here, there", [
        *[({"name": "PseudoLabel"}, {"name": other}) for other in ("Supervised", "HPL release", "HPL previous")],
        ({}, {"regressor": partial(mlp, 3, (8,))}), ({}, {"seed": 1})])
    def test_checkpoint_of_another_run(self, here, there, tmp_path):
        interrupted(tmp_path/"a", **here)
        interrupted(tmp_path/"b", **there)
        shutil.copy(RunFolder(tmp_path/"b").checkpoint, RunFolder(tmp_path/"a").checkpoint)
        with pytest.raises(HplError, match="last.pt"): train(folder=tmp_path/"a", **here)

    def test_truncated_checkpoint(self, tmp_path):
        path = RunFolder(interrupted(tmp_path)).checkpoint
        whole = path.read_bytes()
        for size in [0, 1, 100, *np.linspace(200, len(whole) - 1, 20).astype(int)]:
            path.write_bytes(whole[:size])
            with pytest.raises(HplError, match="last.pt .*damaged"): read_checkpoint(path)
        RunFolder(tmp_path).previous.unlink() # with it the run goes on from there: test_faults.py
        with pytest.raises(HplError, match="damaged"): train(folder=tmp_path)

    def test_flipped_bits(self, tmp_path):
        "Wherever one byte of the file changes: an error, or the same content."
        path = RunFolder(interrupted(tmp_path)).checkpoint
        whole, content, refused = path.read_bytes(), read_checkpoint(path), 0
        for place in np.random.default_rng(0).integers(len(whole), size=150):
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            path.write_bytes(damaged)
            try: assert not differences(read_checkpoint(path), content), place
            except HplError: refused += 1
        assert refused > 30

    def test_member_that_is_marked_as_a_folder(self, tmp_path):
        "One bit in the archive's table of contents, and PyTorch would fill a tensor with whatever is in memory."
        path = RunFolder(interrupted(tmp_path)).checkpoint
        damaged = bytearray(path.read_bytes())
        damaged[damaged.index(b"archive/data/3", damaged.index(b"PK\x01\x02")) - 46 + 38] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(HplError, match="marked as a folder"): read_checkpoint(path)

    @pytest.mark.parametrize("stop_after", [7, None])
    def test_config_of_an_earlier_version(self, stop_after, tmp_path):
        "The run is refused where it would go on and, when it is finished, where it is read; nothing changes."
        train(folder=tmp_path, stop_after=stop_after)
        config = RunFolder(tmp_path).read_json("config.json")
        assert config.pop("format") == 2
        RunFolder(tmp_path).write_json("config.json", config)
        (tmp_path/"checksums.json").unlink(missing_ok=True)
        before, says = tree(tmp_path), "config.json was written by an earlier version; `hpl_store --convert"
        for read in [lambda: train(folder=tmp_path), *([] if stop_after else [lambda: load_run(tmp_path)])]:
            with pytest.raises(HplError, match=re.escape(says)): read()
        assert tree(tmp_path) == before

    def test_checkpoint_holds_plain_content_only(self, tmp_path):
        "Of every method, and the selected epoch's: nothing is unpickled but tensors and plain values."
        for name in METHODS:
            train(name, settings=replace(SMALL, record_every=1), folder=tmp_path/name)
            for file in ("last.pt", "best.pt"):
                content = torch.load(tmp_path/name/"checkpoints"/file, weights_only=True)
                assert plain(content), (name, file)


def plain(value):
    "Is it made of tensors, numbers, strings, lists and dictionaries only?"
    if isinstance(value, dict): return all(plain(v) for pair in value.items() for v in pair)
    if isinstance(value, (list, tuple)): return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


def full_after(calls, function):
    "A function of the operating system that works so many times, and then finds no room."
    made = []
    def call(*args):
        made.append(args)
        if len(made) > calls: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args)
    return call


class TestFailedWrites:
    "Nothing that was there is lost, nothing half-written stays, and the same call goes on once there is room."

    def goes_on(self, folder):
        "The run resumes and ends as one that was never disturbed."
        (resumed, method), (whole, other) = train(folder=folder), train()
        assert not differences(resumed.predictions, whole.predictions)
        assert not differences(dict(method.state_dict()), dict(other.state_dict()))

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_full_disk(self, call, tmp_path, monkeypatch):
        "At each write in turn: the files are those of before, but for the ones that were whole."
        folder, kept, writes = interrupted(tmp_path/"run"), [], 0
        shutil.copytree(folder, tmp_path/"first")
        while True:
            shutil.rmtree(folder)
            shutil.copytree(tmp_path/"first", folder)
            with monkeypatch.context() as patch:
                patch.setattr(os, call, full_after(writes, getattr(os, call)))
                try: train(folder=folder, checkpoint_seconds=0)
                except HplError as error: assert "could not write" in str(error) and "No space left" in str(error)
                else: break
            kept.append(tree(folder))
            assert not [name for name in kept[-1] if Path(name).name.startswith(".")]
            if writes % 5 == 0: self.goes_on(folder)
            writes += 1
        assert kept[0] == tree(tmp_path/"first") and writes == len(kept) >= 15

    def test_second_of_two_renames(self, tmp_path, monkeypatch):
        "What has got its other name has its own again."
        path, previous, replace_file = tmp_path/"last", tmp_path/"previous", os.replace
        path.write_text("old")
        def failing(source, target):
            if ".writing-" in str(source): raise OSError(errno.EIO, "Input/output error")
            replace_file(source, target)
        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(HplError, match="before is untouched"): atomic_write(path, lambda file: file.write(b"new"), previous)
        assert path.read_text() == "old" and not previous.exists()

    def test_file_that_cannot_grow(self, tmp_path):
        "The operating system itself refuses the bytes in the middle of a checkpoint."
        folder = interrupted(tmp_path/"run")
        before, limits = tree(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])) # a checkpoint has about 30,000
            with pytest.raises(HplError, match="could not write .*last.pt"): train(folder=folder, checkpoint_seconds=0)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert tree(folder) == before
        self.goes_on(folder)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_read_only_folder(self, tmp_path):
        folder = interrupted(tmp_path/"run")
        before = tree(folder)
        folders = [folder, folder/"checkpoints"]
        for path in folders: path.chmod(0o500)
        with pytest.raises(HplError, match="could not write"): train(folder=folder)
        for path in folders: path.chmod(0o700)
        assert tree(folder) == before
        self.goes_on(folder)

    def test_folder_that_is_a_file(self, tmp_path):
        (tmp_path/"run").write_text("mine")
        with pytest.raises(HplError, match="could not write"): train(folder=tmp_path/"run")
        assert (tmp_path/"run").read_text() == "mine"


class Diverging(SupervisedMethod):
    "Its loss is not a number from step 8 on."
    def training_step(self, batch):
        self.steps = getattr(self, "steps", 0) + 1
        losses = super().training_step(batch)
        return {name: loss*float("nan") if self.steps > 8 else loss for name, loss in losses.items()}


@pytest.mark.parametrize("seconds", [0., 1e9])
def test_loss_that_is_no_number(seconds, tmp_path):
    "Training stops, and the checkpoint that stays is one from before."
    with pytest.raises(HplError, match="training diverged.*the last checkpoint is kept"):
        fit(Diverging(dense()), vectors(), SMALL, folder=tmp_path, progress=False, checkpoint_seconds=seconds)
    content = read_checkpoint(RunFolder(tmp_path).checkpoint)
    assert all(value.isfinite().all() for value in content["method"].values())


@pytest.mark.parametrize("step", [8, 10])
@pytest.mark.parametrize("seconds", [0., 1e9])
def test_diverged_weights_are_not_kept(step, seconds, tmp_path):
    "A finite loss whose step ruins the weights, in an epoch or at its end, where there is no validation set that would notice."
    class Ruined(SupervisedMethod):
        def after_step(self):
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == step: nn.init.constant_(self.regressor.head.weight, float("inf"))
    data = vectors()
    with pytest.raises(HplError, match="diverged"):
        fit(Ruined(dense()), replace(data, val=data.val[:0]), SMALL, folder=tmp_path, progress=False, checkpoint_seconds=seconds)
    for path in (RunFolder(tmp_path).checkpoint, RunFolder(tmp_path).best):
        assert all(value.isfinite().all() for value in read_checkpoint(path)["method"].values())


class TestSelection:
    "Early stopping and the selected epoch look at validation, and at nothing else."
    settings = replace(SMALL, epochs=30, patience=3, optimizer=OptimizerSettings(lr_body=.05, lr_head=.05))

    @pytest.mark.parametrize("folder", [True, False])
    def test_patience(self, folder, tmp_path):
        run, method = train("Supervised", settings=self.settings, folder=tmp_path if folder else None)
        best = run.log["val_mse"].idxmin() + 1
        assert len(run.log) == best + 3 < 30 and run.metrics["epoch"] == best
        assert set(run.predictions["epoch"]) == {best, best + 3}
        row = evaluate(run.predictions.query("epoch == @best and split == 'val'")).iloc[0]
        assert row["mse"] == pytest.approx(run.log["val_mse"].min(), rel=1e-6) and row["mse"] == pytest.approx(run.metrics["val_mse"])

    def test_weights_are_the_selected_epochs(self, tmp_path):
        run, method = train("Supervised", settings=self.settings, folder=tmp_path)
        best = read_checkpoint(RunFolder(tmp_path).best)
        assert best["epoch"] == run.metrics["epoch"] and not differences(dict(method.state_dict()), best["method"])
        assert not method.training # ready to predict: no dropout
        data, rows = vectors(), run.predictions.query("epoch == @best['epoch'] and split == 'test'")
        with torch.no_grad(): y = data.normalizer.denormalize(method.predict(data.inputs[data.test]).double())
        np.testing.assert_allclose(rows["y_pred"], y[:, 0], rtol=1e-6)

    def test_looks_at_validation_only(self):
        "Other labels of the test set and of the unlabelled rows stop at the same epoch; other labels of validation may not."
        data = vectors()
        epochs = [train("Supervised", replace(relabelled(data, rows), labelled=data.labelled), self.settings)[0].log[["epoch", "val_mse"]]
                  for rows in (data.test, data.unlabelled, data.val)]
        assert not differences(epochs[0], epochs[1]) and differences(epochs[0], epochs[2])

    def test_resuming_an_ended_run_changes_nothing(self, tmp_path):
        first, _ = train("Supervised", settings=self.settings, folder=tmp_path)
        kept = tree(tmp_path)
        again, _ = train("Supervised", settings=self.settings, folder=tmp_path)
        assert tree(tmp_path) == kept and not differences(first.predictions, again.predictions)
        assert not differences(load_run(tmp_path).metrics, first.metrics)

    def test_without_validation_the_last_epoch_is_selected(self):
        data = vectors()
        run, _ = train(data=replace(data, val=data.val[:0]), settings=replace(SMALL, patience=1))
        assert run.metrics["epoch"] == 3 and "val_mse" not in run.log


@pytest.mark.parametrize("name", ["Supervised", "PseudoLabel", "HPL paper", "HPL release", "HPL previous"])
def test_hidden_labels_never_influence_training(name, tmp_path):
    "Other true labels of unlabelled and test rows: the same bits everywhere. Of validation rows: the same last weights."
    data, last = vectors(), {}
    for which, rows in {"none": [], "unlabelled": data.unlabelled, "test": data.test, "val": data.val}.items():
        run, _ = train(name, relabelled(data, np.asarray(rows, dtype=np.int64)), folder=tmp_path/which)
        content = read_checkpoint(RunFolder(tmp_path/which).checkpoint)
        last[which] = [content["method"], content["optimizers"], run.predictions if which != "val" else None]
        last[which][2] = None if which == "val" else run.predictions.drop(columns="y_true")
    assert not differences(last["none"], last["unlabelled"]) and not differences(last["none"], last["test"])
    assert not differences(last["none"][:2], last["val"][:2])


def test_unknown_labels_of_unlabelled_rows():
    "NaN there is no error, and the numbers that need them are left out."
    data = vectors()
    targets = data.targets.copy()
    targets[data.unlabelled] = float("nan")
    run, _ = train(data=replace(data, targets=targets))
    known, _ = train(data=data)
    assert "pseudo_label_mae" in known.metrics and "pseudo_label_mae" not in run.metrics
    assert not differences(run.predictions["y_pred"].tolist(), known.predictions["y_pred"].tolist())


def test_snapshots(tmp_path):
    "`record_every=2` keeps epochs 2 and 4 of 5, with all rows, beside the selected and the last."
    run, _ = train(settings=replace(SMALL, epochs=5, record_every=2), folder=tmp_path)
    data, table = vectors(), run.predictions
    assert set(table["epoch"]) == {2, 4, 5, run.metrics["epoch"]}
    assert set(table.groupby("epoch").size()) == {len(data.targets)}
    assert not table.duplicated(["epoch", "index", "output"]).any()
    pd.testing.assert_frame_equal(load_run(tmp_path).predictions, table)


def test_table_says_what_each_row_is():
    data = vectors()
    table = train(data=data, settings=replace(SMALL, epochs=1))[0].predictions
    for split in ("labelled", "unlabelled", "val", "test"):
        rows = table[table["split"] == split]
        assert sorted(rows["index"]) == sorted(data.rows(split))
        np.testing.assert_array_equal(rows["y_true"], data.targets[rows["index"], 0])
        for column in ("pseudo_label", "strong_prediction", "log_variance"): assert rows[column].notna().all() == (split == "unlabelled")


@pytest.mark.parametrize("name", METHODS)
def test_two_outputs(name):
    "Two rows for each sample, in each output's units, and metrics that treat the outputs apart."
    data = vectors(outputs=2)
    data = replace(data, targets=data.targets*[1, 100], normalizer=None)
    run, _ = train(name, data, replace(SMALL, epochs=40), regressor=partial(mlp, 3, (16,), 2, dropout=.01))
    table = run.predictions[run.predictions["epoch"] == run.metrics["epoch"]]
    assert (table.groupby("index").size() == 2).all() and set(table["output"]) == {0, 1}
    scores = evaluate(table[table["split"] == "test"])
    assert run.metrics["test_r2"] == pytest.approx(scores["r2"].mean()) and (scores["r2"] > .5).all()
    assert run.metrics["test_mae"] == pytest.approx(scores["mae"].mean())
    assert run.log["val_r2"].iloc[run.metrics["epoch"] - 1] == pytest.approx(evaluate(table[table["split"] == "val"])["r2"].mean())


def test_same_seed_same_bits():
    "The seed decides everything, in memory or in a folder; another seed gives other weights and other batches."
    (first, a), (second, b), (third, c) = (train(seed=seed) for seed in (0, 0, 1))
    assert not differences(dict(a.state_dict()), dict(b.state_dict())) and not differences(first.predictions, second.predictions)
    assert differences(dict(a.state_dict()), dict(c.state_dict()))


def test_state_of_the_world_does_not_matter():
    "Numbers drawn between building a method and training it change nothing."
    _, expected = train()
    method = make("HPL paper", 0, dense)
    torch.rand(5), np.random.rand(5)
    fit(method, vectors(), SMALL, progress=False)
    assert not differences(dict(expected.state_dict()), dict(method.state_dict()))


def test_workers_make_no_difference(tmp_path):
    "None or two, also with augmentations that draw from torch's generator, also when stopped and resumed."
    noisy = PerSample(lambda x: x + .1*torch.randn(x.shape))
    data = replace(vectors(), weak=noisy, strong=noisy)
    (alone, a), (helped, b) = (train(data=data, workers=workers) for workers in (0, 2))
    train(data=data, workers=2, folder=tmp_path, stop_after=7)
    resumed, c = train(data=data, workers=0, folder=tmp_path)
    for run, method in ((helped, b), (resumed, c)):
        assert not differences(dict(a.state_dict()), dict(method.state_dict())) and not differences(alone.predictions, run.predictions)


class TestPrecision:
    def test_bf16(self):
        "The body computes in bfloat16; parameters, head, learner and everything written are float32, and close to a float32 run."
        seen = set()
        def build():
            regressor = mlp(3, (16,))
            regressor.body.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
            return regressor
        data, settings = vectors(), replace(SMALL, epochs=8)
        full, method = train(data=data, settings=settings, regressor=build)
        assert seen == {torch.float32} and all(p.dtype == torch.float32 for p in method.parameters())
        seen.clear()
        half, method = train(data=data, settings=replace(settings, precision="bf16"), regressor=build)
        assert seen == {torch.bfloat16} and all(p.dtype == torch.float32 for p in method.parameters())
        assert {value.dtype for value in method.record.values() if value.is_floating_point()} == {torch.float32}
        assert np.isfinite(half.predictions["y_pred"]).all()
        spread = full.predictions["y_pred"].std()
        assert 0 < (full.predictions["y_pred"] - half.predictions["y_pred"]).abs().mean() < .05*spread
        seen.clear()
        again, _ = train(data=data, settings=settings, regressor=build) # and back, in one process
        assert seen == {torch.float32} and not differences(full.predictions, again.predictions)

    @pytest.mark.parametrize("name", METHODS)
    def test_bf16_of_every_method(self, name, tmp_path):
        "What is learned and recorded stays float32; the numbers are others; stopped and resumed, they are the same."
        settings = replace(SMALL, precision="bf16")
        run, method = train(name, settings=settings)
        train(name, settings=settings, folder=tmp_path, stop_after=7)
        resumed, again = train(name, settings=settings, folder=tmp_path)
        assert not differences(run.predictions, resumed.predictions)
        assert not differences(dict(method.state_dict()), dict(again.state_dict()))
        learned = [*method.parameters(), *(value for value in method.record.values() if value.is_floating_point())]
        assert {value.dtype for value in learned} == {torch.float32} and np.isfinite(run.predictions["y_pred"]).all()
        assert differences(run.predictions, train(name)[0].predictions)


def test_micro_batches_of_a_supervised_step():
    "Two halves of a batch give the step of the whole, for every loss that is a mean over samples."
    for name in ("Supervised", "PseudoLabel", "JointUncertainty"):
        whole, parts = (train(name, settings=replace(SMALL, accumulate=k), regressor=partial(mlp, 3, (16,)))[1] for k in (1, 2))
        for a, b in zip(whole.parameters(), parts.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_experiment_is_kept_and_decides_nothing(tmp_path):
    "It also says where files are, so that a run goes on where they are elsewhere."
    train(folder=tmp_path, stop_after=7, experiment={"kind": "Experiment", "root": "here"})
    run, _ = train(folder=tmp_path, experiment={"kind": "Experiment", "root": "there"})
    assert run.finished and load_run(tmp_path).config["experiment"]["root"] == "here"
    assert "experiment" not in train()[0].config


class Tracker(GeneralTracker):
    "Remembers what it is told."
    name, requires_logging_directory = "memory", False
    def __init__(self):
        super().__init__()
        self.config, self.rows, self.ended = None, [], False

    @property
    def tracker(self): return self
    def start(self): pass
    def store_init_configuration(self, values): self.config = values
    def log(self, values, step=None, **_): self.rows.append((step, values))
    def finish(self): self.ended = True


def test_tracker_receives_the_log(tmp_path):
    "Each epoch once, although the run was stopped and resumed, with what the log has; and the configuration."
    trackers = [Tracker(), Tracker()]
    train(trackers=[trackers[0]], folder=tmp_path, stop_after=7)
    run, _ = train(trackers=[trackers[1]], folder=tmp_path)
    told = [row for tracker in trackers for row in tracker.rows]
    assert [step for step, _ in told] == [1, 2, 3]
    for (_, values), row in zip(told, run.log.drop(columns="seconds").to_dict("records")): assert values == row
    assert all(tracker.ended and tracker.config["method"] == "HPL (paper)" for tracker in trackers)


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_tensorboard(tmp_path):
    "Writes its events where it is installed, and is asked for in vain where it is not."
    if importlib.util.find_spec("tensorboard"):
        train(trackers=["tensorboard"], folder=tmp_path)
        assert list(tmp_path.rglob("events.out.tfevents.*"))
    else:
        with pytest.raises(HplError, match="tensorboard"): train(trackers=["tensorboard"], folder=tmp_path)
        assert not tree(tmp_path)


def test_unknown_tracker():
    with pytest.raises(HplError, match="abacus"): train(trackers=["abacus"])


def test_labels_of_one_value():
    "A constant label is learned, not divided by zero."
    data = vectors()
    run, _ = train("Supervised", replace(data, targets=np.full_like(data.targets, 7), normalizer=None))
    assert np.isfinite(run.predictions["y_pred"]).all()


# ---- the live view's Stop

@pytest.mark.parametrize("step", [2, 5, 13])
def test_stop_without_a_folder_keeps_the_best_epoch_so_far(step):
    "The weights, predictions and errors of the best of the epochs before the stop, and their curves; nothing before the first has ended."
    import asyncio

    from hpl_nb.live import LiveView, fit_live
    from hpl_nb.predictor import Predictor
    class Pressed(LiveView):
        def __call__(self, progress):
            if progress.step == step: self.stop()
            return super().__call__(progress)
    data, method, view = vectors(), make("HPL paper", 0, dense), Pressed(every=0)
    kept, ended = asyncio.run(fit_live(method, data, SMALL, view)), step//5
    whole, _ = train()
    said = view.words.value
    view.close()
    assert not kept.finished and len(kept.log) == ended and ("no epoch has ended" in said) == (ended == 0)
    if not ended: return
    pd.testing.assert_frame_equal(kept.log.drop(columns="seconds"), whole.log.head(ended).drop(columns="seconds"))
    best = whole.log["val_mse"].head(ended).argmin() + 1
    assert kept.metrics["epoch"] == best and f"epoch {best} of {ended} selected" in said and "begins anew" in said
    rows = kept.predictions[kept.predictions["split"] == "test"].set_index("index").loc[data.test, "y_pred"]
    np.testing.assert_allclose(Predictor.from_method(method, data).predict(data.inputs[data.test]), rows, rtol=1e-5)
    assert kept.metrics["test_mae"] == pytest.approx(np.abs(rows.to_numpy() - data.targets[data.test, 0]).mean())
