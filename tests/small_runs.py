"Every method on a small network and a little data, and comparison to the bit: what the tests of trainer and methods share."
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

from hpl_nb.core import seed_everything
from hpl_nb.data.core import SemiSupervisedData, StreamSettings
from hpl_nb.data.rotated_digits import rotated_digits
from hpl_nb.methods.cadr import CADR
from hpl_nb.methods.clss import CLSS
from hpl_nb.methods.core import PseudoLabel, Supervised
from hpl_nb.methods.hpl import HPL, JointUncertainty
from hpl_nb.methods.mean_teacher import MeanTeacher
from hpl_nb.methods.pim import PIM
from hpl_nb.methods.rankup import RankUp
from hpl_nb.methods.simregmatch import SimRegMatch
from hpl_nb.methods.ssdkl import SSDKL
from hpl_nb.methods.temporal_ensembling import TemporalEnsembling
from hpl_nb.methods.tnnr import TNNR
from hpl_nb.methods.ucvme import UCVME
from hpl_nb.methods.ups import UPSReg
from hpl_nb.models import small_cnn
from hpl_nb.training.state import OptimizerSettings, Train

METHODS = {"Supervised": Supervised(), "PseudoLabel": PseudoLabel(), "MeanTeacher": MeanTeacher(),
           "TemporalEnsembling": TemporalEnsembling(), "TNNR": TNNR(), "UCVME": UCVME(passes=2), "CLSS": CLSS(), "RankUp": RankUp(),
           "SSDKL": SSDKL(inducing_points=8, gp_lr=.05), "SimRegMatch": SimRegMatch(), "PIM": PIM(), "UPSReg": UPSReg(), "CADR": CADR(),
           "JointUncertainty": JointUncertainty(), "HPL paper": HPL.paper(), "HPL release": HPL.release(),
           "HPL previous": HPL.paper(label="previous", outer="previous"),
           "HPL extended": HPL.paper(label="extended", normalize_weights=True, passes=2, outer_batch=16,
                                     learner_inputs="pair+features+disagreement", teacher_decay=.9)}
SETTINGS = Train(epochs=3, iterations_per_epoch=5, streams=StreamSettings(8, 16), record_every=2,
                         optimizer=OptimizerSettings(lr_body=3e-3, lr_head=1e-2, decay_every=1, decay=.5))


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    "Import this into a test module, and it trains on the CPU, also where there is a GPU: bits are promised there only."
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    if before is None: del os.environ["ACCELERATE_USE_CPU"]
    else: os.environ["ACCELERATE_USE_CPU"] = before


@contextmanager
def forked(module):
    "A context whose processes are forked from one that has imported a test module and has no threads; they have no GPU."
    context, before, here = get_context("forkserver"), dict(os.environ), Path(__file__).parent
    context.set_forkserver_preload([module])
    os.environ |= {"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    yield context
    os.environ.clear()
    os.environ.update(before)


@lru_cache
def digits():
    "Rotated digits with few rows: 69 labelled, 96 unlabelled, 40 for validation and 40 for the test."
    data = rotated_digits()
    return replace(data, unlabelled=data.unlabelled[:96], val=data.val[:40], test=data.test[:40])


def vectors(outputs=1, rows=200, seed=0):
    "Inputs (rows, 3) with K noisy linear targets; 40 rows labelled, the last 40 for validation and the test; views add noise."
    random = np.random.default_rng(seed)
    x, order = torch.from_numpy(random.normal(size=(rows, 3))).float(), np.arange(rows)
    y = x.numpy() @ random.normal(size=(3, outputs)) + .1*random.normal(size=(rows, outputs))
    return SemiSupervisedData("vectors", x, 3*y + 5, order[:40], order[40:-40], order[-40:-20], order[-20:],
                              weak=partial(_noisy, .05), strong=partial(_noisy, .3))


def _noisy(scale, samples, seeds):
    "A sample plus noise that is a pure function of its seed."
    noise = [torch.randn(samples.shape[1:], generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return samples + scale*torch.stack(noise)


def noisy_cnn(): return small_cnn(width=4, dropout=.2)


def make(name, seed=0, regressor=noisy_cnn):
    "A fresh method, by default on a network with batch norm and dropout."
    seed_everything(seed)
    return METHODS[name].build(regressor())


def tree(folder):
    "Every file below a folder, with its content."
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def differences(a, b, path=""):
    "Where two nested values differ, to the bit (NaN equals NaN); empty where they do not."
    if isinstance(a, pd.DataFrame): a, b = a.to_dict("list"), b.to_dict("list")
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor): same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    else: same = type(a) is type(b) and (a == b or a != a and b != b)
    return [] if same else [path or "/"]


def inspected(method, x):
    "What `inspect` makes of x, with masks of seed 3; predictions repeat themselves, and neither changes state or mode."
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(method.predict(x), method.predict(x))
        seed_everything(3)
        views = method.inspect(x, x)
    assert not method.training and not differences(before, dict(method.state_dict()))
    return views
