"What only a GPU can show; `pytest -m cuda` runs these."
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import METHODS, SETTINGS, digits, make

from hpl_nb.core import seed_everything
from hpl_nb.data.rotated_digits import rotated_digits
from hpl_nb.methods.hpl import HPL, PAPER, RELEASE
from hpl_nb.models import small_cnn
from hpl_nb.trainer import TrainSettings, fit

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def train(settings, folder=None, **changes):
    seed_everything(0)
    method = HPL(small_cnn(dropout=.1), settings)
    stop = changes.pop("stop_after", None)
    return method, fit(method, rotated_digits(), TrainSettings(epochs=2, iterations_per_epoch=20, **changes), folder=folder,
                       progress=False, stop_after=stop)


@pytest.mark.parametrize("preset", [PAPER, RELEASE], ids=["paper", "release"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_trains_on_the_gpu(preset, precision):
    method, run = train(preset, precision=precision)
    assert torch.cuda.max_memory_allocated() > 0 and next(method.parameters()).device.type == "cpu" # back where it was
    assert run.metrics["test_mae"] < 30 and method.regressor.head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_the_gpu(name, tmp_path):
    "In bf16, stopped in the middle of an epoch and resumed, to finite predictions."
    settings = replace(SETTINGS, precision="bf16")
    fit(make(name), digits(), settings, folder=tmp_path, progress=False, stop_after=8)
    run = fit(make(name), digits(), settings, folder=tmp_path, progress=False)
    assert run.finished and np.isfinite(run.predictions["y_pred"]).all() and torch.cuda.max_memory_allocated() > 0


def test_resumes_on_the_gpu(tmp_path):
    whole, _ = train(PAPER)
    train(PAPER, tmp_path, stop_after=27)
    resumed, _ = train(PAPER, tmp_path)
    for a, b in zip(whole.parameters(), resumed.parameters()): assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
