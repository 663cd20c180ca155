"""One `views=` and one `reading=` for arrays, frames and picture files; folders and paths as X; files of every release.

`tests/files` holds what hpl_nb 0.1.0 wrote, made by this script in its checkout of issue 16:

    frame = pd.DataFrame({"a": np.arange(60.) % 7, "kind": ["u", "v", "w"]*20})
    y = pd.Series(np.where(np.arange(60) < 40, 3*frame["a"] + 5, -9.))
    model = SemiSupervisedRegressor("pseudo_label", strengths=RowStrengths(strong_noise=.2), size=32, skip_broken=True, deduplicate=False,
                                    missing_label=-9, epochs=1, random_state=0).fit(frame, y)
    model.save("estimator-0.1.0.safetensors")
    x = np.random.default_rng(0).uniform(size=(40, 2))
    data = from_arrays(x, x[:, 0] + x[:, 1])
    fit(method := Supervised().build(mlp(2, (8,))), data, Train(epochs=1, iterations_per_epoch=20), progress=False)
    Predictor.from_method(method, data).save("predictor-0.1.0.safetensors")
"""
import json
import pickle
import warnings
from inspect import signature
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.ndimage import rotate
from sklearn.base import clone
from sklearn.datasets import load_digits

from hpl_nb import Reading, SemiSupervisedRegressor, from_arrays, from_frame, from_images
from hpl_nb.core import HplError
from hpl_nb.data.images import FlipCrop, image_views, randaugment_mc_views
from hpl_nb.data.views import PixelStrengths, RowStrengths
from hpl_nb.defaults import released_network
from hpl_nb.inputs import label_columns, training_data
from hpl_nb.methods.core import Supervised
from hpl_nb.models import mlp
from hpl_nb.predictor import Predictor
from hpl_nb.training.state import OptimizerSettings, Train

FILES = Path(__file__).parent/"files"
QUICK = dict(method="supervised", train=Train(iterations_per_epoch=3), epochs=1, random_state=0)


def ssr(**parameters): return SemiSupervisedRegressor(**{**QUICK, **parameters})


def turned(n=240, seed=0):
    "Turned digits of 16 x 16 bytes, and their angles."
    random = np.random.default_rng(seed)
    angles = random.uniform(-60, 60, n)
    digits = load_digits().images[random.integers(1797, size=n)].repeat(2, 1).repeat(2, 2)*15
    pictures = [rotate(np.pad(digit, 2), angle, reshape=False, order=1)[2:-2, 2:-2] for digit, angle in zip(digits, angles)]
    return (np.stack(pictures) + random.normal(0, 8, (n, 16, 16))).clip(0, 255).astype(np.uint8), angles


@pytest.fixture
def folder(tmp_path):
    "30 pictures of 16 pixels and their brightness; 12 are labelled."
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    (tmp_path/"pictures").mkdir()
    for row, picture in enumerate(pixels): Image.fromarray(picture).save(tmp_path/f"pictures/{row:02}.png")
    return tmp_path/"pictures", np.moveaxis(pixels, 3, 1), np.where(np.arange(30) < 12, pixels.mean((1, 2, 3)), np.nan)


def made(X, y, **parameters):
    "The dataset that a fit would train on."
    return training_data(ssr(**parameters), X, label_columns(y, len(X)), 0)


def test_the_constructor_has_twelve_arguments():
    names = [*signature(SemiSupervisedRegressor).parameters]
    assert [name for name in names if name != "target"] == ["method", "network", "preprocessor", "views", "reading", "epochs", "train",
                                                            "validation_fraction", "folder", "random_state", "verbose"]
    assert len(signature(from_images).parameters) <= 12 and not {"size", "skip_broken", "strengths"} & {*signature(from_images).parameters}


@pytest.mark.parametrize("views", [None, "shift", ("shift", "flip", "colour"), "randaugment", PixelStrengths(noise=.1), (),
                                   (torch.Tensor.float, lambda x: x + torch.rand(1))])
def test_arrays_and_files_of_the_same_pictures_get_the_same_views(views, folder):
    root, pixels, y = folder
    paths, seeds = sorted(root.iterdir()), np.arange(30)
    array, files = made(pixels, y, views=views), made(paths, y, views=views, reading=Reading(16))
    for name in ("weak", "strong", "plain"):
        a, b = (getattr(data, name)(data.inputs[seeds], seeds) for data in (array, files))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert array.notes.get("strengths") == files.notes.get("strengths")


def test_nothing_mirrors_or_turns_by_default(folder):
    "Each default view of a picture is a shifted one, with a square and noise: what stays is in its place."
    root, pixels, y = folder
    table = pd.DataFrame({"file": sorted(path.name for path in root.iterdir()), "y": y})
    read = Reading(16)
    for data in (made(sorted(root.iterdir()), y, reading=read), made(pixels, y), from_images(root, table, "file", "y", reading=read)):
        samples, plain = data.inputs[np.arange(30)], data.plain(data.inputs[np.arange(30)])
        for view, least in ((data.weak, .99), (data.strong, .9)):
            seen = view(samples, np.arange(30))[:, :, 3:-3, 3:-3]
            moved = torch.stack([plain[:, :, 3 + y:13 + y, 3 + x:13 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)])
            near = ((moved - seen).abs() < 1.).double().mean((2, 3, 4)).amax(0)
            assert (near > least - .2*(view is data.strong)).all()
            assert not any(torch.equal(a, b) for a, b in zip(seen, plain[:, :, 3:-3, 3:-3].flip(3)))


@pytest.mark.parametrize(("views", "expected"), [
    ("noise", RowStrengths()), (["noise", "dropout"], RowStrengths(feature_dropout=.1)), ((), RowStrengths(0., 0., 0.)),
    (None, RowStrengths())])
def test_names_for_rows(views, expected):
    x, y = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40.)
    frame = pd.DataFrame(x, columns=list("abc")).assign(y=y)
    for data in (from_arrays(x, y, views=views), from_frame(frame, "y", views=views), made(x, y, views=views)):
        assert RowStrengths(**data.notes["strengths"]) == expected


@pytest.mark.parametrize(("views", "pictures", "message"), [
    ("mirror", True, "a picture has no view 'mirror'.*It has shift, noise, cutout, flip, colour, randaugment"),
    ("flip", False, "a row has no view 'flip'"), (("noise", 3), True, "give names among"), (RowStrengths(), True, "PixelStrengths"),
    (PixelStrengths(), False, "RowStrengths"), (7, True, "views is 7"), ("randaugment", None, "uint8.*float32 in 1"),
    (randaugment_mc_views(1, "reflect", 2), True, "for picture files, and the inputs are an array"),
    ((lambda x: x[:1], torch.clone), False, r"weak view makes shape \(1,\) of \(3,\)"),
    ((torch.clone, lambda x: None), False, "strong view fails"),
    ((lambda x: x + np.random.default_rng().normal(), torch.clone), True, "differs from call to call")])
def test_views_that_are_refused_before_training(views, pictures, message):
    normal = np.random.default_rng(0).normal
    x = {True: np.zeros((20, 8, 8), np.uint8), None: normal(size=(20, 8, 8)), False: normal(size=(20, 3))}
    for call in (lambda: from_arrays(x[pictures], np.arange(20.), views=views), lambda: ssr(views=views).fit(x[pictures], np.arange(20.))):
        with warnings.catch_warnings(), pytest.raises(HplError, match=message):
            warnings.simplefilter("ignore")
            call()


def brighter(picture): return picture.float()*(1 + .1*torch.rand(1))


def test_own_functions(folder, tmp_path):
    "They get a tensor, under a seed for each picture; the file of such a fit predicts as before, and says what it does not hold."
    root, pixels, y = folder
    seen = []
    def strong(picture):
        seen.append((picture.dtype, tuple(picture.shape)))
        return brighter(picture)
    data = made(pixels, y, views=(brighter, strong))
    a, b = (data.strong(data.inputs[np.arange(4)], np.array([3, 5, 3, 6])) for _ in range(2))
    assert torch.equal(a, b) and {*seen} == {(torch.float32, (3, 16, 16))}
    alone = data.strong(data.inputs[np.array([2])], np.array([3]))
    assert torch.allclose(alone[0], a[2]) # its batch does not matter
    model = clone(ssr(views=(brighter, brighter))).fit(root, y)
    with pytest.warns(UserWarning, match="views are functions of your own, which a file does not hold"):
        path = model.save(tmp_path/"m.safetensors")
    loaded = SemiSupervisedRegressor.load(path)
    assert loaded.views is None and np.array_equal(loaded.predict(root), model.predict(root))
    assert pickle.loads(pickle.dumps(model)).views == (brighter, brighter)


@pytest.mark.parametrize("views", [("flip", "noise"), "shift", PixelStrengths(.1, flip=True), image_views(FlipCrop(1), FlipCrop(1))])
def test_views_of_files_travel(views, folder, tmp_path):
    root, _, y = folder
    model = ssr(views=views, reading=Reading(16)).fit(root, y)
    with warnings.catch_warnings(record=True) as told: loaded = SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors"))
    assert len(told) == isinstance(views, type(image_views(FlipCrop(1), FlipCrop(1))))
    assert loaded.views == (None if told else views) and loaded.reading == Reading(16)
    assert np.array_equal(loaded.predict(root), model.predict(root))


class TestFolders:
    def test_a_folder_is_its_pictures_by_name(self, folder):
        root, _, y = folder
        paths = sorted(root.iterdir())
        (root/"notes.txt").write_text("no picture")
        (root/"._00.png").write_bytes(b"left by macOS")
        expected = ssr().fit(paths, y)
        names = {path.name: label for path, label in zip(paths, y) if np.isfinite(label)}
        ways = {"in order": (root, y), "text": (str(root), y), "dictionary": (root, dict(reversed(names.items()))),
                "series": (root, pd.Series(names)), "frame": (root, pd.DataFrame({"y": pd.Series(names)}))}
        for way, (X, labels) in ways.items():
            model = ssr().fit(X, labels)
            assert np.array_equal(np.ravel(model.predict(root)), expected.predict(paths)), way
        assert model.pseudo_labels_["row"].tolist() == [path.name for path in paths[12:]]
        assert np.array_equal(expected.predict(str(paths[3])), expected.predict([paths[3]])) and expected.predict(paths[3]).shape == (1,)
        assert expected.score(root, names) == expected.score(paths, y)
        assert np.isfinite(expected.calibrate(root, np.arange(30.)).predict_interval(root, .5).low).all()

    def test_refused(self, folder):
        root, _, y = folder
        table = root.parent/"table.csv"
        table.write_text("a,b\n1,2\n")
        (root.parent/"empty").mkdir()
        for X, labels, message in (
                (table, y, "a file but no picture; read a table first, pandas.read_csv"), ("nowhere", y, "no folder and no file"),
                (root.parent/"empty", y, "holds no picture"), (root, y[:5], "30 inputs but 5 targets"),
                (root, {"00.jpg": 3.}, "'00.jpg', and the folder holds no such picture.*Name pictures as '00.png'"),
                (np.zeros((3, 2)), {"a": 1.}, "y is a dictionary, which is for a folder"), ("gone.png", [1.], "gone.png cannot be read")):
            with pytest.raises(HplError, match=message): ssr().fit(X, labels)
        model = ssr().fit(root, y)
        for X, message in ((table, "no picture"), ("nowhere", "no folder"), ("gone.png", "there is no picture gone.png")):
            with pytest.raises(HplError, match=message): model.predict(X)


class TestLabelsThatViewsChange:
    TRAIN = Train(epochs=3, iterations_per_epoch=20, optimizer=OptimizerSettings(3e-3, 3e-3))

    def told(self, views):
        pictures, angles = turned()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            SemiSupervisedRegressor("supervised", train=self.TRAIN, views=views, random_state=0).fit(pictures, angles)
        return [str(each.message) for each in told if "views" in str(each.message)]

    @pytest.mark.parametrize("views", [("flip", "noise"), PixelStrengths(flip=True, cutout=0.)])
    def test_a_mirrored_angle(self, views):
        message, = self.told(views)
        assert "after 'flip'" in message and "after 'noise'" not in message and "'noise'" in message.split("views=")[-1]

    @pytest.mark.parametrize("views", [None, (), ("noise", "colour")])
    def test_nothing_is_said_of_those_that_do_not(self, views): assert not self.told(views)

    def test_own_functions(self):
        message, = self.told((lambda picture: picture.flip(2), torch.clone))
        assert "the weak view" in message


class TestFilesOfReleases:
    def test_an_estimator(self):
        frame = pd.DataFrame({"a": np.arange(60.) % 7, "kind": ["u", "v", "w"]*20})
        model = SemiSupervisedRegressor.load(FILES/"estimator-0.1.0.safetensors")
        assert model.reading == Reading(size=32, skip_broken=True, missing_label=-9.) and model.views == RowStrengths(strong_noise=.2)
        np.testing.assert_allclose(model.predict(frame[:3]), [4.598315915484596, 7.478813248105221, 10.344103340963338], rtol=1e-4)
        np.testing.assert_allclose(model.predict_interval(frame[:1], .5).high, [5.0273749], rtol=1e-4)
        again = clone(model).set_params(epochs=1).fit(frame, np.where(np.arange(60) < 40, 3*frame["a"] + 5, -9.))
        assert len(again.pseudo_labels_) == 20

    def test_a_predictor(self):
        predictor = Predictor.load(FILES/"predictor-0.1.0.safetensors", Supervised().build(mlp(2, (8,))))
        x = np.random.default_rng(0).uniform(size=(40, 2))
        np.testing.assert_allclose(predictor.predict(x[:3]), [1.0292272755546932, 0.6679771592095096, 1.1106346247960353], rtol=1e-4)

    def test_a_file_without_some_parameters_takes_the_defaults(self, tmp_path):
        from hpl_nb.predictor import read_content, write_content
        content = read_content(FILES/"estimator-0.1.0.safetensors")
        for name in [*content["estimator"]["parameters"]]: del content["estimator"]["parameters"][name]
        model = SemiSupervisedRegressor.load(write_content(tmp_path/"m.safetensors", content))
        default = SemiSupervisedRegressor().get_params(deep=False)
        assert json.dumps(model.get_params(deep=False), default=str) == json.dumps(default, default=str)

    def test_pictures_of_0_1_0_keep_their_network(self, tmp_path):
        "Their default network averaged over the whole picture, and the file does not say so."
        pictures, angles = turned(60)
        model = ssr(network=lambda shape, outputs: released_network(shape, outputs)).fit(pictures, angles)
        model.network = model.network_ = model.defaults_ = None # as such a file has it
        old = SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors"))
        assert np.array_equal(old.predict(pictures), model.predict(pictures))
        again = SemiSupervisedRegressor.load(old.save(tmp_path/"again.safetensors"))
        assert np.array_equal(again.predict(pictures), model.predict(pictures))


def test_reading_of_pictures_and_a_table(folder):
    "`from_images` knows a number that says that there is no label, and reads pictures as the estimator does."
    root, _, y = folder
    table = pd.DataFrame({"file": sorted(path.name for path in root.iterdir()), "y": np.nan_to_num(y, nan=-1)})
    data = from_images(root, table, "file", "y", reading=Reading(16, missing_label=-1))
    assert len(data.unlabelled) == 18 and data.inputs.size == 16 and from_images(root, table, "file", "y").inputs.size == 224
    assert Reading() == Reading(missing_label=float("nan"))
