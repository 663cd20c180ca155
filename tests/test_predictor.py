"Predictors: what was trained predicts the same from a file as in the run, intervals hold what they promise, and bad input is refused."
import json
import math
import os
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import beta, kstest
from small_runs import METHODS, SETTINGS, differences, digits, make, noisy_cnn, on_cpu, vectors  # noqa: F401

from hpl_nb import predictor as module
from hpl_nb.core import HplError
from hpl_nb.data.own import Reading, Split, from_arrays, from_frame, from_images
from hpl_nb.methods.core import FullySupervised, Supervised
from hpl_nb.methods.hpl import HPL
from hpl_nb.methods.ucvme import UCVME
from hpl_nb.models import Body, Head, Regressor, mlp, resnet, small_cnn
from hpl_nb.predictor import Predictor, conformal_radius, read_content
from hpl_nb.training.loop import fit
from hpl_nb.training.run import load_run

QUICK = replace(SETTINGS, epochs=2, iterations_per_epoch=3, record_every=0)


@lru_cache
def table(rows=160, seed=0):
    "Two numbers, a column of text, a column with holes, two targets, of which half are unknown."
    random = np.random.default_rng(seed)
    frame = pd.DataFrame({"a": random.normal(size=rows), "b": random.normal(size=rows), "kind": random.choice(["p", "q", "ö"], rows),
                          "holes": np.where(random.random(rows) < .2, np.nan, random.normal(size=rows))})
    frame["y"] = np.where(np.arange(rows) < rows//2, 50 + 7*frame["a"] - frame["b"] + random.normal(size=rows), np.nan)
    return frame.assign(z=frame["y"]*frame["a"])


def frame_data(target="y"):
    return from_frame(table(), target, columns=["a", "b", "kind", "holes"], impute="median", split=Split(label_ratio=.8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "A folder of small pictures of unequal size, grey and coloured, whose target is their brightness."
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    levels = random.uniform(40, 200, 60)
    for row, level in enumerate(levels):
        pixels = random.normal(level, 20, (20 + row % 3, 24, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels if row % 2 else pixels[..., 0]).save(root/f"{row}.png")
    pd.DataFrame({"file": [f"{row}.png" for row in range(60)], "level": np.where(np.arange(60) < 40, levels, np.nan)}).to_csv(
        root/"table.csv", index=False)
    return root


# ---- many rows

def test_pieces_are_whole_batches_and_an_error_is_that_of_all_rows():
    "So that a row is in the same batch of the network, and its number in a message is its own."
    sizes = []

    def double(rows):
        sizes.append(len(rows))
        if np.isinf(rows := np.asarray(rows)).any(): raise HplError(f"row {np.flatnonzero(np.isinf(rows).any(1))}")
        return 2*rows[:, 0]

    x = np.arange(3000.*400).reshape(3000, 400)
    for rows in (x, pd.DataFrame(x), torch.from_numpy(x)): assert np.array_equal(module.in_pieces(double, rows), 2*x[:, 0])
    assert sizes == [2560, 440]*3
    x[2700, 3] = np.inf
    with pytest.raises(HplError, match=r"row \[2700\]"): module.in_pieces(double, x)
    sizes.clear()
    assert len(module.in_pieces(double, x[:2560])) == 2560 and sizes == [2560]


@pytest.mark.parametrize("settings", [Supervised(), UCVME(test_passes=2)])
def test_a_table_in_pieces_is_predicted_as_a_whole(settings):
    "To the bit, also where each batch draws the same masks."
    x = np.random.default_rng(0).normal(size=(2700, 400))
    data = from_arrays(x[:100], np.where(np.arange(100) < 60, x[:100, 0], np.nan))
    predictor = Predictor.from_method(settings.build(*[mlp(400, dropout=.1) for _ in range(settings.networks)]), data)
    assert np.array_equal(predictor.predict(x), module.predictions(predictor, predictor.reader(x), np.arange(2700))[:, 0])
    x[2600, 1] = np.nan
    with pytest.raises(HplError, match="new rows, inputs: row 2600 "): predictor.predict(x)


def picture_data(root): return from_images(root, root/"table.csv", "file", "level", reading=Reading(16))


def trained(method, data, **options): return fit(method, data, QUICK, progress=False, **options)


def selected(run):
    "Predictions of the selected epoch, (n, K), with their row numbers."
    rows = run.predictions[run.predictions["epoch"] == run.metrics["epoch"]]
    wide = rows.pivot(index="index", columns="output", values="y_pred")
    return wide.index.to_numpy(), wide.to_numpy()


def same_as_run(predictor, run, inputs):
    rows, expected = selected(run)
    found = predictor.predict(inputs).reshape(-1, expected.shape[1])[rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6*max(predictor.normalizer.scale))


def assert_equal(a, b, inputs):
    "Two predictors say the same to the bit, on predictions and on limits."
    for x, y in zip(a.predict_interval(inputs, .8), b.predict_interval(inputs, .8)): assert np.array_equal(x, y)
    assert differences(a.errors.tolist(), b.errors.tolist()) == [] and (a.name, a.unit) == (b.name, b.unit)


@pytest.mark.parametrize("name", METHODS)
def test_round_trip_of_every_method(name, tmp_path):
    "From the run's own numbers through a file into a fresh method: equal to the trainer's table, and equal to the bit."
    if name == "SSDKL": pytest.importorskip("gpytorch")
    data = digits()
    run = trained(method := make(name), data)
    predictor = Predictor.from_method(method, data)
    fresh = make(name, seed=7)
    other = Predictor.from_method(untouched(name, data), data)
    assert not np.array_equal(predictor.predict(data.inputs[:5]), other.predict(data.inputs[:5]))
    loaded = Predictor.load(predictor.save(tmp_path/"model.safetensors"), fresh)
    same_as_run(loaded, run, data.inputs)
    assert_equal(loaded, predictor, data.inputs[data.test])
    assert set(fresh.state_dict()) == {key for key in method.state_dict() if not key.startswith("table.")}


def untouched(name, data):
    "A method that has seen the data, but was not trained."
    method = make(name, seed=7)
    method.prepare(data)
    return method


@pytest.mark.parametrize("target", ["y", ["y", "z"]])
def test_frames(target, tmp_path):
    data, outputs = frame_data(target), len(np.atleast_1d(target))
    run = trained(method := make("MeanTeacher", regressor=lambda: mlp(6, outputs=outputs)), data)
    path = Predictor.from_method(method, data).save(tmp_path/"m.safetensors")
    loaded = Predictor.load(path, make("MeanTeacher", 3, lambda: mlp(6, outputs=outputs)))
    same_as_run(loaded, run, table())
    new = table(9, seed=3)[["holes", "kind", "b", "a"]] # other order, no targets, and missing numbers
    assert new["holes"].isna().any()
    interval = loaded.predict_interval(new)
    shape = (9,) if outputs == 1 else (9, 2)
    assert all(part.shape == shape for part in interval)
    radius = conformal_radius(loaded.errors, .9)
    np.testing.assert_allclose((interval.high - interval.low)/2, np.broadcast_to(radius if outputs > 1 else radius[0], shape), rtol=1e-12)
    one_by_one = np.concatenate([loaded.predict(new.iloc[[row]]) for row in range(9)])
    np.testing.assert_allclose(one_by_one, interval.prediction, rtol=1e-5)


def test_the_file_keeps_a_frame_exactly(tmp_path):
    data = frame_data()
    saved = Predictor.from_method(Supervised().build(mlp(6)), data)
    loaded = Predictor.load(saved.save(tmp_path/"m.safetensors"), Supervised().build(mlp(6)))
    assert loaded.reader == saved.reader and loaded.view == data.plain and loaded.normalizer == data.normalizer
    assert loaded.reader.encoder.categories == {"kind": ["p", "q", "ö"]}


def test_pictures(pictures, tmp_path):
    data = picture_data(pictures)
    run = trained(method := make("HPL paper", regressor=lambda: small_cnn(3, width=4)), data)
    path = Predictor.from_method(method, data).save(tmp_path/"m.safetensors")
    loaded = Predictor.load(path, make("HPL paper", 5, lambda: small_cnn(3, width=4)))
    names = [pictures/f"{row}.png" for row in range(60)]
    same_as_run(loaded, run, names)
    same_as_run(loaded, run, data.inputs)
    assert np.array_equal(loaded.predict([str(name) for name in names[:3]]), loaded.predict(names[:3]))
    assert loaded.view == data.plain and loaded.reader.size == 16


@pytest.mark.parametrize("channels", [None, 3])
def test_arrays_of_pixels(channels, tmp_path):
    random = np.random.default_rng(0)
    shape = (80, 8, 8) if channels is None else (80, channels, 8, 8)
    x, y = random.integers(0, 256, shape, dtype=np.uint8), random.normal(size=80)
    data = from_arrays(x, y, split=Split(label_ratio=.5))
    method, fresh = (Supervised().build(small_cnn(channels or 1, width=4)) for _ in range(2))
    run = trained(method, data)
    loaded = Predictor.load(Predictor.from_method(method, data).save(tmp_path/"m.safetensors"), fresh)
    same_as_run(loaded, run, x)
    same_as_run(loaded, run, torch.from_numpy(x))
    with pytest.raises(HplError, match="trained on uint8; give pixels of the same range"): loaded.predict(x/255)


def test_a_plain_view_that_changes_nothing(tmp_path):
    "Inputs that are no product of `own`: float32 vectors, and no standardisation."
    data = vectors(outputs=2)
    run = trained(method := Supervised().build(mlp(3, outputs=2)), data)
    loaded = Predictor.load(Predictor.from_method(method, data).save(tmp_path/"m.safetensors"), Supervised().build(mlp(3, outputs=2)))
    same_as_run(loaded, run, data.inputs.numpy().astype(float))


def test_words(tmp_path):
    "Integer inputs come back as they are; there is no pattern of numbers to probe a network of words with."
    class Embed(torch.nn.Module):
        def __init__(self): super().__init__(); self.table = torch.nn.Embedding(10, 4)
        def forward(self, x): return self.table(x).mean(1)
    def build(): return Supervised().build(Regressor(Body(Embed(), 4), Head(4, 1)))
    data = vectors()
    data = replace(data, inputs=(3*data.inputs.abs()).long().clamp(max=9), weak=data.plain, strong=data.plain)
    run = trained(method := build(), data)
    loaded = Predictor.load(Predictor.from_method(method, data).save(tmp_path/"m.safetensors"), build())
    same_as_run(loaded, run, data.inputs)
    assert loaded.probe_shape is None


def test_fully_supervised_and_the_data_it_was_given():
    run = trained(method := FullySupervised().build(noisy_cnn()), digits())
    same_as_run(Predictor.from_method(method, digits()), run, digits().inputs)


def test_batch_norm_and_extra_state_of_a_resnet(tmp_path):
    data = from_arrays(np.random.default_rng(0).normal(size=(40, 3, 32, 32)), np.arange(40.))
    saved = Predictor.from_method(Supervised().build(resnet(18)), data)
    assert_equal(Predictor.load(saved.save(tmp_path/"m.safetensors"), Supervised().build(resnet(18))), saved, data.inputs[:3])


def test_from_folder(tmp_path):
    "A finished run's best checkpoint, with the method and the data built again."
    for name in ("HPL paper", "TNNR", "TemporalEnsembling"):
        run = fit(make(name), digits(), SETTINGS, folder=tmp_path/name, progress=False)
        predictor = Predictor.from_folder(tmp_path/name, make(name, seed=4), digits())
        same_as_run(predictor, load_run(tmp_path/name), digits().inputs)
        same_as_run(predictor, run, digits().inputs)
    with pytest.raises(HplError, match="another run: method is 'TNNR' there and 'MeanTeacher' here"):
        Predictor.from_folder(tmp_path/"TNNR", make("MeanTeacher"), digits())
    other = replace(digits(), labelled=digits().labelled[:-1], normalizer=None)
    with pytest.raises(HplError, match="another run: rows.labelled is"): Predictor.from_folder(tmp_path/"TNNR", make("TNNR"), other)
    with pytest.raises(HplError, match="holds no run"): Predictor.from_folder(tmp_path/"nothing", make("TNNR"), digits())


def test_mode_random_state_and_weights_stay():
    predictor = Predictor.from_method(make("UCVME"), digits())
    before = {name: value.clone() for name, value in predictor.method.state_dict().items()}
    predictor.method.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = predictor.predict(digits().inputs[:300])
    assert predictor.method.training and torch.equal(torch.get_rng_state(), state)
    assert not differences(before, dict(predictor.method.state_dict()))
    assert all(p.grad is None for p in predictor.method.parameters())
    assert np.array_equal(first, predictor.predict(digits().inputs[:300]))
    assert predictor.predict(digits().inputs[:300]).shape == (300,) and first.dtype == np.float64


@pytest.mark.cuda
def test_on_the_gpu(tmp_path):
    data = digits()
    for name in METHODS:
        trained(method := make(name), data)
        path = Predictor.from_method(method, data).save(tmp_path/f"{name}.safetensors")
        there, here = (Predictor.load(path, make(name, 3).to(device)) for device in ("cuda", "cpu"))
        np.testing.assert_allclose(there.predict(data.inputs[:20]), here.predict(data.inputs[:20]), atol=.05*data.normalizer.scale[0])
        assert next(there.method.parameters()).is_cuda


@pytest.mark.parametrize("n, coverage", [(19, .9), (40, .8), (101, .95)])
def test_radius_against_the_exact_law(n, coverage):
    "The coverage of one calibration is Beta(k, n + 1 - k), whatever continuous law the errors have."
    errors = np.random.default_rng(n).exponential(size=(5000, n))**3
    covered = 1 - np.exp(-np.array([conformal_radius(row, coverage)[0] for row in errors])**(1/3))
    k = math.ceil(coverage*(n + 1))
    assert kstest(covered, beta(k, n + 1 - k).cdf).pvalue > 1e-3
    assert abs(covered.mean() - k/(n + 1)) < 4*covered.std()/len(covered)**.5
    np.testing.assert_array_equal(conformal_radius(errors[0], coverage), [np.sort(errors[0])[k - 1]])


def test_radius_by_counting():
    "In exact fractions: the smallest error that at least (n + 1) c of the n do not exceed."
    for n in (9, 20, 99, 1000):
        errors = np.random.default_rng(n).normal(size=(n, 3))**2
        for coverage in (.1, .5, .55, .7, .9):
            counts = (errors[None] <= errors[:, None]).sum(1)
            enough = counts >= Fraction(n + 1)*Fraction(str(coverage))
            expected = np.where(enough, errors, np.inf).min(0)
            np.testing.assert_array_equal(conformal_radius(errors, coverage), expected)


def test_ties_only_add_coverage():
    errors = np.random.default_rng(0).integers(0, 4, (4000, 30))
    radius = np.array([conformal_radius(row, .8)[0] for row in errors])
    assert (np.minimum(radius + 1, 4)/4).mean() >= .8


@pytest.mark.parametrize("coverage", [.5, .9, .95, .99, .999])
def test_the_number_of_rows_that_is_named_suffices(coverage):
    with pytest.raises(HplError) as caught: conformal_radius(np.ones(0), coverage)
    needed = int(str(caught.value).split("needs ")[1].split()[0])
    conformal_radius(np.ones(needed), coverage)
    with pytest.raises(HplError, match=f"needs {needed} rows .* and there are {needed - 1}"):
        conformal_radius(np.ones(needed - 1), coverage)


@pytest.mark.parametrize("n", [1, 7, 20, 333])
def test_the_coverage_that_is_named_is_possible(n):
    with pytest.raises(HplError) as caught: conformal_radius(np.ones(n), .9999)
    conformal_radius(np.ones(n), float(str(caught.value).split("at most ")[1].split(",")[0]))


@pytest.mark.parametrize("coverage", [0, 1, -.1, 90, float("nan")])
def test_coverage_is_a_share(coverage):
    with pytest.raises(HplError, match="give a share above 0 and below 1"): conformal_radius(np.ones(50), coverage)


def test_predictor_covers_new_rows():
    "Whole path, an untrained network: calibration and new rows are drawn alike, so coverage is known to be k/(n + 1) on average."
    shares, n = [], 39
    for seed in range(40):
        random = np.random.default_rng(seed)
        x, y = random.normal(size=(600, 2)), random.standard_t(3, size=600)
        data = from_arrays(x, y, split={"train": range(20), "val": range(20, 20 + n), "test": range(20 + n, 600)})
        _, low, high = Predictor.from_method(Supervised().build(mlp(2)), data).predict_interval(x[data.test], .9)
        shares.append(np.mean((low <= y[data.test]) & (y[data.test] <= high)))
    law = beta(36, 4)
    assert abs(np.mean(shares) - law.mean()) < 4*law.std()/len(shares)**.5


def test_calibration_rows_can_be_named():
    data = digits()
    chosen = Predictor.from_method(method := Supervised().build(noisy_cnn()), data, calibration=data.test[:30])
    with torch.no_grad(): y = data.normalizer.denormalize(method.eval().predict(data.plain(data.inputs[data.test[:30]])).double().numpy())
    np.testing.assert_array_equal(chosen.errors, np.abs(data.targets[data.test[:30]] - y))
    for rows in (data.labelled[:1], data.unlabelled[:1]):
        with pytest.raises(HplError, match=f"calibration names row {rows[0]}, which was trained on"):
            Predictor.from_method(method, data, calibration=rows)
    data = from_arrays(np.ones((9, 2)), [1, 2, 3, 4, 5, 6, 7, 8, np.nan], split={"labelled": range(6), "val": [6, 7]})
    with pytest.raises(HplError, match="row 8, whose label is not known"):
        Predictor.from_method(Supervised().build(mlp(2)), data, calibration=[7, 8])


def test_without_calibration_rows_there_is_no_interval():
    data = from_arrays(np.random.default_rng(0).normal(size=(30, 2)), np.arange(30.), split=Split(val_share=0., test_share=.3))
    predictor = Predictor.from_method(Supervised().build(mlp(2)), data)
    assert predictor.predict(np.zeros((4, 2))).shape == (4,)
    with pytest.raises(HplError, match="coverage 0.9 needs 9 rows .* and there are 0; keep more rows out of training"):
        predictor.predict_interval(np.zeros((4, 2)))


@lru_cache
def array_predictor():
    data = from_arrays(np.random.default_rng(0).normal(size=(60, 3)), np.arange(60.))
    return Predictor.from_method(Supervised().build(mlp(3)), data)


@pytest.mark.parametrize("inputs, message", [
    (np.ones((4, 2)), r"new rows have shape \(4, 2\); .* give \(n, 3\)"), (np.ones(3), "inputs have shape"),
    (np.array([[1., np.nan, 3]]), r"row 0 .* position \[1\] is nan"), (np.full((2, 3), np.inf), "is inf"),
    (np.array([["a", "b", "c"]]), "not numbers"), ([[1, 2, 3], [4, 5]], "not one array"), (np.ones((0, 3)), "inputs have shape"),
    (None, "not numbers")])
def test_wrong_arrays(inputs, message):
    with pytest.raises(HplError, match=message): array_predictor().predict(inputs)


@pytest.mark.parametrize("change, message", [
    (lambda f: f.drop(columns="kind"), "no column 'kind'"), (lambda f: f.assign(a="x"), "column 'a' is not numeric"),
    (lambda f: f.assign(b=np.inf), "infinite"), (lambda f: pd.concat([f, f[["a"]]], axis=1), "2 column"),
    (lambda f: f.to_numpy(), "give one with columns 'a', 'b', 'holes', 'kind'")])
def test_wrong_frames(change, message):
    predictor = Predictor.from_method(Supervised().build(mlp(6)), frame_data())
    with pytest.raises(HplError, match=message): predictor.predict(change(table()))


def test_missing_features_without_imputation():
    data = from_frame(table(), "y", columns=["a", "kind"])
    predictor = Predictor.from_method(Supervised().build(mlp(4)), data)
    with pytest.raises(HplError, match="features are missing: 'a' in 1 row"):
        predictor.predict(table().assign(a=[np.nan, *table()["a"][1:]]))
    assert len(predictor.predict(table()[:0])) == 0


def test_wrong_pictures(pictures, tmp_path):
    predictor = Predictor.from_method(Supervised().build(small_cnn(3, width=4)), picture_data(pictures))
    (broken := tmp_path/"broken.png").write_bytes((pictures/"1.png").read_bytes()[:100])
    for inputs, message in (([broken], "broken.png cannot be read"), ([tmp_path/"gone.png"], "new row 0: there is no picture .*gone.png"),
                            (str(pictures/"1.png"), "give a list of picture files"), ([np.ones((8, 8))], "new row 0 is ndarray")):
        with pytest.raises(HplError, match=message): predictor.predict(inputs)
    assert predictor.predict([]).shape == (0,)


def test_inputs_that_cannot_be_read_again():
    class Rows(list):
        def __getitem__(self, rows): return torch.stack([list.__getitem__(self, int(row)) for row in rows])
    data = vectors()
    with pytest.raises(HplError, match="these inputs are Rows"):
        Predictor.from_method(Supervised().build(mlp(3)), replace(data, inputs=Rows(data.inputs)))


@pytest.mark.parametrize("build, message", [
    (lambda: make("PseudoLabel", regressor=lambda: mlp(3)), "kind is 'Supervised' there and 'PseudoLabel' here"),
    (lambda: Supervised().build(mlp(4)), r"is \(64, 3\) there and \(64, 4\) here"), (lambda: Supervised().build(mlp(3, outputs=2)), "head"),
    (lambda: Supervised().build(mlp(3, (64,))), "unknown here"), (lambda: Supervised().build(mlp(3, (64, 64, 64))), "missing"),
    (lambda: Supervised().build(tanh(mlp(3))), "the network has other layers")])
def test_another_method_is_refused(build, message, tmp_path):
    path = array_predictor().save(tmp_path/"m.safetensors")
    with pytest.raises(HplError, match=message): Predictor.load(path, build())


def tanh(regressor):
    for i, layer in enumerate(regressor.body.network):
        if isinstance(layer, torch.nn.ReLU): regressor.body.network[i] = torch.nn.Tanh()
    return regressor


def test_a_refused_method_is_unchanged(tmp_path):
    "Also its batch norm, whose buffers would be given the file's shape."
    data = digits()
    path = Predictor.from_method(Supervised().build(small_cnn(width=8)), data).save(tmp_path/"m.safetensors")
    method = Supervised().build(small_cnn(width=4))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with pytest.raises(HplError, match="another method or model"): Predictor.load(path, method)
    assert not differences(before, dict(method.state_dict()))


def test_damaged_bytes_are_found(tmp_path):
    "Header, JSON, checksum and tensors: no changed byte and no cut gives a predictor that says something else."
    data = from_arrays(np.random.default_rng(0).normal(size=(20, 1)), np.arange(20.))
    path = Predictor.from_method(Supervised().build(mlp(1, (2,))), data).save(tmp_path/"m.safetensors")
    whole, bad, expected = path.read_bytes(), tmp_path/"bad.safetensors", read_content(path)
    for place in range(0, len(whole), 3):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        try: content = read_content(bad)
        except HplError as error: assert "bad.safetensors" in str(error)
        else: assert not differences(content["state"], expected["state"]) and repr(content) == repr(expected)
    for end in range(0, len(whole), 37):
        bad.write_bytes(whole[:end])
        with pytest.raises(HplError, match="damaged"): read_content(bad)


def test_foreign_files(tmp_path):
    files = {"weights": lambda path: save_file({"a": torch.ones(2)}, path), "pickle": lambda path: torch.save({"a": 1}, path),
             "text": lambda path: path.write_text("no model"), "empty": lambda path: path.write_bytes(b"")}
    for name, write in files.items():
        write(path := tmp_path/name)
        with pytest.raises(HplError, match="holds tensors but no predictor" if name == "weights" else "cannot be read"):
            Predictor.load(path, Supervised().build(mlp(3)))
    with pytest.raises(HplError, match="there is no file .*gone"): Predictor.load(tmp_path/"gone", Supervised().build(mlp(3)))
    with pytest.raises(HplError, match="there is no file"): Predictor.load(tmp_path, Supervised().build(mlp(3)))


@pytest.mark.parametrize("number, advice", [(1, "save it again"), (3, "update hpl_nb"), ("x", "update hpl_nb"), (None, "update hpl_nb")])
def test_another_format_is_refused(number, advice, tmp_path):
    module.write_content(tmp_path/"m.safetensors", {"format": number, "new": {"things": torch.ones(1)}})
    with pytest.raises(HplError, match=f"is of format {number!r}, which hpl_nb .* does not know; {advice}"):
        Predictor.load(tmp_path/"m.safetensors", Supervised().build(mlp(3)))


def test_other_settings_are_named(tmp_path):
    "With their dotted names; the display name of a variant is no setting."
    path = Predictor.from_method(HPL.paper().build(mlp(3)), data := vectors()).save(tmp_path/"m.safetensors")
    with pytest.raises(HplError, match="another method: learner.learner_lr is 0.0001 there and 0.5 here. Build"):
        Predictor.load(path, HPL.paper(learner_lr=.5).build(mlp(3)))
    assert np.isfinite(Predictor.load(path, HPL.paper(label="mine").build(mlp(3))).predict(data.inputs[:2])).all()


def test_saving_is_whole_or_not_there(tmp_path, monkeypatch):
    path = array_predictor().save(tmp_path/"m.safetensors")
    before = path.read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HplError, match="No space left on device"): array_predictor().save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    assert array_predictor().save(path).read_bytes() == before # saved again, the same file


def test_a_view_of_one_s_own(tmp_path):
    data = from_arrays(np.random.default_rng(0).normal(size=(40, 3)), np.arange(40.))
    data = replace(data, plain=lambda samples, seeds=None: samples.float()**3)
    saved = Predictor.from_method(Supervised().build(mlp(3)), data)
    path = saved.save(tmp_path/"m.safetensors")
    with pytest.raises(HplError, match="which is a function of your own: pass the data"): Predictor.load(path, Supervised().build(mlp(3)))
    assert_equal(Predictor.load(path, Supervised().build(mlp(3)), data=data), saved, data.inputs[:4])
    other = replace(data, labelled=data.labelled[:-1], normalizer=None)
    with pytest.raises(HplError, match="trained on other data"): Predictor.load(path, Supervised().build(mlp(3)), data=other)


def test_nothing_else_is_packed():
    with pytest.raises(HplError, match="b/0 is set, which a predictor's file cannot hold"): module.pack({"b": [{1}]}, {})
    settings = [HPL.release(outer_every=3), Split(seed=2)]
    again, = module.unpack(json.loads(json.dumps(module.pack(settings[:1], {}))), {})
    assert again == settings[0] and again.title == settings[0].title
    with pytest.raises(HplError, match="kind is 'Split'; this version knows"): module.unpack(module.pack(settings, {}), {})
    value = {"a": [1, (2., None, True)], "dict": {"tensor": "x"}, "t": torch.tensor(3), "n": torch.ones(0, 2), "plain": module.plain_view}
    again = module.unpack(json.loads(json.dumps(module.pack(value, tensors := {}))), tensors)
    assert not differences({k: v for k, v in value.items() if k != "plain"}, {k: v for k, v in again.items() if k != "plain"})
    assert again["plain"] is module.plain_view
