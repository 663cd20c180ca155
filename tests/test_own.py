"Own data: what is refused, what never leaks, and the README's eight lines."
import contextlib
import io
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.columns import FrameEncoder
from hpl_nb.data.core import Streams
from hpl_nb.data.own import Reading, Split, batches_for, from_arrays, from_frame, from_images
from hpl_nb.data.views import PixelStrengths, RowStrengths, Standardizer
from hpl_nb.methods.hpl import HPL
from hpl_nb.models import mlp
from hpl_nb.training.loop import fit
from hpl_nb.training.run import load_run
from hpl_nb.training.state import Train

EIGHT_LINES = '''
import numpy as np
from hpl_nb import HPL, SemiSupervisedRegressor
x = np.random.default_rng(0).normal(size=(1000, 5))  # your features: an array, a data frame, pictures, or picture files
y = np.where(np.arange(1000) < 200, x[:, 0] + np.sin(2*x[:, 1]), np.nan)  # your labels, NaN where there is none
model = SemiSupervisedRegressor(method=HPL.paper(), random_state=0).fit(x, y)
print(model.pseudo_labels_.head())  # pseudo-label, variance and weight of rows without a label
print(model.predict_interval(x[:3], coverage=.9))
model.save("model.safetensors")
'''.strip()


def test_readme_shows_the_eight_lines(root):
    assert EIGHT_LINES in (root/"README.md").read_text(encoding="utf-8")


NEEDS = {"labelled": ("weak",), "unlabelled": ("weak", "strong"), "outer": ("weak",)}


def arrays(rows=200, labelled=100, features=4, seed=0):
    "Features, labels with NaN, and all labels."
    x = np.random.default_rng(seed).normal(3, 2, (rows, features))
    y = x[:, 0] - x[:, 1]**2
    return x, np.where(np.arange(rows) < labelled, y, np.nan), y


def batches(data, steps=10, seed=0):
    "The first batches of all three streams, as one list of tensors."
    streams = Streams(data, NEEDS, batches_for(data), steps, seed)
    return [tensor for step in range(steps) for batch in streams[step].values() for tensor in batch.values()]


def equal(these, those): return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def refused(contains, function, *args, **kwargs):
    with pytest.raises(HplError) as error: function(*args, **kwargs)
    assert contains in str(error.value), str(error.value)


# the README

def test_eight_lines(tmp_path, monkeypatch):
    assert len(EIGHT_LINES.splitlines()) == 8 and max(map(len, EIGHT_LINES.splitlines())) <= 120
    monkeypatch.chdir(tmp_path)
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()): exec(EIGHT_LINES, names)
    x, model, true = names["x"], names["model"], names["x"][:, 0] + np.sin(2*names["x"][:, 1])
    assert np.abs(model.predict(x[200:]) - true[200:]).mean() < .75*np.abs(true[200:] - true[200:].mean()).mean()
    assert {"pseudo_label", "variance", "weight"} < set(out.getvalue().splitlines()[0].split()) and "low=" in out.getvalue()
    assert out.getvalue().splitlines()[1].split()[1] == "200" # the first unlabelled row
    assert np.array_equal(type(model).load("model.safetensors").predict(x), model.predict(x))


# what never leaks

def test_hidden_labels_reach_no_batch():
    x, _, y = arrays()
    data = from_arrays(x, y, split=Split(label_ratio=.2))
    changed = y.copy()
    changed[data.unlabelled] = 1e6*np.random.default_rng(1).normal(size=len(data.unlabelled))
    other = from_arrays(x, changed, split=Split(label_ratio=.2))
    assert other.normalizer == data.normalizer and equal(batches(data), batches(other))
    rows = [streams[step]["labelled"]["index"] for streams in [Streams(data, NEEDS, batches_for(data), 20, 0)] for step in range(20)]
    assert not set(torch.cat(rows).tolist()) & {*data.unlabelled, *data.val, *data.test}


def test_true_targets_only_measure():
    x, y, true = arrays()
    settings = Train(epochs=2)
    def train(**arguments):
        seed_everything(0)
        data = from_arrays(x, y, **arguments)
        return fit(HPL().build(mlp(4)), data, replace(settings, streams=batches_for(data)), progress=False)
    without, known = train(), train(true_targets=true)
    np.testing.assert_array_equal(without.predictions["y_pred"], known.predictions["y_pred"])
    assert "pseudo_label_mae" in known.metrics and "pseudo_label_mae" not in without.metrics
    assert without.metrics["test_mae"] == known.metrics["test_mae"]


def test_held_out_features_reach_no_batch():
    x, y, _ = arrays()
    data = from_arrays(x, y)
    changed = x.copy()
    changed[[*data.val, *data.test]] = 1e9
    other = from_arrays(changed, y)
    assert other.plain == data.plain and equal(batches(data), batches(other))
    moved = x.copy()
    moved[data.unlabelled] += 5 # unlabelled rows do decide
    assert from_arrays(moved, y).plain != data.plain


def test_held_out_categories_and_medians_reach_no_feature():
    frame = pd.DataFrame({"a": [1., 2, 3, 100], "c": list("xyxz"), "y": [1., 2, 3, 4], "part": ["train", "train", "val", "test"]})
    data = from_frame(frame, "y", split="part")
    assert data.notes["encoder"] == {"medians": {"a": 1.5}, "categories": {"c": ["x", "y"]}, "impute": None}
    np.testing.assert_array_equal(data.inputs[3], [100, 0, 0])


# rows and splits

def test_default_split():
    x, y, _ = arrays(300, 100)
    data = from_arrays(x, y)
    assert [len(data.rows(split)) for split in ("labelled", "unlabelled", "val", "test")] == [60, 200, 20, 20]
    assert np.isfinite(data.targets[np.concatenate([data.labelled, data.val, data.test])]).all()
    everything = [row for split in ("labelled", "unlabelled", "val", "test") for row in data.rows(split)]
    assert sorted(everything) == list(range(300))
    np.testing.assert_array_equal(from_arrays(x, y).labelled, data.labelled)
    assert set(from_arrays(x, y, split=Split(seed=1)).labelled) != set(data.labelled)
    assert len(from_arrays(x, y, split=Split(val_share=0, test_share=0)).labelled) == 100


def test_explicit_splits():
    x, y, _ = arrays(6, 6)
    names = ["train", "unlabelled", "Labelled", "val", "test", "train"]
    data = from_arrays(x, y, split=names)
    assert [data.rows(split).tolist() for split in ("labelled", "unlabelled", "val", "test")] == [[0, 2, 5], [1], [3], [4]]
    assert np.isfinite(data.targets[1]) # kept for evaluation
    lists = from_arrays(x, y, split={"val": [3], "test": np.arange(6) == 4})
    assert lists.labelled.tolist() == [0, 1, 2, 5] and lists.test.tolist() == [4]
    assert from_arrays(x, y, split={"train": [0], "val": [3]}).labelled.tolist() == [0] # the others are left out
    assert from_arrays(x, y, split=pd.Series(names)).val.tolist() == [3]


def test_label_ratio_is_nested():
    x, _, y = arrays()
    sets = [set(from_arrays(x, y, split=Split(label_ratio=ratio)).labelled) for ratio in (.05, .1, .5, 1.)]
    assert all(a < b for a, b in zip(sets, sets[1:])) and [len(s) for s in sets] == [6, 12, 60, 120]


@pytest.mark.parametrize(("contains", "arguments"), [
    ("split 'dev' is none of", {"split": ["train", "dev", "val", "val", "val", "test"]}),
    ("split has 2 entries", {"split": ["train", "val"]}),
    ("lists row 7", {"split": {"val": [7]}}),
    ("lists row -1", {"split": {"val": [-1]}}),
    ("it is in val and in test", {"split": {"val": [1], "test": [1]}}),
    ("val is of type float64", {"split": {"val": [1.5]}}),
    ("val is of type <U5", {"split": {"val": ["a.png"]}}),
    ("val is a mask of shape (2,), but there are 6 rows", {"split": {"val": np.array([True, False])}}),
    ("give names among noise, dropout, RowStrengths(...)", {"views": PixelStrengths()}),
    ("its true target", {"true_targets": np.full(6, 99.)}),
    ("6 inputs but 5 targets", {"true_targets": np.zeros(5)}),
    ("no training row has a label", {"split": ["val", "test", "val", "val", "val", "val"]}),
])
def test_refused_arguments(contains, arguments): refused(contains, from_arrays, *arrays(6, 6)[:2], **arguments)


@pytest.mark.parametrize(("contains", "arguments"), [
    ("label_ratio is 0", {"label_ratio": 0}),
    ("label_ratio is 10", {"label_ratio": 10}),
    ("sum is below 1", {"val_share": .6, "test_share": .4}),
    ("val_share is -0.1", {"val_share": -.1}),
    ("seed is 0.5; give a whole number", {"seed": .5}),
    ("did you mean 'val_share'?", {"val_shares": .1}),
])
def test_refused_splits(contains, arguments): refused(contains, Split, **arguments)


def test_a_split_by_name_may_hide_labels_too():
    x, _, y = arrays(6, 6)
    names = ["train", "train", "train", "train", "val", "test"]
    data = from_arrays(x, y, split=Split(names, label_ratio=.5))
    assert len(data.labelled) == 2 and len(data.unlabelled) == 2 and data.val.tolist() == [4]
    frame = pd.DataFrame(x, columns=list("abcd")).assign(y=y, part=names)
    assert from_frame(frame, "y", split=Split("part", label_ratio=.5)).labelled.tolist() == data.labelled.tolist()


def test_test_rows_need_labels():
    x, y, _ = arrays(6, 3)
    refused("the label of test row 5", from_arrays, x, y, split={"test": [5]})


def test_outputs():
    x, y, _ = arrays()
    data = from_arrays(x, np.stack([y, 2*y], axis=1))
    assert data.outputs == 2 and len(data.labelled) == 60
    run = fit(HPL().build(mlp(4, outputs=2)), data, Train(epochs=1, streams=batches_for(data)), progress=False)
    assert set(run.predictions["output"]) == {0, 1}
    refused("it has some of its labels only", from_arrays, x, np.stack([y, np.arange(200.)], axis=1))


# inputs

@pytest.mark.parametrize(("contains", "inputs", "targets"), [
    ("is inf; 1 such row(s)", [[1., 2], [np.inf, 3]], [1, 2]),
    ("row 1 (the first is 0): position [0] is nan", [[1., 2], [np.nan, 3]], [1, 2]),
    ("from_frame encodes", [["a"], ["b"]], [1, 2]),
    ("not one array", [[1, 2], [3]], [1, 2]),
    ("a single one as (n, 1)", [1, 2], [1, 2]),
    ("inputs have shape (0,", np.empty((0, 3)), []),
    ("channels last", np.zeros((2, 8, 8, 3)), [1, 2]),
    ("row 0 (the first is 0): label 'tall' is not a number", [[1.], [2.]], ["tall", 2]),
    ("label '-inf' is infinite", [[1.], [2.]], [1, -np.inf]),
    ("2 inputs but 3 targets", [[1.], [2.]], [1, 2, 3]),
    ("targets have shape (2, 1, 1)", [[1.], [2.]], np.zeros((2, 1, 1))),
    ("0 of 2 rows have one", [[1.], [2.]], [np.nan, np.nan]),
])
def test_refused_arrays(contains, inputs, targets): refused(contains, from_arrays, inputs, targets)


def test_arrays_are_copied():
    for x in (arrays()[0], np.zeros((200, 8, 8), np.uint8), torch.zeros(200, 3)):
        data = from_arrays(x, arrays()[1])
        before = data.inputs.clone()
        x[:] = 1
        assert torch.equal(data.inputs, before)


def test_kinds_of_arrays():
    x, y, _ = arrays()
    data = from_arrays(x, y)
    others = [from_arrays(torch.from_numpy(x), torch.from_numpy(y)), from_arrays(x.tolist(), [None if np.isnan(v) else v for v in y])]
    assert all(equal(batches(data), batches(other)) for other in others)
    assert from_arrays(x > 3, y).inputs.dtype == torch.float64
    assert from_arrays(np.zeros((200, 8, 8), np.uint16), y).inputs.shape == (200, 1, 8, 8)


def test_constant_and_large_features():
    x, y, _ = arrays()
    x[:, 0], x[:, 1] = .1, 1.6e9 + np.arange(200) # a constant; a time in seconds
    plain = from_arrays(x, y).plain(x)
    assert (plain[:, 0] == 0).all() and len(plain[:, 1].unique()) == 200


def test_views_are_functions_of_samples_and_seeds():
    images = np.random.default_rng(0).integers(0, 255, (200, 3, 16, 12), dtype=np.uint8)
    y = arrays()[1]
    for data in (from_arrays(arrays()[0], y, views=RowStrengths(feature_dropout=.3)), from_arrays(images, y)):
        samples, seeds = data.inputs[np.arange(8)], np.arange(8)
        for view in (data.weak, data.strong):
            state = torch.get_rng_state()
            a, b, c = view(samples, seeds), pickle.loads(pickle.dumps(view))(samples, seeds), view(samples, seeds + 1)
            assert a.dtype == torch.float32 and a.shape == samples.shape and torch.equal(a, b) and not torch.equal(a, c)
            assert torch.equal(torch.get_rng_state(), state)
        gap = [(view(samples, seeds) - data.plain(samples)).square().mean() for view in (data.weak, data.strong)]
        assert 0 < gap[0] < gap[1]


def test_no_strength_is_the_plain_view():
    images, y = np.random.default_rng(0).normal(size=(200, 1, 8, 8)), arrays()[1]
    none = [from_arrays(arrays()[0], y, views=RowStrengths(0, 0, 0)), from_arrays(images, y, views=PixelStrengths(0, 0, 0))]
    for data in none:
        samples = data.inputs[np.arange(8)]
        assert equal([data.weak(samples, np.arange(8)), data.strong(samples, np.arange(8))], [data.plain(samples)]*2)
    refused("weak_noise is -1", RowStrengths, -1)
    refused("cutout is 1", PixelStrengths, cutout=1)
    refused("noise is nan", PixelStrengths, noise=np.nan)


def test_run_folder_keeps_the_preparation(tmp_path):
    x, y, _ = arrays()
    frame = pd.DataFrame(x, columns=list("abcd")).assign(kind=np.where(x[:, 0] > 3, "big", "small"), y=y)
    data = from_frame(frame, "y")
    settings = Train(epochs=1, streams=batches_for(data))
    fit(HPL().build(mlp(6)), data, settings, folder=tmp_path, progress=False)
    kept = load_run(tmp_path).config["data"]
    new = FrameEncoder(**kept["encoder"]).encode(frame.iloc[5:8])
    assert torch.equal(Standardizer(**kept["standardizer"])(new), data.plain(data.inputs[5:8]))
    other = from_frame(frame, "y", views=RowStrengths(strong_noise=.3))
    refused("holds another run", fit, HPL().build(mlp(6)), other, settings, folder=tmp_path, progress=False)


def test_batches_fit():
    for labelled in (10, 30, 150):
        x, y, _ = arrays(160, labelled)
        data = from_arrays(x, y)
        settings = batches_for(data)
        Streams(data, NEEDS, settings, 1, 0)[0]
        assert settings.labelled_batch <= 32 and settings.unlabelled_batch <= 32
    x, y, _ = arrays(100, 4)
    refused("raise label_ratio or lower labelled_batch", Streams, from_arrays(x, y), NEEDS, Train().streams, 1, 0)
    full = from_arrays(x, arrays(100, 100)[1])
    refused("the unlabelled set is empty", Streams, full, NEEDS, batches_for(full), 1, 0)


# data frames

def people(rows=40):
    rng = np.random.default_rng(0)
    income = np.where(np.arange(rows) < 30, rng.normal(50, 9, rows), np.nan)
    return pd.DataFrame({"age": rng.integers(20, 60, rows), "height": rng.normal(1.7, .1, rows), "member": rng.random(rows) < .5,
                         "city": rng.choice(["Bern", "Oslo", "Rome"], rows), "income": income})


def test_frame():
    frame = people()
    data = from_frame(frame, "income", unit="thousands")
    assert data.inputs.shape == (40, 6) and data.unit == "thousands" and len(data.unlabelled) == 10
    assert FrameEncoder(**data.notes["encoder"]).features == ["age", "height", "member", "city=Bern", "city=Oslo", "city=Rome"]
    np.testing.assert_array_equal(data.inputs[:, 3:].sum(1), 1)
    for same in (frame.astype({"city": "category"}), frame.astype({"age": "Int64", "member": "boolean"}), frame.astype({"city": object})):
        np.testing.assert_array_equal(from_frame(same, "income").inputs, data.inputs)
    assert from_frame(frame, "income", columns=["age"]).inputs.shape == (40, 1)
    two = from_frame(frame.assign(spent=frame["income"]/2), ["income", "spent"], columns=["age", "city"])
    assert two.outputs == 2 and two.inputs.shape == (40, 4)


def test_frame_imputes_when_asked():
    frame = people().astype({"age": float})
    frame.loc[[2, 5], "age"], frame.loc[7, "city"] = np.nan, None
    refused("'age' in 2 row(s), 'city' in 1 row(s); the first is row 2", from_frame, frame, "income")
    data = from_frame(frame, "income", impute="median")
    train = frame.loc[[*data.labelled, *data.unlabelled], "age"]
    assert data.inputs[2, 0] == train.median() and (data.inputs[7, 3:] == 0).all()
    refused("impute is 'mean'", from_frame, frame, "income", impute="mean")
    refused("missing in all training rows", from_frame, frame.assign(age=np.nan), "income", impute="median")


@pytest.mark.parametrize(("contains", "changes", "arguments"), [
    ("target 'income': row 3 (the first is 0): label 'rich' is not a number; 1 such", {"income": "rich"}, {}),
    ("target 'income': row 3 (the first is 0): label 'inf' is infinite", {"income": np.inf}, {}),
    ("column 'height': row 3 (the first is 0): it is infinite", {"height": np.inf}, {}),
    ("column 'height': row 3 (the first is 0): '1,70' is text, but 39 of 40 values are numbers", {"height": "1,70"}, {}),
    ("no column 'salary'", {}, {"target": "salary"}),
    ("no column 'weight'", {}, {"columns": ["weight"]}),
    ("no column 'part'", {}, {"split": "part"}),
    ("'income' is a target or the split", {}, {"columns": ["income", "age"]}),
    ("text of 3 different values", {}, {"max_categories": 2}),
    ("no feature columns", {}, {"columns": []}),
    ("split 'bern' is none of", {"city": "Bern"}, {"split": "city"}),
])
def test_refused_frames(contains, changes, arguments):
    frame = people().astype(object)
    if "split" in arguments and "city" in changes: frame["city"] = "train"
    for column, value in changes.items(): frame.loc[3, column] = value
    refused(contains, from_frame, frame.infer_objects(), **{"target": "income", **arguments})


def test_refused_columns():
    frame = people()
    refused("datetime64", from_frame, frame.assign(born=pd.Timestamp("2000-01-01")), "income")
    refused("2 columns 'age'", from_frame, pd.concat([frame, frame[["age"]]], axis=1), "income")
    refused("column name 0 is not text", from_frame, frame.rename(columns={"age": 0}), "income")
    encoder = FrameEncoder(**from_frame(frame, "income").notes["encoder"])
    refused("is not numeric any more", encoder.encode, frame.assign(age="old"))
    refused("no column 'city'", encoder.encode, frame.drop(columns="city"))
    assert (encoder.encode(frame.assign(city="Paris"))[:, 3:] == 0).all()


# pictures

@pytest.fixture
def folder(tmp_path):
    "12 small pictures, and a table that labels ten of them."
    rng = np.random.default_rng(0)
    for row in range(12): Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path/f"{row}.png")
    parts = ["train"]*6 + ["val"]*2 + ["test"]*2 + ["train"]*2
    table = pd.DataFrame({"file": [f"{row}.png" for row in range(12)], "y": [*range(10), None, None], "part": parts})
    table.to_csv(tmp_path/"table.csv", index=False)
    table.to_csv(tmp_path/"table.tsv", index=False, sep="\t")
    return tmp_path


def test_images(folder):
    data = from_images(folder, folder/"table.csv", "file", "y", split="part", reading=Reading(16))
    assert [len(data.rows(split)) for split in ("labelled", "unlabelled", "val", "test")] == [6, 2, 2, 2]
    assert data.strong(data.inputs[np.arange(3)], np.arange(3)).shape == (3, 3, 16, 16) and data.sample_names[3] == "3.png"
    for table in (folder/"table.tsv", pd.read_csv(folder/"table.csv")):
        same = from_images(folder, table, "file", "y", split="part", reading=Reading(16))
        np.testing.assert_array_equal(same.targets, data.targets)
    assert len(from_images(folder, folder/"table.csv", "file", "y", reading=Reading(16)).val) == 2


@pytest.mark.parametrize(("contains", "column", "value"), [
    ("1 of 12 pictures are missing", "file", "gone.png"),
    ("for example gone.png", "file", "gone.png"),
    ("row 3 (the first is 0): it has no file name", "file", None),
    ("its picture 1.png stands in row 1 already", "file", "1.png"),
    ("its picture 1.png stands in row 1 already", "file", "./1.png"),
    ("row 3 (the first is 0): label 'old' is not a number", "y", "old"),
    ("row 3 (the first is 0): label 'inf' is infinite", "y", "inf"),
    ("split 'dev' is none of", "part", "dev"),
])
def test_refused_tables(folder, contains, column, value):
    table = pd.read_csv(folder/"table.csv").astype(object)
    table.loc[3, column] = value
    refused(contains, from_images, folder, table, "file", "y", split="part")


def test_refused_folders(folder):
    refused("there is no folder", from_images, folder/"none", folder/"table.csv", "file", "y")
    refused("there is no table", from_images, folder, folder/"none.csv", "file", "y")
    refused("no column 'name'", from_images, folder, folder/"table.csv", "name", "y")
    refused("no column 'age'", from_images, folder, folder/"table.csv", "file", "age")
    refused("has no rows", from_images, folder, pd.DataFrame({"file": [], "y": []}), "file", "y")


def test_broken_images(folder):
    (folder/"2.png").write_bytes((folder/"2.png").read_bytes()[:60])
    (folder/"11.png").unlink()
    refused("11.png", from_images, folder, folder/"table.csv", "file", "y")
    with pytest.warns(UserWarning, match="2 pictures cannot be read"):
        data = from_images(folder, folder/"table.csv", "file", "y", split="part", reading=Reading(16, skip_broken=True))
    assert list(data.notes["skipped"]) == [2, 11] and 2 not in data.labelled and 11 not in data.unlabelled
    table = pd.read_csv(folder/"table.csv").drop(11)
    with warnings.catch_warnings(): # nothing is said before a broken one is read
        warnings.simplefilter("error")
        data = from_images(folder, table, "file", "y", split="part", reading=Reading(16))
    refused("2.png", data.inputs.__getitem__, np.array([2]))


def test_repeated_images(folder):
    (folder/"1.png").write_bytes((folder/"8.png").read_bytes()) # a training picture that is also in the test
    data = from_images(folder, folder/"table.csv", "file", "y", split="part", reading=Reading(16, deduplicate=True))
    assert data.notes["duplicates"] == [1] and 1 not in data.labelled
    (folder/"11.png").unlink()
    with pytest.warns(UserWarning, match="11.png"):
        data = from_images(folder, folder/"table.csv", "file", "y", split="part", reading=Reading(16, deduplicate=True, skip_broken=True))
    assert list(data.notes["skipped"]) == [11] and data.notes["duplicates"] == [1]
