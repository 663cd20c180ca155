"What only a GPU can show; `pytest -m cuda` runs these."
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import METHODS, SETTINGS, digits, make
from test_utkface import load, make_folder

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.data.images import FlipCrop, RandAugmentMC, image_views, published_views
from hpl_nb.data.pixels import COLOURS, carry_out, draw_plans, on_device
from hpl_nb.data.rotated_digits import rotated_digits
from hpl_nb.methods.hpl import HPL
from hpl_nb.models import small_cnn
from hpl_nb.training.loop import fit
from hpl_nb.training.state import Train

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def train(settings, folder=None, **changes):
    seed_everything(0)
    method = settings.build(small_cnn(dropout=.1))
    stop = changes.pop("stop_after", None)
    return method, fit(method, rotated_digits(), Train(epochs=2, iterations_per_epoch=20, **changes), folder=folder,
                       progress=False, stop_after=stop)


@pytest.mark.parametrize("preset", [HPL.paper(), HPL.release()], ids=["paper", "release"])
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
    whole, _ = train(HPL.paper())
    train(HPL.paper(), tmp_path, stop_after=27)
    resumed, _ = train(HPL.paper(), tmp_path)
    for a, b in zip(whole.parameters(), resumed.parameters()): assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strong", ["released", "published"])
def test_views_on_the_gpu_are_those_of_the_cpu(strong):
    "Up to rounding, which a later operation may enlarge: as far as the CPU's may be from Pillow's (test_pixels.py)."
    views = image_views(FlipCrop(3), RandAugmentMC(5, 10, 9)) if strong == "released" else published_views(40, operations=4)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (300, 3, 40, 44), dtype=np.uint8))
    plans = draw_plans(views.strong.transforms, np.arange(300), 300, 44, 40)
    assert {step.operation for plan in plans for step in plan} >= {*COLOURS, "zeros", "reflect"}
    there = carry_out(pixels.cuda(), plans)
    assert torch.equal(there, carry_out(pixels.cuda(), plans))
    assert (there.cpu().int() - carry_out(pixels, plans).int()).abs().float().mean() < 1.5


def test_pixels_live_on_the_gpu(tmp_path):
    "Batches are made there without waiting for it, and are those of the CPU up to rounding."
    data = load(make_folder(tmp_path))
    here, there = on_device(data, tmp_path/"cache"), on_device(data, tmp_path/"cache", "cuda")
    assert there.inputs.resident.is_cuda and there.inputs.resident.dtype == torch.uint8
    needs = {"labelled": ("weak",), "unlabelled": ("weak", "strong"), "outer": ("weak",)}
    streams = [Streams(each, needs, StreamSettings(4, 4, 4), steps=4, seed=3) for each in (here, there)]
    _ = streams[1][3] # whatever is done once has been done
    torch.cuda.set_sync_debug_mode("error")
    try: batch = streams[1][0]
    finally: torch.cuda.set_sync_debug_mode("default")
    for stream, tensors in streams[0][0].items():
        for name, value in tensors.items(): assert (batch[stream][name].cpu() - value).abs().float().mean() < .03
    there.inputs.resident = None # as where it does not fit
    assert torch.equal(streams[1][0]["unlabelled"]["strong"], batch["unlabelled"]["strong"])


@pytest.mark.parametrize("compiled", [False, True])
def test_trains_with_pixels_on_the_gpu(tmp_path, compiled):
    "In bf16, stopped and resumed; workers are refused."
    data = on_device(load(make_folder(tmp_path)), tmp_path/"cache", "cuda")
    settings = Train(epochs=2, iterations_per_epoch=4, streams=StreamSettings(3, 5), precision="bf16")
    for stop in (3, None):
        seed_everything(0)
        method = HPL.paper().build(small_cnn(3, width=4, dropout=.1))
        if compiled: method.regressor.body.compile()
        run = fit(method, data, settings, folder=tmp_path/"run", progress=False, stop_after=stop)
    assert run.finished and np.isfinite(run.predictions["y_pred"]).all()
    with pytest.raises(HplError, match="use workers=0"): fit(method, data, settings, workers=1)
