"""Long runs and many reopenings leave memory as it was: what is made in a step, an epoch or a window goes with it.

`pytest -m slow tests/test_soak.py -s` trains every method for 2,000 steps and prints what grew; the suite does a little of it.
"""
import gc
import weakref
from dataclasses import replace
from functools import partial
from statistics import median

import comm
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from small_runs import METHODS, make, vectors
from test_faults import start  # noqa: F401

from hpl_nb.core import PREDICTION_COLUMNS, RunFolder, seed_everything
from hpl_nb.data.core import StreamSettings
from hpl_nb.explorer import Explorer
from hpl_nb.live import LiveView
from hpl_nb.models import mlp
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train

PER_EPOCH = 50
SETTINGS = Train(iterations_per_epoch=PER_EPOCH, streams=StreamSettings(8, 16), optimizer=OptimizerSettings(1e-3, 1e-3),
                         record_every=1)
MEGABYTES = 4 # of 1,500 steps: less than 3 kB a step, which is a graph of the smallest network, or one batch of inputs with its views
BARE = "a bare loop" # the network in PyTorch alone, for what the allocator does by itself
dense = partial(mlp, 3, (16,), dropout=.2)


# ---- what a process holds

def tensors():
    "How many tensors are alive."
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def held():
    "Megabytes, tensors, Python's containers, open files and threads of this process, without what only waits to be collected."
    gc.collect()
    process = psutil.Process()
    return {"megabytes": process.memory_info().rss/2**20, "tensors": tensors(), "objects": len(gc.get_objects()),
            "files": process.num_fds(), "threads": process.num_threads()}


def growth(samples):
    "From the first third of the samples to the last; medians, since an allocator takes and gives back in pieces."
    third = max(1, len(samples)//3)
    return {name: median(s[name] for s in samples[-third:]) - median(s[name] for s in samples[:third]) for name in samples[0]}


# ---- training

def soak(folder, out, name, epochs, warm_up, leak=None):
    "Train in this process, and write what it held at the end of each epoch after the warm-up; a leak is called at each step."
    torch.set_num_threads(1)
    samples = []
    method, data = None if name == BARE else make(name, 0, dense), vectors(rows=120)
    def watch(progress):
        if leak: leak(method, data)
        if progress.step % PER_EPOCH == 0 and progress.step >= warm_up: samples.append(held())
    if name == BARE: bare(epochs, warm_up, samples)
    else: fit(method, data, replace(SETTINGS, epochs=epochs), folder=folder, progress=False, checkpoint_seconds=.2, watch=watch)
    pd.DataFrame(samples).to_json(out)


def bare(epochs, warm_up, samples):
    seed_everything(0)
    network = dense()
    optimizer, x = torch.optim.Adam(network.parameters()), torch.randn(24, 3)
    for step in range(1, epochs*PER_EPOCH + 1):
        network(x).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
        if step % PER_EPOCH == 0 and step >= warm_up: samples.append(held())


def soaked(start, tmp_path, name, steps, warm_up, leak=None): # noqa: F811
    "What has grown during the steps after the warm-up, in a process that has done nothing else."
    process = start(soak, tmp_path/"run", tmp_path/"samples.json", name, steps//PER_EPOCH, warm_up, leak)
    process.join()
    assert process.exitcode == 0
    grown = growth(pd.read_json(tmp_path/"samples.json").to_dict("records"))
    words = ", ".join(f"{value:+.2f} {what}" if what == "megabytes" else f"{value:+.0f} {what}" for what, value in grown.items())
    print(f"\n{name:20} {steps - warm_up} steps: {words}")
    return grown


def keeps(folder, epochs):
    "What a run of so many epochs keeps on the disk, and nothing half-written."
    return len([*(folder/"predictions").iterdir()]) == epochs and {path.name for path in RunFolder(folder).checkpoint.parent.iterdir()} == {
        "last.pt", "previous.pt", "best.pt"} and not [*folder.rglob(".writing-*")]


def leaking_steps(method, data, kept=[]): # noqa: B006
    "A method that forgets to detach what it keeps."
    kept.append(method.regressor(data.inputs[:16]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [BARE, *METHODS])
def test_two_thousand_steps(name, start, tmp_path): # noqa: F811
    "Checkpoints five times a second, predictions at each epoch: tensors, files and threads stay as many, memory as it is."
    grown = soaked(start, tmp_path, name, 2000, 500)
    assert grown["tensors"] == grown["files"] == grown["threads"] == 0 and grown["megabytes"] < MEGABYTES
    assert name == BARE or keeps(tmp_path/"run", 2000//PER_EPOCH)


@pytest.mark.slow
def test_a_leak_would_be_seen(start, tmp_path): # noqa: F811
    grown = soaked(start, tmp_path, "Supervised", 2000, 500, leaking_steps)
    assert grown["tensors"] > 1000 and grown["megabytes"] > MEGABYTES


@pytest.mark.parametrize("name", ["MeanTeacher", "HPL paper"])
def test_two_hundred_steps(name, start, tmp_path): # noqa: F811
    grown = soaked(start, tmp_path, name, 200, 100)
    assert grown["tensors"] == grown["files"] == 0 and keeps(tmp_path/"run", 4)


def test_a_small_leak_would_be_seen(start, tmp_path): # noqa: F811
    assert soaked(start, tmp_path, "Supervised", 200, 100, leaking_steps)["tensors"] >= PER_EPOCH


# ---- windows

def predictions(runs=2, epochs=3, rows=40):
    "A predictions table of random numbers."
    random = np.random.default_rng(0)
    numbers = dict.fromkeys(PREDICTION_COLUMNS, 0.) | {"split": "unlabelled", "dataset": "none"}
    tables = [pd.DataFrame(numbers | {name: random.random(rows) for name in PREDICTION_COLUMNS[9:]} | {
        "run": f"run {run}", "method": f"method {run}", "epoch": epoch, "index": range(rows), "output": 0})
        for run in range(runs) for epoch in range(1, epochs + 1)]
    return pd.concat(tables, ignore_index=True)


def open_explorer():
    "An explorer as it is used: shown twice, points chosen, another epoch, another method."
    explorer = Explorer(predictions())
    for _ in range(2): explorer._repr_mimebundle_()
    explorer.choose([1, 2, 3])
    explorer.epoch.value, explorer.labels.value = 1, (.2, .8)
    explorer.method.value = "method 1"
    return explorer


def open_live_view():
    "A live view that has watched a run."
    view = LiveView(every=0)
    view._repr_mimebundle_()
    fit(make("HPL paper", 0, dense), vectors(rows=120), replace(SETTINGS, epochs=2, iterations_per_epoch=3, record_every=0), progress=False,
        watch=view)
    view._repr_mimebundle_()
    return view


def reopened(open_window, times, warm_up):
    "What this process holds after each of many openings and closings, beside widgets and their channels to the page."
    samples = []
    for time in range(times):
        window = open_window()
        alive, whole = weakref.ref(window), window.panel()
        window.close()
        assert whole.comm is None
        del window, whole
        now = held()
        assert alive() is None
        if time >= warm_up: samples.append(now | {"channels": len(comm.get_comm_manager().comms)})
    return growth(samples)


@pytest.mark.parametrize("open_window", [open_explorer, open_live_view])
def test_reopened_five_times(open_window):
    grown = reopened(open_window, 5, 2)
    assert grown["channels"] == grown["tensors"] == 0 and grown["objects"] < 100, grown


def test_shown_again_it_is_the_same():
    explorer, view = open_explorer(), LiveView()
    for window in (explorer, view):
        assert window.panel() is window.panel()
        before = len(comm.get_comm_manager().comms)
        for _ in range(3): window._repr_mimebundle_()
        assert len(comm.get_comm_manager().comms) == before
        window.close()


def windows(out, open_window):
    torch.set_num_threads(1)
    pd.Series(reopened(open_window, 50, 10)).to_json(out)


@pytest.mark.slow
@pytest.mark.parametrize("open_window", [open_explorer, open_live_view])
def test_reopened_fifty_times(open_window, start, tmp_path): # noqa: F811
    process = start(windows, tmp_path/"grown.json", open_window)
    process.join()
    assert process.exitcode == 0
    grown = pd.read_json(tmp_path/"grown.json", typ="series")
    print(f"\n{open_window.__name__}: {grown.to_dict()}")
    assert grown["channels"] == grown["tensors"] == grown["files"] == 0 and grown["objects"] < 1000 and grown["megabytes"] < MEGABYTES
