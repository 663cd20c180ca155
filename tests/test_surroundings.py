"What the surrounding process does - other threads, generators, default types, gradient modes, start methods - changes no number."
import copy
import pickle
import random
import subprocess
import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import KFold, cross_val_score
from small_runs import METHODS, SETTINGS, differences, digits, make, on_cpu, vectors  # noqa: F401
from test_imdb_wiki import make_folder

from hpl_nb.core import HplError, OwnGenerators, Turns, random_states, seed_everything
from hpl_nb.data.core import StreamSettings, plain_view, synthetic
from hpl_nb.data.images import published_views
from hpl_nb.data.imdb_wiki import imdb_wiki
from hpl_nb.data.own import Reading, from_arrays, from_frame, from_images
from hpl_nb.data.pixels import on_device, on_disk
from hpl_nb.data.rotated_digits import RotatedDigits, rotated_digits
from hpl_nb.data.stsb import stsb
from hpl_nb.data.utkface import utkface
from hpl_nb.estimator import SemiSupervisedRegressor
from hpl_nb.experiment import Experiment
from hpl_nb.methods.core import Supervised
from hpl_nb.methods.known import method_named
from hpl_nb.methods.ucvme import UCVME
from hpl_nb.models import mlp
from hpl_nb.predictor import Predictor
from hpl_nb.runner import train_experiment
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train

SHORT = Train(epochs=2, iterations_per_epoch=6, streams=StreamSettings(8, 8), optimizer=OptimizerSettings(1e-2, 1e-2))


def rows():
    "120 rows of 4 columns, 40 of them labelled, and all their labels."
    draw = np.random.default_rng(0)
    x = draw.standard_normal((120, 4))
    t = x[:, 0] + .5*np.sin(2*x[:, 1])
    return x, np.where(np.arange(120) < 40, t, np.nan), t


def dropout_net(shape, outputs): return mlp(shape[0], (32, 32), outputs, dropout=.3)
def model(method="supervised", network=dropout_net): return SemiSupervisedRegressor(method, network, train=SHORT, random_state=0)


def fitted(method="supervised", **arguments):
    x, y, _ = rows()
    return model(method, **arguments).fit(x, y)


def together(*calls):
    "The answers of functions that run in a thread each, at the same time."
    ends, start = [None]*len(calls), threading.Barrier(len(calls))
    def run(i, call):
        start.wait()
        try: ends[i] = call()
        except BaseException as error: ends[i] = error
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    for end in ends:
        if isinstance(end, BaseException): raise end
    return ends


@pytest.fixture
def often():
    "Threads change as often as they can."
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestThreads:
    @pytest.mark.parametrize("method", ["supervised", "ucvme", "pim", "ssdkl", "mean_teacher", "hpl_paper"])
    def test_two_that_fit(self, method, often):
        x = rows()[0]
        alone = fitted(method).predict(x)
        for model in together(partial(fitted, method), partial(fitted, method)): assert np.array_equal(alone, model.predict(x))

    def test_cross_validation_in_threads(self, often):
        x, _, t = rows()
        y = np.where(np.arange(120) % 2 < 1, t, np.nan)
        model = SemiSupervisedRegressor(UCVME(passes=2), dropout_net, train=SHORT, random_state=0)
        alone = cross_val_score(model, x, y, cv=KFold(3))
        with joblib.parallel_backend("threading", n_jobs=3): assert np.array_equal(alone, cross_val_score(model, x, y, cv=KFold(3)))

    def test_one_that_predicts_while_another_fits(self, often):
        "With masks that each prediction draws anew: the same for the same rows."
        x = rows()[0]
        model = SemiSupervisedRegressor(UCVME(passes=2, test_passes=3), dropout_net, train=SHORT, random_state=0).fit(*rows()[:2])
        alone, expected = fitted().predict(x), model.predict_interval(x, .5, scaled=True)
        def ask(): return [model.predict_interval(x, .5, scaled=True) for _ in range(5)]
        trained, answers = together(fitted, ask)
        assert np.array_equal(alone, trained.predict(x))
        for answer in answers: np.testing.assert_array_equal(answer, expected)

    def test_a_prediction_does_not_wait_for_the_end_of_training(self):
        "A thread that waits has its turn after the step."
        model, done = fitted(), threading.Event()
        def ask(): model.predict(rows()[0]); done.set()
        def watch(progress):
            if progress.step == 1: threading.Thread(target=ask).start()
            return done.is_set()
        longer = replace(SHORT, epochs=1, iterations_per_epoch=3000)
        assert not fit(make("Supervised", 0, partial(mlp, 3)), vectors(), longer, progress=False, watch=watch).finished

    @pytest.mark.parametrize("view", ["weak", "strong"])
    def test_views_of_pictures(self, view, tmp_path, often):
        "They draw from torch's generator, as torchvision does."
        views, seeds = published_views(16), np.arange(8)
        pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)) for i in range(8)]
        make = partial(getattr(views, view), pictures, seeds)
        alone, state = make(), torch.get_rng_state()
        for other in together(*[make]*4): assert torch.equal(alone, other)
        assert torch.equal(state, torch.get_rng_state())


def test_turns_are_taken_in_the_order_of_asking():
    turns, order = Turns(), []
    def work(name):
        for _ in range(20):
            with turns, turns: order.append(name)
    with turns:
        threads = [threading.Thread(target=work, args=name) for name in "ab"]
        for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sorted(order) == ["a"]*20 + ["b"]*20 and not turns.is_awaited


class TestDraws:
    "Of others between the steps of a run."
    @given(st.lists(st.sampled_from(["torch", "numpy", "python", "seed", "type"]), min_size=1, max_size=4))
    @settings(max_examples=8, deadline=None)
    def test_of_a_callback(self, kinds):
        draws = {"torch": lambda: torch.rand(3), "numpy": lambda: np.random.randn(), "python": random.random,
                 "seed": lambda: seed_everything(7), "type": lambda: torch.get_default_dtype()}
        def watch(progress):
            for kind in kinds: draws[kind]()
        ends = []
        for each in (None, watch):
            method = make("UCVME", 0, partial(mlp, 3, (16,), dropout=.5))
            fit(method, vectors(), SHORT, progress=False, watch=each)
            ends.append(dict(method.state_dict()))
        assert not differences(*ends)

    def test_a_callback_sees_its_own(self):
        "Generator, gradient mode and default type are the caller's within `watch`, as they are after `fit`."
        seen = []
        def watch(progress): seen.append((torch.rand(()).item(), np.random.randn(), random.random(), torch.get_default_dtype()))
        method = make("UCVME", 0, partial(mlp, 3, (16,), dropout=.5))
        seed_everything(3)
        before = random_states()
        torch.set_default_dtype(torch.float64)
        try: fit(method, vectors(), replace(SHORT, epochs=1), progress=False, watch=watch)
        finally: torch.set_default_dtype(torch.float32)
        seed_everything(3)
        expected = [(torch.rand((), dtype=torch.float64).item(), np.random.randn(), random.random(), torch.float64) for _ in seen]
        assert len(seen) >= SHORT.iterations_per_epoch - 1 and seen == expected and before

    @pytest.mark.parametrize("name", METHODS)
    def test_generators_after_fit_are_as_before(self, name):
        method = make(name, 0, partial(mlp, 3, (16,), dropout=.2))
        np.random.randn() # half of a pair is kept
        before = random_states()
        fit(method, vectors(), replace(SETTINGS, epochs=1, iterations_per_epoch=2, record_every=0), progress=False)
        assert not differences(before, random_states())
        Experiment(RotatedDigits(), METHODS[name]).build(digits())
        assert not differences(before, random_states())


# ---- switches of the process

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode,
         "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16), "anomaly": partial(torch.autograd.set_detect_anomaly, True)}
OPTIONS = {"future.infer_string": False, "mode.string_storage": "python", "display.precision": 2}


@contextmanager
def surroundings(dtype="float32", modes=(), device="cpu", deterministic=False, numpy="warn", pandas=(), errors=False, threads=1):
    "A process as somebody may have set it."
    before = torch.get_num_threads()
    with warnings.catch_warnings(), ExitStack() as stack, np.errstate(all=numpy):
        warnings.simplefilter("ignore") # pandas does not like some of its options
        for undo in (partial(torch.set_default_dtype, torch.float32), partial(torch.use_deterministic_algorithms, False),
                     partial(torch.set_num_threads, before), partial(torch.set_default_device, None)): stack.callback(undo)
        for name in pandas: stack.enter_context(pd.option_context(name, OPTIONS[name]))
        torch.set_default_dtype(DTYPES[dtype])
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
        torch.set_num_threads(threads)
        if device != "cpu": torch.set_default_device(device)
        for mode in modes: stack.enter_context(MODES[mode]())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error" if errors else "default")
        yield


def switches():
    return {"dtype": torch.get_default_dtype(), "device": str(torch.get_default_device()), "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(), "deterministic": torch.are_deterministic_algorithms_enabled(),
            "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(), "anomaly": torch.is_anomaly_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"), "numpy": np.geterr(), "threads": torch.get_num_threads(),
            "filters": len(warnings.filters), "random": random_states()}


SETS = st.fixed_dictionaries({}, optional={
    "dtype": st.sampled_from([*DTYPES]), "modes": st.lists(st.sampled_from([*MODES]), max_size=3, unique=True),
    "device": st.sampled_from(["cpu", "meta"]), "deterministic": st.sampled_from([False, True, "warn"]),
    "numpy": st.sampled_from(["raise", "ignore", "warn"]), "errors": st.booleans(), "threads": st.sampled_from([1, 2]),
    "pandas": st.lists(st.sampled_from([*OPTIONS]), max_size=2, unique=True)})
ALL = {"dtype": "float64", "numpy": "raise", "modes": ["inference", "autocast", "anomaly"], "device": "meta", "deterministic": True,
       "errors": True, "pandas": [*OPTIONS]}
FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def numbers(method, tmp_path):
    "What comes of an estimator in all ways that it travels."
    x, _, t = rows()
    model = fitted(method)
    found = {"fit": model.predict(x), "interval": model.predict_interval(x[:30], .5), "labels": model.pseudo_labels_["pseudo_label"]}
    model.save(tmp_path/"model.safetensors")
    found["load"] = SemiSupervisedRegressor.load(tmp_path/"model.safetensors", network=dropout_net).predict(x)
    found["copy"], found["pickle"] = copy.deepcopy(model).predict(x), pickle.loads(pickle.dumps(model)).predict(x)
    found["calibrate"] = model.calibrate(x[40:80] + 1., t[40:80]).predict_interval(x[:30], .5)
    return {name: np.asarray(values).tolist() for name, values in found.items()}


def unchanged(make, **chosen):
    "What a function makes in such a process is what it makes in any; the process stays as it was set."
    plain = make()
    with surroundings(**chosen):
        before = switches()
        found = make()
        assert not differences(before, switches())
    for name, values in found.items():
        if chosen.get("threads", 1) == 1: assert not differences(plain[name], values), name
        else: np.testing.assert_allclose(values, plain[name], rtol=1e-4, atol=1e-4) # which may add in another order


class TestSwitches:
    @given(st.sampled_from(["supervised", "hpl_paper", "ucvme"]), SETS)
    @example("pseudo_label", {"dtype": "float64"})
    @example("supervised", {"dtype": "float16", "numpy": "raise"})
    @example("pseudo_label", {"modes": ["no_grad"]})
    @example("hpl_paper", {"modes": ["inference"], "device": "meta"})
    @example("supervised", {"errors": True, "modes": ["anomaly"], "deterministic": True})
    @FEW
    def test_estimator(self, tmp_path, method, chosen): unchanged(partial(numbers, method, tmp_path), **chosen)

    @pytest.mark.parametrize("name", METHODS)
    def test_every_method(self, name):
        "With everything set at once."
        def make_numbers():
            with OwnGenerators(): method = make(name, 0, partial(mlp, 3, (16,), dropout=.2))
            run = fit(method, vectors(), replace(SHORT, epochs=1), progress=False)
            return {"predictions": run.predictions["y_pred"].tolist(), **method.state_dict()}
        unchanged(make_numbers, **ALL)

    @pytest.mark.parametrize("chosen", [{"dtype": "float64"}, {"dtype": "bfloat16"}, {"modes": ["inference"]}, {"modes": ["no_grad"]}])
    def test_networks_that_were_built_in_it(self, chosen, tmp_path):
        "Outside as well as inside, they train, are saved, and take a file's weights."
        with surroundings(**chosen): methods = [Supervised().build(mlp(3, (8,))) for _ in range(3)]
        for inside, (method, other) in ((True, methods[:2]), (False, methods[1:])):
            with surroundings(**(chosen if inside else {})):
                before = method.regressor.head.weight.detach().float().clone()
                run = fit(method, vectors(), SHORT, progress=False)
                path = Predictor.from_method(method, vectors()).save(tmp_path/"model.safetensors")
                again = Predictor.load(path, other).predict(vectors().inputs)
            weight = method.regressor.head.weight
            assert run.finished and weight.dtype == torch.float32 and weight.requires_grad and not torch.equal(weight, before)
            assert np.array_equal(again, Predictor.from_method(method, vectors()).predict(vectors().inputs))

    def test_a_network_of_float64_stays(self):
        data = vectors()
        method = make("Supervised", 0, partial(mlp, 3)).double()
        fit(method, replace(data, inputs=data.inputs.double(), weak=plain_view), SHORT, progress=False)
        assert method.regressor.head.weight.dtype == torch.float64

    def test_experiments(self, tmp_path):
        train = Train(epochs=1, iterations_per_epoch=2, streams=StreamSettings(8, 8))
        def make_numbers():
            folder = tmp_path/str(len(list(tmp_path.iterdir())))
            run = train_experiment(Experiment(RotatedDigits(), method_named("ucvme"), train=train), folder, progress=False)
            return {"predictions": run.predictions["y_pred"].tolist()}
        unchanged(make_numbers, **ALL)

    @pytest.mark.parametrize("error", [HplError, KeyboardInterrupt])
    def test_after_an_error(self, error):
        def watch(progress): raise error("stop")
        method = Supervised().build(mlp(3))
        with surroundings(**ALL):
            before = switches()
            with pytest.raises(error): fit(method, vectors(), SHORT, progress=False, watch=watch)
            assert not differences(before, switches())
        assert together(fitted)[0] is not None # nobody holds the turn


# ---- datasets that travel to another process

def datasets(shared, folder):
    "Every dataset of the package, and people's own."
    x, y, t = rows()
    pictures = np.random.default_rng(0).integers(0, 255, (24, 3, 16, 16), dtype=np.uint8)
    yield synthetic(60, label_ratio=.3)
    yield rotated_digits(strength=.5)
    yield from_arrays(x, y)
    yield from_arrays(pictures, t[:24])
    yield from_frame(pd.DataFrame(x, columns=list("abcd")).assign(kind=["u", "v"]*60, label=y), "label")
    for row, picture in enumerate(pictures): Image.fromarray(picture.transpose(1, 2, 0)).save(folder/f"{row}.png")
    table = pd.DataFrame({"file": [f"{row}.png" for row in range(24)], "label": t[:24]})
    for in_memory in (False, True): yield from_images(folder, table, "file", "label", reading=Reading(16), cache_in_memory=in_memory)
    files = from_images(folder, table, "file", "label", reading=Reading(16), views=published_views(16))
    yield from (files, on_disk(files, folder/"cache"), on_device(files, folder/"cache"))
    yield utkface(shared/"data"/"utkface", size=32)
    yield stsb(shared/"data"/"stsb")
    (folder/"faces").mkdir()
    yield imdb_wiki(make_folder(folder/"faces"), label_ratio=.5, size=32)


def as_made(data, few=12):
    "The views of a few rows of each kind."
    seeds, samples = np.arange(few), data.inputs[data.labelled[:few]]
    return {view: getattr(data, view)(samples, None if view == "plain" else seeds) for view in ("weak", "strong", "plain")}


def test_every_dataset_travels(shared, tmp_path):
    for data in datasets(shared, tmp_path):
        there = pickle.loads(pickle.dumps(data))
        assert not differences(as_made(data), as_made(there)), data.name


def test_workers_that_do_not_inherit(tmp_path):
    "As processes start on macOS and Windows; Linux pickles in the same way from Python 3.14 on. Warnings are errors from the first import."
    code = f"""
import sys, torch
from hpl_nb.experiment import Experiment
from hpl_nb.data.rotated_digits import RotatedDigits
from hpl_nb.methods.core import PseudoLabel
from hpl_nb.runner import train_experiment
from hpl_nb.training.state import Train
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    torch.set_default_dtype(torch.float64)
    train = Train(epochs=1, iterations_per_epoch=2)
    runs = [train_experiment(Experiment(RotatedDigits(), PseudoLabel(), train=train), f"{tmp_path}/{{n}}", progress=False, workers=n)
            for n in (0, 1)]
    assert runs[0].predictions.equals(runs[1].predictions) and runs[1].finished
"""
    (tmp_path/"run.py").write_text(code)
    subprocess.run([sys.executable, "-W", "error", tmp_path/"run.py"], check=True)


# ---- learning rates that are too high

class TestRates:
    @pytest.mark.parametrize("method", ["supervised", "pseudo_label", "hpl_paper", "ucvme", "clss"])
    def test_overflow(self, method):
        x, y, _ = rows()
        train = replace(SHORT, optimizer=OptimizerSettings(1e6, 2e6))
        with pytest.raises(HplError) as error: SemiSupervisedRegressor(method, train=train, random_state=0).fit(x, y)
        assert "training diverged. Lower the learning rates (lr_body=1e+06, lr_head=2e+06)" in str(error.value)
        assert "Repair" not in str(error.value)

    @given(st.sampled_from(["inputs", "label"]), st.integers(0, 39))
    @settings(max_examples=4, deadline=None)
    def test_a_sample_is_to_blame(self, what, row):
        "At a rate that is right, one sample that overflows is named."
        data = vectors()
        inputs, targets = data.inputs.clone(), data.targets.copy()
        if what == "inputs": inputs[row] = 1e30
        else: targets[row] = 1e30
        data = replace(data, inputs=inputs, targets=targets, normalizer=data.normalizer)
        with pytest.raises(HplError, match=rf"labelled row {row}, whose loss on the weak view is infinite. Repair the data"):
            fit(make("Supervised", 0, partial(mlp, 3)), data, replace(SHORT, epochs=4), progress=False)

    @pytest.mark.parametrize("method", ["supervised", "pseudo_label", "mean_teacher"])
    def test_predictions_far_outside(self, method):
        x, y, _ = rows()
        model = SemiSupervisedRegressor(method, train=replace(SHORT, optimizer=OptimizerSettings(10, 10)), random_state=0)
        with pytest.warns(UserWarning, match=r"more than ten label ranges outside .*learning rates \(lr_body=10, lr_head=10\)"):
            model.fit(x, y)

    @given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([1e-6, 1., 1e6]), st.floats(-1e3, 1e3), st.integers(0, 3))
    @settings(max_examples=10, deadline=None)
    def test_clean_data_do_not_warn(self, labelled, outputs, scale, offset, seed):
        data = vectors(outputs, 90, seed)
        data = replace(data, targets=scale*(data.targets + offset), labelled=data.labelled[:labelled], normalizer=None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(make("Supervised", 0, partial(mlp, 3, outputs=outputs)), data, replace(SHORT, streams=StreamSettings(1, 8)), progress=False)
