"""Whatever goes wrong - a disk, a bit, another process, a sample, a clock - a run goes on with the same bits, or says what to do.

SIGKILL at any moment is in test_resume.py; full disks at each system call and diverged weights are in test_trainer.py.
"""
import builtins
import errno
import os
import random
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import active_children
from pathlib import Path

import psutil
import pytest
import torch
from small_runs import METHODS, differences, forked, make, on_cpu, tree, vectors  # noqa: F401

import hpl_nb.core
from hpl_nb.core import HplError, RunFolder
from hpl_nb.data.core import StreamSettings
from hpl_nb.data.rotated_digits import RotatedDigits
from hpl_nb.experiment import Experiment, run_path
from hpl_nb.methods.core import Supervised
from hpl_nb.models import mlp
from hpl_nb.runner import run_all
from hpl_nb.training.checkpoint import read_checkpoint
from hpl_nb.training.guard import Flags
from hpl_nb.training.loop import fit
from hpl_nb.training.run import load_run, lock_path, run_lock
from hpl_nb.training.state import OptimizerSettings, Train

SMALL = Train(epochs=3, iterations_per_epoch=5, streams=StreamSettings(8, 8), optimizer=OptimizerSettings(1e-2, 1e-2),
                      record_every=1)
STEPS = SMALL.epochs*SMALL.iterations_per_epoch
dense = partial(mlp, 3, (16,), dropout=.2)


def train(name="HPL paper", folder=None, data=None, settings=SMALL, **arguments):
    "What a run ends with: weights, log and results, without times."
    method = make(name, 0, dense)
    if folder is None: settings = replace(settings, record_every=0)
    run = fit(method, data or named(), settings, folder=folder, progress=False, **arguments)
    return {"weights": dict(method.state_dict()), **results(run)}


def results(run):
    "What a run left, without times."
    last = run.predictions[run.predictions["epoch"].isin([SMALL.epochs, run.metrics.get("epoch")])]
    return {"log": run.log.drop(columns="seconds", errors="ignore"), "predictions": last,
            "metrics": {name: value for name, value in run.metrics.items() if name != "seconds"}}


def named():
    "Vectors whose samples have names."
    data = vectors()
    return replace(data, sample_names=[f"sample-{row}" for row in range(len(data.targets))])


@lru_cache
def whole(name="HPL paper"): return train(name)


def same(end, name="HPL paper"): return not differences({**end, **_no_index(end)}, {**whole(name), **_no_index(whole(name))})
def _no_index(end): return {"predictions": end["predictions"].reset_index(drop=True)}


def finite(folder):
    "Are all weights in a run's checkpoints numbers?"
    paths = [path for path in (folder.checkpoint, folder.previous, folder.best) if path.exists()]
    values = [pair for path in paths for pair in read_checkpoint(path)["method"].items()]
    return all(value.isfinite().all() or name.endswith("_bound") for name, value in values if isinstance(value, torch.Tensor))


# ---- other processes: they are forked from a process that has imported everything

@pytest.fixture(scope="module")
def start():
    "Starts a function of this module in a process of its own."
    with forked(__name__) as context:
        started = []
        def start(function, *args):
            started.append(process := context.Process(target=function, args=args))
            process.start()
            return process
        yield start
        for process in started: process.kill()


def stall(folder, ready, at=7, workers=0):
    "Train up to a step, say so, and wait to be killed."
    torch.set_num_threads(1)
    def watch(progress):
        if progress.step == at:
            ready.write_text(" ".join(str(child.pid) for child in active_children()))
            time.sleep(300)
    train(folder=folder, watch=watch, workers=workers)


def stalled(start, tmp_path, **arguments):
    "A run folder, and the process that trains in it, has come to its seventh step, and is alive."
    ready = tmp_path/"ready"
    process = start(partial(stall, **arguments), tmp_path/"run", ready)
    wait_for(ready.exists, process)
    return tmp_path/"run", process


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(.02)


class TestOneProcessAtATime:
    def test_second_process_is_refused_until_the_first_is_killed(self, start, tmp_path):
        folder, process = stalled(start, tmp_path)
        before = tree(folder)
        for _ in range(2):
            with pytest.raises(HplError, match=f"run is in use: process {process.pid} on .* Wait for it or stop it, and run the same"):
                train(folder=folder)
        with pytest.raises(HplError, match="not finished; continue it"): load_run(folder)
        assert tree(folder) == before and process.is_alive()
        process.kill()
        process.join()
        assert lock_path(RunFolder(folder)).exists() and same(train(folder=folder)) and not lock_path(RunFolder(folder)).exists()

    def test_a_killed_run_is_continued_while_its_loader_workers_still_live(self, start, tmp_path):
        folder, process = stalled(start, tmp_path, workers=2)
        children = [int(pid) for pid in (tmp_path/"ready").read_text().split()]
        for child in children: os.kill(child, signal.SIGSTOP) # so that they do not notice
        process.kill()
        process.join()
        try:
            assert len(children) == 2 and all(Path(f"/proc/{child}").exists() for child in children if Path("/proc").exists())
            assert same(train(folder=folder))
        finally:
            for child in children: os.kill(child, signal.SIGKILL)

    def test_within_one_process_and_after_it(self, tmp_path):
        "A thread, or a callback, is refused as well; the run that is there goes on, and resumes in the same process."
        refused = []
        def again():
            try: train(folder=tmp_path)
            except HplError as error: refused.append(str(error))
        def watch(progress):
            if progress.step == 7:
                thread = threading.Thread(target=again)
                thread.start(), thread.join(), again()
            return progress.step == 9
        train(folder=tmp_path, watch=watch)
        assert len(refused) == 2 and all(f"process {os.getpid()} on" in message for message in refused)
        ends = []
        thread = threading.Thread(target=lambda: ends.append(train(folder=tmp_path))) # as the live view does
        thread.start(), thread.join()
        assert same(ends[0]) and not lock_path(RunFolder(tmp_path)).exists()

    def test_released_when_training_fails(self, tmp_path):
        def fail(progress): raise KeyboardInterrupt
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt): train(folder=tmp_path, watch=fail)
            assert not lock_path(RunFolder(tmp_path)).exists()
        assert same(train(folder=tmp_path))

    @pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
    def test_file_systems_without_locks(self, code, tmp_path, monkeypatch):
        import fcntl
        def flock(*_): raise OSError(code, os.strerror(code))
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.warns(UserWarning, match="training.lock cannot be locked .*make sure that no other process trains"):
            assert same(train(folder=tmp_path))
        assert not lock_path(RunFolder(tmp_path)).exists()

    def test_the_lock_of_a_file_that_was_removed_is_none(self, tmp_path, monkeypatch):
        "A process that opened the file before its holder removed it tries again with a new one."
        import fcntl
        folder, seen = RunFolder(tmp_path), []
        def lock(file, operation, flock=fcntl.flock):
            seen.append(os.fstat(file).st_ino)
            if len(seen) == 1: lock_path(folder).unlink()
            flock(file, operation)
        monkeypatch.setattr(fcntl, "flock", lock)
        with run_lock(folder): assert lock_path(folder).stat().st_ino == seen[1] and len(seen) == 2
        assert not lock_path(folder).exists()

    def test_a_finished_run_is_read_while_it_is_held(self, tmp_path):
        end = train(folder=tmp_path)
        with run_lock(RunFolder(tmp_path)): assert not differences(results(load_run(tmp_path))["metrics"], end["metrics"])


# ---- damaged files

DAMAGES = {"empty": lambda content, draw: b"", "truncated": lambda content, draw: content[:draw.randrange(len(content))],
           "zero-filled": lambda content, draw: bytes(len(content)), "zeros at the end": lambda content, draw: zeros(content, draw),
           "flipped bit": lambda content, draw: flipped(content, draw), "text": lambda content, draw: b"<html>404</html>"}


def flipped(content, draw):
    content = bytearray(content)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def zeros(content, draw):
    "As after a power cut: the length is right, the last pages were never written."
    kept = draw.randrange(len(content))
    return content[:kept] + bytes(len(content) - kept)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    "A run that has stopped in its second epoch, and one that has ended; each test gets copies."
    top = tmp_path_factory.mktemp("templates")
    train(folder=top/"stopped", stop_after=8)
    train(folder=top/"ended")
    return top


def copied(templates, which, tmp_path):
    folder = tmp_path/"run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(templates/which, folder)
    return RunFolder(folder)


def outcome(call, file):
    "The end of a call, or None where it refuses with a sentence that names the file and says what to do."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: return call()
        except HplError as error:
            assert file in str(error) and re.search("estore|delete|nother folder", str(error)), error


@pytest.mark.filterwarnings("ignore:.*going on from the checkpoint before it")
class TestDamage:
    "Of every file of a run, in any way, at random places: refused by name, or the same bits; and what the message says helps."

    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("which", ["stopped", "ended"])
    def test_last_checkpoint(self, which, damage, templates, tmp_path):
        "The run goes on from the one before, which stays until there is a new one, and ends with the same bits."
        draw, folder = random.Random(f"{which} {damage}"), copied(templates, which, tmp_path)
        kept = folder.previous.read_bytes()
        folder.checkpoint.write_bytes(DAMAGES[damage](folder.checkpoint.read_bytes(), draw))
        if damage != "flipped bit": # which may be where no content is
            with pytest.warns(UserWarning, match="last.pt cannot be read .*going on from .*previous.pt, which is of step"):
                train(folder=folder.path, stop_after=1)
            assert folder.previous.read_bytes() == kept
            folder.checkpoint.write_bytes(DAMAGES[damage](folder.checkpoint.read_bytes(), draw)) # the new one is lost as well
        assert same(train(folder=folder.path)) and finite(folder)

    @pytest.mark.parametrize("which", ["stopped", "ended"])
    def test_killed_between_the_two_renames(self, which, templates, tmp_path):
        folder = copied(templates, which, tmp_path)
        os.replace(folder.checkpoint, folder.previous)
        assert same(train(folder=folder.path)) and folder.checkpoint.exists() == (which == "stopped") # an ended run writes no more

    def test_best_is_newer_than_the_checkpoint(self, templates, tmp_path):
        "Without the last checkpoint of an ended run, the one before is of an earlier epoch than best.pt."
        folder = copied(templates, "ended", tmp_path)
        os.remove(folder.checkpoint)
        assert read_checkpoint(folder.previous)["progress"]["step"] < STEPS
        assert same(train(folder=folder.path))

    def test_both_checkpoints(self, templates, tmp_path):
        folder = copied(templates, "stopped", tmp_path)
        for path in (folder.checkpoint, folder.previous): path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(HplError, match="last.pt cannot be read.* And: .*previous.pt cannot be read.*delete it"):
            train(folder=folder.path)
        for path in (folder.checkpoint, folder.previous): path.unlink()
        assert same(train(folder=folder.path)) # from the beginning, as the message says

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_best(self, damage, templates, tmp_path):
        draw, folder = random.Random(damage), copied(templates, "stopped", tmp_path)
        folder.best.write_bytes(DAMAGES[damage](folder.best.read_bytes(), draw))
        end = outcome(lambda: train(folder=folder.path), "best.pt")
        if end is None: # what it says
            shutil.rmtree(folder.best.parent)
            end = train(folder=folder.path)
        assert same(end)

    def test_files_in_each_others_place(self, templates, tmp_path):
        for source, target in (("best", "checkpoint"), ("checkpoint", "best")):
            folder = copied(templates, "stopped", tmp_path)
            shutil.copy(getattr(folder, source), getattr(folder, target))
            end = outcome(lambda: train(folder=folder.path), getattr(folder, target).name)
            assert end is None or same(end)

    @pytest.mark.parametrize("name", ["config.json", "log.csv", "metrics.json", "predictions.parquet", "environment.json",
                                      "checksums.json"])
    def test_results(self, name, templates, tmp_path):
        "They are read as they were written or not at all; the command that began the run writes them again."
        draw, end, refused = random.Random(name), results(load_run(templates/"ended")), 0
        for damage in [*DAMAGES, *["flipped bit"]*20, *["truncated"]*5]:
            folder = copied(templates, "ended", tmp_path)
            path = folder.path/name
            path.write_bytes(DAMAGES[damage](path.read_bytes(), draw))
            found = outcome(lambda: results(load_run(folder.path)), name if name != "checksums.json" else str(folder.path))
            if found is not None:
                assert not differences(found, end), damage
                continue
            refused += 1
            if refused % 4 == 1: # what the message says
                for path in (path, folder.metrics): path.unlink(missing_ok=True)
                assert same(train(folder=folder.path)) and not differences(results(load_run(folder.path)), end)
        assert refused > (3 if name == "environment.json" else 25)

    def test_results_are_written_once(self, templates, tmp_path):
        "The same command reads a finished run's results: a kill in it can leave nothing half new; what is damaged is written again."
        folder = copied(templates, "ended", tmp_path)
        written = ("metrics.json", "predictions.parquet", "log.csv", "checksums.json", "environment.json")
        inodes = {name: (folder.path/name).stat().st_ino for name in written}
        assert same(train(folder=folder.path))
        assert {name: (folder.path/name).stat().st_ino for name in written} == inodes
        folder.predictions.write_bytes(b"PAR1")
        assert same(train(folder=folder.path)) and not differences(results(load_run(folder.path)), results(load_run(templates/"ended")))
        assert (folder.path/"metrics.json").stat().st_ino != inodes["metrics.json"]

    @pytest.mark.parametrize("name", ["config.json", "log.csv", "predictions/epoch-0001.parquet"])
    def test_files_of_a_run_that_goes_on(self, name, templates, tmp_path):
        draw = random.Random(name)
        for damage in [*DAMAGES, "flipped bit", "flipped bit"]:
            folder = copied(templates, "stopped", tmp_path)
            path = folder.path/name
            path.write_bytes(DAMAGES[damage](path.read_bytes(), draw))
            end = outcome(lambda: train(folder=folder.path), path.name)
            assert end is None and name != "log.csv" or same(end)
            if end is None and name == "config.json":
                path.unlink()
                assert same(train(folder=folder.path)) # the checkpoint knows what the run is


# ---- disks that take no more

class FullFile:
    "A file on a full disk."
    def __init__(self, file, disk): self.file, self.disk = file, disk
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, content): return self.disk.write(self.file.write, content)


class FullDisk:
    "`open` for writing on a disk with so many bytes left; a write that does not fit is cut short."
    def __init__(self, left): self.left = left

    def __call__(self, path, mode="r", *args, **kwargs):
        file = builtins.open(path, mode, *args, **kwargs)
        return FullFile(file, self) if "w" in mode else file

    def write(self, write, content):
        content = memoryview(content).cast("B")
        written, self.left = write(content[:self.left]), max(0, self.left - len(content))
        if written < len(content): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written


class TestDisk:
    def test_full_at_a_random_byte(self, tmp_path, monkeypatch):
        "The error names the file; what is there is whole; with room again the same call ends with the same bits."
        draw, folder = random.Random(0), RunFolder(tmp_path/"run")
        for left in sorted(draw.randrange(900_000) for _ in range(6)):
            shutil.rmtree(folder.path, ignore_errors=True)
            with monkeypatch.context() as patch:
                patch.setattr(hpl_nb.core, "open", FullDisk(left), raising=False)
                try: train(folder=folder.path, checkpoint_seconds=0)
                except HplError as error: assert re.search("could not write .*run.*: No space left on device.*make room", str(error))
            assert not list(folder.path.rglob(".writing-*")) and not lock_path(folder).exists()
            assert same(train(folder=folder.path))

    @pytest.mark.parametrize("which", ["stopped", "ended"])
    def test_read_only_folder(self, which, templates):
        "As an account that may read and not write: training is refused, a finished run is read; nothing changes."
        with tempfile.TemporaryDirectory() as top:
            os.chmod(top, 0o755)
            folder = copied(templates, which, Path(top))
            before, root = tree(folder.path), os.geteuid() == 0
            for path in (folder.path, folder.path/"checkpoints", folder.path/"predictions"): path.chmod(0o555)
            if root: os.seteuid(65534)
            try:
                with pytest.raises(HplError, match="could not write .*run.*Permission denied.*choose a folder that you may write to"):
                    train(folder=folder.path)
                if which == "ended": assert load_run(folder.path).finished
            finally:
                if root: os.seteuid(0)
            for path in (folder.path, folder.path/"checkpoints", folder.path/"predictions"): path.chmod(0o755)
            assert tree(folder.path) == before and same(train(folder=folder.path))

    def test_read_only_file_system(self, templates, tmp_path, monkeypatch):
        folder = copied(templates, "stopped", tmp_path)
        before = tree(folder.path)
        def refuse(path, *args, **kwargs): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        with monkeypatch.context() as patch:
            patch.setattr(hpl_nb.core, "open", refuse, raising=False)
            patch.setattr(os, "open", refuse)
            with pytest.raises(HplError, match="could not write .*Read-only file system"): train(folder=folder.path)
        assert tree(folder.path) == before

    def test_becomes_read_only_while_training(self, tmp_path, monkeypatch):
        def watch(progress):
            if progress.step == 7:
                def refuse(*_, **__): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                monkeypatch.setattr(os, "mkdir", refuse)
        with pytest.raises(HplError, match="could not write .*Read-only file system"):
            train(folder=tmp_path, watch=watch, checkpoint_seconds=0)
        monkeypatch.undo()
        assert same(train(folder=tmp_path))


# ---- numbers that are none

def broken(row, value, split="labelled"):
    "The data, with one input of one row replaced."
    data = named()
    inputs = data.inputs.clone()
    inputs[data.rows(split)[row], 1] = value
    return replace(data, inputs=inputs), int(data.rows(split)[row])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_sample_that_holds_no_number(name, accumulate, tmp_path):
    "Every method stops at the step that meets it, names it, keeps what was good; repaired, the same call ends with the same bits."
    settings, value = replace(SMALL, accumulate=accumulate), float("nan" if accumulate == 1 or name == "TNNR" else "inf")
    data, row = broken(5, value)
    folder = RunFolder(tmp_path)
    with pytest.raises(HplError) as error: train(name, tmp_path, data, settings, checkpoint_seconds=0)
    message = str(error.value)
    if name not in ("SSDKL", "TNNR"): # which keep rows from the beginning, as inducing points and as anchors
        assert re.search(rf"step \d+.*: (labelled|outer) row {row} \(sample-{row}\), whose weak view holds NaN or infinity. Re", message)
        assert re.search(r"Samples of that step: labelled rows \d+ \(sample-\d+\), ", message)
    assert re.search(rf"row {row} \(sample-{row}\), whose (weak view|input) holds NaN or infinity. Repair the data and run", message)
    assert "the last checkpoint is kept (step" in message or not folder.checkpoint.exists()
    assert finite(folder)
    step = int(re.search(r"step (\d+)", message)[1])
    assert not folder.checkpoint.exists() or read_checkpoint(folder.checkpoint)["progress"]["step"] == step - 1
    if accumulate == 1: assert same(train(name, tmp_path), name)


@pytest.mark.parametrize("name", METHODS)
def test_learning_rate_that_is_too_high(name, tmp_path):
    settings = replace(SMALL, optimizer=OptimizerSettings(1e25, 1e25))
    with pytest.raises(HplError, match="diverged") as error: train(name, tmp_path, None, settings, checkpoint_seconds=0)
    assert finite(RunFolder(tmp_path)), error


class TestNumbers:
    def test_a_view_that_makes_infinity_of_one_sample(self, tmp_path):
        "Only the strong view of an unlabelled sample; the weak one is fine."
        data, row = broken(9, 1e30, "unlabelled")
        data = replace(data, strong=lambda samples, seeds: torch.where(samples.abs() > 1e29, samples*1e30, samples))
        data = replace(data, weak=lambda samples, seeds: samples.clamp(-3, 3), plain=lambda samples, seeds: samples.clamp(-3, 3))
        with pytest.raises(HplError, match=rf"unlabelled row {row} \(sample-{row}\), whose strong view holds NaN or infinity"):
            train("PseudoLabel", tmp_path, data)

    def test_a_sample_whose_loss_alone_is_infinite(self, tmp_path):
        "Its input is a number, but so large that the square of its error is none."
        data, row = broken(5, 1e30)
        with pytest.raises(HplError, match=rf"labelled row {row} \(sample-{row}\), whose loss on the weak view is infinite"):
            train("Supervised", tmp_path, data)

    @pytest.mark.parametrize("split", ["val", "test", "unlabelled"])
    def test_a_sample_that_is_only_predicted(self, split, tmp_path):
        data, row = broken(3, float("nan"), split)
        message = rf"predictions of rows {row} \(sample-{row}\) are NaN or infinite: row {row} .* whose input holds"
        with pytest.raises(HplError, match=message):
            train("Supervised", tmp_path, data)
        assert not RunFolder(tmp_path).metrics.exists() and same(train("Supervised", tmp_path), "Supervised")

    @pytest.mark.parametrize("value", [float("nan"), 1e30])
    @pytest.mark.parametrize("seconds", [0., 1e9])
    def test_flags_that_arrive_a_step_later(self, seconds, value, tmp_path, monkeypatch):
        "As on a GPU: the step after may be trained, but nothing of it is written, and the step and the samples are the same."
        class Copied:
            def synchronize(self): pass
        def start(step, names, flags): return Flags(step, list(names), flags.clone(), Copied())
        data, row = broken(5, value)
        with pytest.raises(HplError) as now: train("Supervised", tmp_path/"now", data, checkpoint_seconds=seconds)
        monkeypatch.setattr(Flags, "start", start)
        seen = []
        arguments = {"checkpoint_seconds": seconds, "watch": lambda progress: seen.append(progress.step)}
        with pytest.raises(HplError) as later: train("Supervised", tmp_path/"later", data, **arguments)
        step = int(re.search(r"at step (\d+)", str(now.value))[1])
        assert f"at step {step}:" in str(later.value) and finite(RunFolder(tmp_path/"later"))
        if value != value: assert str(now.value).split(". Repair")[0] == str(later.value).split(". Repair")[0]
        assert max(seen, default=0) in ((step - 1,) if seconds == 0 or step % 5 == 0 else (step,))


# ---- other processes that end, and clocks that do not tell the time

class TestWorkers:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_killed_worker(self, workers, tmp_path):
        others = {child.pid for child in active_children()} # of the tests before
        def watch(progress):
            if progress.step == 6: os.kill(min({child.pid for child in active_children()} - others), signal.SIGKILL)
        with pytest.raises(HplError, match=f"prepares batches has ended .*fewer than {workers} workers or smaller batches, and run"):
            train(folder=tmp_path, workers=workers, watch=watch)
        assert not lock_path(RunFolder(tmp_path)).exists() and same(train(folder=tmp_path))


@pytest.mark.parametrize("jump", [-86_400., -1e9])
def test_clock_set_back(jump, tmp_path, monkeypatch):
    "Each look at the wall clock shows an earlier time: checkpoints are written as before, and no time is negative."
    now, written, replace_file = [time.time()], [], os.replace
    def wall():
        now[0] += jump
        return now[0]
    monkeypatch.setattr(time, "time", wall)
    monkeypatch.setattr(os, "replace", lambda *paths: (written.append(Path(paths[1]).name), replace_file(*paths))[1])
    train(folder=tmp_path, checkpoint_seconds=0, stop_after=7)
    assert written.count("last.pt") == 8 # after each step, and when it stopped
    assert same(train(folder=tmp_path, checkpoint_seconds=0))
    seconds = load_run(tmp_path).log["seconds"]
    assert (seconds.diff().dropna() >= 0).all() and (seconds >= 0).all()


# ---- a command whose workers train

LONG = [Experiment(RotatedDigits(), Supervised(), train=Train(epochs=10_000), seed=seed) for seed in range(2)]

def many_runs(out):
    "Two runs that take minutes, side by side."
    run_all(LONG, out, 2, progress=False)


def test_workers_end_with_the_command_that_began_them(start, tmp_path):
    "Otherwise they would hold the folders of the same command, started again."
    process = start(many_runs, tmp_path)
    folders = [run_path(experiment, tmp_path) for experiment in LONG]
    wait_for(lambda: all((folder/"log.csv").exists() for folder in folders), process)
    workers = [psutil.Process(int(lock_path(RunFolder(folder)).read_text().split()[1])) for folder in folders] # "process 123 on ..."
    assert process.pid not in {worker.pid for worker in workers}
    process.kill()
    process.join()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    for folder in folders:
        with run_lock(RunFolder(folder)): pass


# ---- two processes

def rank_main(rank, port, job, out):
    "One of two processes; its end, or the error it stopped with, goes to a file."
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.pop("ACCELERATE_USE_CPU", None) # torchrun sets none
    try: end = job(rank)
    except Exception as error: end = f"{type(error).__name__}: {error}"
    torch.save(end, out/f"{rank}.pt")


def kill_at(step, victim, folder, rank):
    def watch(progress):
        if (progress.step, rank) == (step, victim): os.kill(os.getpid(), signal.SIGKILL)
    return train(folder=folder, settings=PAIRS, watch=watch, checkpoint_seconds=0)


def no_numbers(folder, rank):
    "Every method with a broken sample and with a learning rate that explodes: the messages."
    said = {}
    for name in METHODS:
        for what, (data, rate) in {"sample": (broken(5, float("nan"))[0], 1e-2), "rate": (named(), 1e25)}.items():
            try: said[name, what] = train(name, folder/f"{name}-{what}", data, replace(PAIRS, optimizer=OptimizerSettings(rate, rate)))
            except HplError as error: said[name, what] = str(error)
    return said


PAIRS = replace(SMALL, streams=StreamSettings(16, 16))


class TestTwoProcesses:
    "Started as torchrun starts them, without its agent: the one that is left has to stop by itself."

    def run(self, start, job, out):
        "What both processes ended with; None for one that was killed."
        out.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [start(rank_main, rank, port, job, out) for rank in range(2)]
        for process in processes: process.join(150)
        assert not any(process.is_alive() for process in processes), "a process hangs"
        return [torch.load(out/f"{rank}.pt", weights_only=False) if (out/f"{rank}.pt").exists() else None for rank in range(2)]

    def test_killed_ranks(self, start, tmp_path):
        "First one, then the other; the one that is left says so, and the run ends with the bits of one in one piece."
        expected = self.run(start, partial(kill_at, 0, None, tmp_path/"whole"), tmp_path/"a")
        for victim, step, out in ((1, 4, "b"), (0, 9, "c")):
            ends = self.run(start, partial(kill_at, step, victim, tmp_path/"run"), tmp_path/out)
            assert ends[victim] is None
            assert re.match("HplError: another of the 2 processes has ended.*run the same command again", str(ends[1 - victim]))
            assert read_checkpoint(RunFolder(tmp_path/"run").checkpoint)["progress"]["step"] in (step - 1, step)
        ends = self.run(start, partial(kill_at, 0, None, tmp_path/"run"), tmp_path/"d")
        for end, other in zip(ends, expected): assert not differences(end, other)

    def test_no_numbers(self, start, tmp_path):
        "Both stop at the same step, with the same words, also where one alone has the sample; and neither hangs."
        first, second = self.run(start, partial(no_numbers, tmp_path/"runs"), tmp_path/"out")
        assert isinstance(first, dict), first
        row = broken(5, 0.)[1]
        for (name, what), message in first.items():
            assert message == second[name, what], name
            blamed = rf"row {row} \(sample-{row}\), whose (weak view|input) holds" if what == "sample" else "diverged"
            assert re.search(blamed, message), (name, message)
            assert finite(RunFolder(tmp_path/"runs"/f"{name}-{what}"))
