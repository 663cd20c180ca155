"""Two processes on the CPU do what one does on the joined batch, each with random numbers of its own.

Run as a script - by `accelerate launch` - this file is one of the processes: it trains every case and keeps what it saw.
"""
import os
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import METHODS, SETTINGS, differences, digits, make, vectors
from test_utkface import make_folder
from torch import nn

from hpl_nb.core import seed_everything
from hpl_nb.data.core import StreamSettings
from hpl_nb.data.utkface import UTKFace
from hpl_nb.methods import hpl
from hpl_nb.methods.hpl import HPL
from hpl_nb.methods.simregmatch import SimRegMatch
from hpl_nb.methods.ucvme import UCVME
from hpl_nb.models import Body, Head, Regressor, mlp
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train

# no batch statistics and no dropout that ever drops: nothing random but the views, which are seeded by sample
DENSE = partial(mlp, 3, (16,), 2, dropout=1e-12)
FEW = Train(epochs=3, iterations_per_epoch=6, streams=StreamSettings(8, 16), optimizer=OptimizerSettings(1e-2, 1e-2))
FACES = "HPL, pixels on the device" # first: the loader asks for the device before a trainer has made the group
# (UCVME by the strong view: without dropout its predictions on the weak view are the pseudo-labels, and their ranks are rounding)
CASES = {FACES: HPL.paper(), **METHODS, "UCVME": UCVME(passes=2, student_view="strong"),
         "HPL sum": HPL.paper(reduction="sum", virtual_lr=1e-3), "HPL release, sum": HPL.release(reduction="sum"),
         "SimRegMatch, all pass": SimRegMatch(percentile=None, unlabelled_weight=1.),
         "HPL attached": HPL.paper(detach_input=False, learner_lr=1e-2),
         "HPL normalised, attached": HPL.paper(detach_input=False, learner_lr=1e-2, normalize_weights=True)}


def main(out):
    "Train every case; save what this process saw below `out`."
    torch.set_num_threads(1)
    rank, written = int(os.environ.get("RANK", 0)), []
    sys.addaudithook(lambda event, args: written.append(str(args[0])) if event == "open" and writes(args, out) else None)
    for name in CASES: torch.save(joined(name, rank, out.parent/"faces"), out/f"{name}-{rank}.pt")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        for name in METHODS: torch.save(resumed(name, rank, out/name), out/f"{name}-{rank}-resumed.pt")
    torch.save({"written": [path for path in written if not path.endswith(f"-{rank}.pt")], "random": random_streams(rank, out/"random"),
                "address": os.environ.get("MASTER_ADDR")}, out/f"process-{rank}.pt")


def writes(args, folder):
    "Is this the opening of a file below `folder` for writing?"
    return str(args[0]).startswith(str(folder)) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def parts(name, faces):
    "A case's data and network: vectors, or pictures whose views are made on the device."
    if name != FACES: return vectors(2), DENSE()
    data = UTKFace(label_ratio=.5, root=str(faces), size=8, pixels="device", labelled_count="exact").load()
    return data, Regressor(Body(nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 16), nn.ReLU()), 16), Head(16, 1))


def joined(name, rank, faces):
    "Gradients and hypergradients of each step, final weights, predictions; the processes start with different weights."
    seed_everything(0, rank)
    data, network = parts(name, faces)
    method, steps, hypergradients = CASES[name].build(network), [], []
    make_optimizers, look_ahead = method.make_optimizers, hpl.slope_hypergradient
    def watched(settings):
        optimizers = make_optimizers(settings)
        for optimizer in optimizers.values(): optimizer.register_step_pre_hook(lambda o, *_: steps.append(gradients(o)))
        return optimizers
    def kept(*args, **kwargs):
        hypergradients.append(look_ahead(*args, **kwargs))
        return hypergradients[-1]
    method.make_optimizers, hpl.slope_hypergradient = watched, kept
    with warnings.catch_warnings(record=True) as said: run = fit(method, data, FEW, progress=False)
    hpl.slope_hypergradient = look_ahead
    run.metrics.pop("seconds")
    return {"weights": dict(method.state_dict()), "gradients": steps, "slopes": [h.slope for h in hypergradients],
            "heads": [h.head for h in hypergradients], "predictions": run.predictions, "log": run.log.drop(columns="seconds"),
            "metrics": run.metrics, "processes": run.config["processes"],
            "said": [str(each.message) for each in said if "processes" in str(each.message)],
            "tolerance": 1e-3 if name == "SSDKL" else 1e-5} # roots of matrices in float32


def gradients(optimizer):
    "All gradients of an optimiser in one vector."
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([torch.zeros(0), *(p.grad.flatten() for p in parameters if p.grad is not None)])


def resumed(name, rank, folder):
    """With batch norm and dropout: final state and log of a run in one piece, and of one that stopped in the middle of an epoch, twice.

    By the first process's clock a checkpoint is due after each step, by the second's never: they write it together. The second stop
    is asked for by the second process alone."""
    ends, stops = [], ({"stop_after": 3}, {"watch": lambda progress: rank == 1 and progress.step == 7})
    for place, stops in (("whole", ()), ("stopped", stops)):
        for stop in (*stops, {}):
            method = make(name)
            run = fit(method, digits(), SETTINGS, folder=folder/place, progress=False, checkpoint_seconds=1e9*rank, **stop)
        ends.append([dict(method.state_dict()), run.predictions, run.log.drop(columns="seconds"), run.metrics["val_mse"]])
    return ends


def random_streams(rank, folder):
    "What a process draws at its first steps: rows, seeds of views, global generators, dropout masks."
    seen = {"index": [], "seeds": [], "torch": [], "numpy": [], "python": [], "dropout": []}
    data, method = vectors(), make("HPL paper", regressor=partial(mlp, 3, (16,), dropout=.5))
    def view(samples, seeds):
        seen["seeds"].append(seeds)
        return samples
    def step(batch, training_step=method.training_step):
        seen["index"].append({stream: tensors["index"].tolist() for stream, tensors in batch.items()})
        losses = training_step(batch)
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        for kind, draw in (("torch", torch.rand), ("numpy", np.random.rand), ("python", lambda n: [random.random() for _ in range(n)])):
            seen[kind].append(list(map(float, draw(4))))
        seen["dropout"].append(torch.nn.functional.dropout(torch.ones(32)).tolist())
        for restore, state in zip((torch.set_rng_state, np.random.set_state, random.setstate), states): restore(state)
        return losses
    method.training_step = step
    fit(method, replace(data, weak=view, strong=view), FEW, folder=folder, progress=False, stop_after=4)
    return seen


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "What one process and two processes saw; all of them at the same time, and only over the loopback interface."
    out, here = tmp_path_factory.mktemp("processes"), Path(__file__)
    make_folder(out/"faces", rows=60)
    environ = {**os.environ, "PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
               "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_ip", "127.0.0.1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--num_machines", "1"]
    started = []
    for folder, command in ((out/"one", [sys.executable]), (out/"two", launch)):
        folder.mkdir()
        started.append(subprocess.Popen([*command, str(here), str(folder)], env=environ, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True))
    for process in started:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-5000:]
    return out


def read(path): return torch.load(path, weights_only=False)


@pytest.fixture(params=CASES)
def case(request, results):
    "A case as one process saw it, and as each of two did."
    name = request.param
    return read(results/"one"/f"{name}-0.pt"), [read(results/"two"/f"{name}-{rank}.pt") for rank in range(2)]


def close(actual, expected, tolerance=1e-5):
    "Relative to the largest value; bounds of parameters may be infinite."
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    if finite.any(): assert (actual - expected)[finite].abs().max() <= tolerance*expected[finite].abs().max()


def test_head_and_learner(case):
    "After several steps: all weights, which are the same bits in both processes."
    one, two = case
    parameters = [name for name, value in one["weights"].items() if isinstance(value, torch.Tensor)]
    assert {"regressor.head.weight", "regressor.head.bias"} <= set(parameters)
    for name in parameters: close(two[0]["weights"][name], one["weights"][name], one["tolerance"])
    assert not differences({k: two[0]["weights"][k] for k in parameters}, {k: two[1]["weights"][k] for k in parameters})


def test_they_train_together(results):
    "Also where the loader has asked for the device before the trainer."
    for name in CASES: assert [read(results/"two"/f"{name}-{rank}.pt")["processes"] for rank in range(2)] == [2, 2]


def test_a_small_network_is_advised_against(case):
    "By the main process alone."
    one, (main, other) = case
    assert not one["said"] and not other["said"] and len(main["said"]) == 1
    assert "2 processes on the CPU train one network of" in main["said"][0] and "hpl_compare --jobs 2" in main["said"][0]


def test_gradients(case):
    "Of theta and of phi, at every step of every optimiser."
    one, two = case
    assert len(one["gradients"]) == len(two[0]["gradients"]) == len(two[1]["gradients"]) >= 18
    for rank in range(2):
        for actual, expected in zip(two[rank]["gradients"], one["gradients"]): close(actual, expected, one["tolerance"])


def test_hypergradients(case):
    "The processes' slopes joined are one process's; both look ahead to the same head."
    one, two = case
    assert len(one["slopes"]) == len(two[0]["slopes"])
    for step, expected in enumerate(one["slopes"]):
        close(torch.cat([two[rank]["slopes"][step] for rank in range(2)])/2, expected)
        for rank in range(2): close(two[rank]["heads"][step], one["heads"][step])


def test_every_hpl_case_looks_ahead(results):
    for name in CASES: assert len(read(results/"one"/f"{name}-0.pt")["slopes"]) == (
        {"HPL release": 6, "HPL release, sum": 6, "HPL previous": 17}.get(name, 18) if "HPL" in name else 0)


def test_predictions_and_log(case):
    "Every process has all rows, and the numbers of one process."
    one, two = case
    for mine in two:
        pd.testing.assert_frame_equal(mine["predictions"], one["predictions"], rtol=1e-4, atol=1e-4)
        pd.testing.assert_frame_equal(mine["log"], one["log"], rtol=1e-3, atol=1e-4)
        assert mine["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
    assert not differences(two[0]["predictions"], two[1]["predictions"])


@pytest.mark.parametrize("name", METHODS)
def test_resume(name, results):
    """Stopped in the middle of an epoch and resumed, both processes end with the same bits as in one piece, running statistics included;
    and with the same network, whose validation error is the one in the log."""
    ends = [read(results/"two"/f"{name}-{rank}-resumed.pt") for rank in range(2)]
    for whole, stopped in ends:
        assert not differences(whole, stopped)
        assert whole[2]["val_mse"].min() == pytest.approx(whole[3], rel=1e-6)
    assert not differences(ends[0][0][1:], ends[1][0][1:])


def test_random_streams_differ(results):
    "Rows are disjoint and together those of one process; so are the seeds of views; the generators differ at every step."
    alone = read(results/"one"/"process-0.pt")["random"]
    first, second = (read(results/"two"/f"process-{rank}.pt")["random"] for rank in range(2))
    for step, rows in enumerate(alone["index"]):
        for stream in rows: assert first["index"][step][stream] + second["index"][step][stream] == rows[stream]
        assert all(len(set(rows[stream])) == len(rows[stream]) for stream in rows)
    for a, b, whole in zip(first["seeds"], second["seeds"], alone["seeds"]): assert [*a, *b] == [*whole] and len(set(whole)) == len(whole)
    for kind in ("torch", "numpy", "python", "dropout"):
        assert len(first[kind]) == 4 and all(a != b for a, b in zip(first[kind], second[kind])), kind


def test_only_the_main_process_writes(results):
    processes = [read(results/"two"/f"process-{rank}.pt") for rank in range(2)]
    assert any(path.endswith("metrics.json") or ".metrics.json" in path for path in processes[0]["written"])
    assert not processes[1]["written"]
    assert {process["address"] for process in processes} == {"127.0.0.1"}


if __name__ == "__main__": main(Path(sys.argv[1]))
