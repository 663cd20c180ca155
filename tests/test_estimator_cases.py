"Faults that people met in neighbouring projects, and the kinds behind them: shapes, types, ways to say 'no label', own networks."
import decimal
import pickle
import re
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import BaggingRegressor
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.multioutput import MultiOutputRegressor
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, PowerTransformer, StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from small_runs import on_cpu  # noqa: F401
from torch import nn
from torchvision.models import mobilenet_v3_small

from hpl_nb.core import HplError
from hpl_nb.data.own import Reading, from_arrays
from hpl_nb.estimator import SemiSupervisedRegressor
from hpl_nb.inputs import label_columns
from hpl_nb.methods.core import PseudoLabel, PseudoLabelMethod, Supervised
from hpl_nb.methods.hpl import HPL
from hpl_nb.models import Body, Regressor, mlp, resnet, small_cnn
from hpl_nb.predictor import Predictor
from hpl_nb.training.state import OptimizerSettings, Train

estimator = pytest.importorskip("hpl_nb.estimator")
LabelledKFold = getattr(estimator, "LabelledKFold", None)
FAST = Train(iterations_per_epoch=3)


def ssr(method="pseudo_label", **parameters):
    return SemiSupervisedRegressor(method, **{"epochs": 1, "train": FAST, "random_state": 0, **parameters})


@pytest.fixture(scope="module")
def rows():
    "The table of CASES.md: 120 rows of which 40 have a label."
    x = np.random.default_rng(0).normal(size=(120, 4))
    t = x[:, 0] + .5*np.sin(2*x[:, 1])
    return x, np.where(np.arange(120) < 40, t, np.nan), t


@dataclass(frozen=True)
class Mine(PseudoLabel):
    "Settings of one's own."
    short:ClassVar[str] = "mine"
    scale:float=.1
    def build(self, regressor): return PseudoLabelMethod(regressor, self)


def own_learner(inputs): return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, 1))


def reload(model, folder): return SemiSupervisedRegressor.load(model.save(folder/"m.safetensors"))


class TestPictures:
    "Case 1: pictures of any shape."
    @staticmethod
    def goes_round(x, folder):
        y = np.where(np.arange(len(x)) < len(x)//2, x.reshape(len(x), -1)[:, 0], np.nan)
        model = ssr(train=Train(iterations_per_epoch=2)).fit(x, y)
        assert np.isfinite(model.predict(x)).all() and np.array_equal(reload(model, folder).predict(x), model.predict(x))

    @pytest.mark.parametrize("shape", [(24, 65, 65), (8, 1, 100, 100), (8, 4, 100, 100), (8, 1, 1), (8, 2, 3), (8, 10, 1, 1), (8, 1, 65)])
    def test_cases(self, shape, tmp_path): self.goes_round(np.random.default_rng(0).normal(size=shape), tmp_path)

    @settings(max_examples=12, deadline=None)
    @given(st.integers(1, 6), st.integers(1, 11), st.integers(1, 11), st.integers(8, 12))
    def test_any_shape(self, channels, height, width, n):
        y = np.arange(n, dtype=float)
        x = np.random.default_rng(n).integers(0, 256, (n, channels, height, width), dtype=np.uint8)
        if width in (1, 3, 4) and channels > 4 and height > 4: x = self.as_advised(x)[1]
        model = ssr(train=Train(iterations_per_epoch=2)).fit(x, np.where(y < 5, y, np.nan))
        assert model.predict(x).shape == (n,) and np.isfinite(model.predict(x)).all()

    @staticmethod
    def as_advised(x):
        "What the message about channels last or first says to give instead, for either."
        says = f"may have {x.shape[3]} channels last or {x.shape[1]} first"
        with pytest.raises(HplError, match=says) as caught: ssr().fit(x, x[:, 0, 0, 0])
        return [eval(call, {"np": np, "inputs": x}) for call in re.findall(r"np\.\w+\(inputs.*?\)", str(caught.value))]

    @pytest.mark.parametrize("shape", [(8, 16, 40, 1), (8, 6, 9, 3), (8, 30, 5, 4)])
    def test_the_advice_on_channels_can_be_followed(self, shape, tmp_path):
        last, first = self.as_advised(np.random.default_rng(0).normal(size=shape))
        assert last.shape[1] == shape[3] and first.shape[1] == shape[1]
        for x in (last, first): self.goes_round(x, tmp_path)

    def test_networks_are_as_before(self):
        "Torch's own layers, to the bit, where these work."
        torch.manual_seed(0)
        ours, x = small_cnn(2, 4), torch.randn(3, 2, 13, 9)
        theirs = nn.Sequential(*[nn.MaxPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in ours.body.network])
        for layer in theirs:
            if isinstance(layer, nn.BatchNorm2d): layer.__class__ = nn.BatchNorm2d
        assert torch.equal(ours.features(x), theirs(x))

    def test_channels_of_a_resnet(self, tmp_path):
        for channels in (1, 2, 4): assert resnet(18, channels=channels).eval()(torch.zeros(2, channels, 20, 30)).shape == (2, 1)
        with pytest.raises(HplError, match="pictures of 3 channels, and these have 4"): resnet(18, weights="torchvision", channels=4)
        torch.save(resnet(18, channels=4).body.trunk.state_dict(), tmp_path/"four.pth")
        resnet(18, weights=tmp_path/"four.pth", channels=4)
        with pytest.raises(HplError, match="does not fit"): resnet(18, weights=tmp_path/"four.pth")


class TestOutputs:
    "Case 3: labels of another number of outputs are not broadcast."
    @pytest.mark.parametrize("fitted, given", [(2, 1), (1, 2), (2, 3), (3, 1)])
    def test_refused(self, rows, fitted, given):
        x, y, t = rows
        model, labels = ssr().fit(x, np.stack([y]*fitted, 1)), np.stack([t]*given, 1)
        before = model.predict_interval(x, .5)
        for call in (model.calibrate, model.score):
            for y_new in (labels, pd.DataFrame(labels), *([t] if given == 1 else [])):
                with pytest.raises(HplError, match=rf"\(120, {given}\).*\(n, {fitted}\)"): call(x, y_new)
        assert all(np.array_equal(a, b) for a, b in zip(before, model.predict_interval(x, .5)))

    def test_one_column_in_both_shapes(self, rows):
        x, y, t = rows
        for labels in (y, y[:, None]):
            model = ssr().fit(x, labels)
            new = np.random.default_rng(1).normal(size=(30, 4))
            assert model.score(x, t) == model.score(x, t[:, None])
            widths = [np.ptp(model.calibrate(new, y_new).predict_interval(x[:1], .5)[1:]) for y_new in (new[:, 0], new[:, :1])]
            assert widths[0] == widths[1]

    def test_numbers_of_rows(self, rows):
        x, y, t = rows
        model = ssr().fit(x, y)
        for call in (model.calibrate, model.score):
            with pytest.raises(ValueError, match="120 inputs but 119 targets"): call(x, t[:-1])
        with pytest.raises(ValueError, match="inconsistent numbers"): model.score(x, t, sample_weight=np.ones(119))

    def test_a_network_of_other_outputs(self, rows):
        x, y, t = rows
        data = from_arrays(x, np.stack([t, t], 1))
        with pytest.raises(HplError, match="build it with outputs=2"): Predictor.from_method(Supervised().build(mlp(4)), data)


class TestCalibration:
    def test_rows_that_trained(self, rows, tmp_path):
        x, y, t = rows
        model = ssr().fit(x, y)
        fresh = np.random.default_rng(1).normal(size=(30, 4))
        with pytest.warns(UserWarning, match=r"5 of 35 calibration rows .*the first is row 30"):
            model.calibrate(np.concatenate([fresh, x[100:105]]), np.zeros(35))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.calibrate(fresh, fresh[:, 0])
            model.calibrate(np.concatenate([fresh, x[:3]]), [*fresh[:, 0], *[np.nan]*3]) # without labels they are not used
            reload(model, tmp_path).calibrate(x, t) # a file does not hold them

    def test_frames_that_trained(self, rows):
        x, y, t = rows
        frame = pd.DataFrame(x, columns=list("abcd")).assign(kind=np.tile(["p", "q"], 60))
        with pytest.warns(UserWarning, match="that trained"): ssr().fit(frame, y).calibrate(frame[40:60], t[40:60])

    def test_pictures_that_trained(self, pictures):
        paths, y = pictures
        model = ssr(reading=Reading(8)).fit(paths[:16], y[:16])
        copy = paths[0].parent/"copy.png"
        copy.write_bytes(paths[15].read_bytes())
        with pytest.warns(UserWarning, match="1 of 9 calibration rows"): model.calibrate([copy, *paths[16:]], np.arange(9.))

    def test_none_and_huge(self, rows):
        x, y, t = rows
        model = ssr().fit(x, y)
        with pytest.raises(HplError, match="no row of y has a label"): model.calibrate(x, np.full(120, np.nan))
        own = ssr(preprocessor=StandardScaler()).fit(x, y) # the default one cuts such numbers
        huge = np.where(np.arange(30)[:, None] == 3, 1e300, np.random.default_rng(1).normal(size=(30, 4)))
        with pytest.raises(HplError, match="row 3 .*prediction is NaN or infinite; 1 such"): own.calibrate(huge, t[:30])
        assert np.isfinite(model.calibrate(huge, t[:30]).predict_interval(x, .5).high).all()

    def test_rows_of_a_predictor(self, rows):
        x, _, t = rows
        data = from_arrays(x, t, split={"train": range(60), "val": range(60, 90), "test": range(90, 120)})
        method = Supervised().build(mlp(4))
        mask = np.arange(120) >= 90
        by_mask, by_number = (Predictor.from_method(method, data, calibration).errors for calibration in (mask, data.test))
        np.testing.assert_array_equal(by_mask, by_number)
        cases = {"lists a row twice": [100]*30, "lists row 120": [120], "lists row -1": [-1], "row numbers": [99.5], "is a mask": mask[1:]}
        for message, calibration in cases.items():
            with pytest.raises(HplError, match=message): Predictor.from_method(method, data, calibration)


@pytest.fixture
def pictures(tmp_path):
    "24 files of pictures and labels of 12."
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    for row in range(24): Image.fromarray(pixels[row]).save(tmp_path/f"{row}.png")
    return [tmp_path/f"{row}.png" for row in range(24)], np.where(np.arange(24) < 12, np.arange(24.), np.nan)


class TestPictureFiles:
    "Case 10: advice that can be followed, and every way to list paths."
    def test_any_list(self, pictures):
        paths, y = pictures
        names, expected = [*map(str, paths)], ssr(reading=Reading(8)).fit(paths, y).predict(paths)
        ways = {"text": names, "numpy": np.array(names), "(n, 1)": np.array(names)[:, None], "lists": [[name] for name in names],
                "objects": np.array(paths, dtype=object), "index": pd.Index(names), "frame": pd.DataFrame({"file": names}),
                "paths": pd.DataFrame({"file": paths}), "string": pd.DataFrame({"file": pd.array(names, dtype="string")}),
                "arrow": pd.Series(names, dtype="string[pyarrow]")}
        wrong = [way for way, X in ways.items() if not np.array_equal(ssr(reading=Reading(8)).fit(X, y).predict(X), expected)]
        assert not wrong

    @pytest.mark.parametrize("missing", [None, np.nan, pd.NA, "", 7])
    @pytest.mark.parametrize("wrap", [list, lambda x: pd.DataFrame({"file": x}), lambda x: np.array(x, dtype=object)[:, None]])
    def test_a_missing_path_names_its_row(self, missing, wrap, pictures):
        paths, y = pictures
        model = ssr(reading=Reading(8))
        with pytest.raises(HplError, match=r"X: row 5 \(the first is 0\): .* is no path of a picture"):
            model.fit(wrap([*map(str, paths[:5]), missing, *map(str, paths[6:])]), y)

    def test_a_column_of_categories_is_a_table(self, rows):
        _, y, _ = rows
        assert ssr().fit(pd.DataFrame({"kind": ["a", "b", "c"]*40}), y).preprocessor_ is not None

    def test_broken_and_missing_files(self, pictures):
        paths, y = pictures
        paths[3].write_bytes(b"")
        with pytest.raises(HplError, match=r"X, row 3 .*3\.png cannot be read.*pass reading=Reading.skip_broken=True"):
            ssr(reading=Reading(8)).fit(paths, y)
        with pytest.warns(UserWarning, match="2 pictures cannot be read and are left out"):
            model = ssr(reading=Reading(8, skip_broken=True)).fit([*paths[:23], paths[0].parent/"gone.png"], y)
        assert set(model.pseudo_labels_["row"]) == {*range(12, 23)}
        with pytest.raises(HplError, match="leave out new row 1") as caught: model.predict([paths[0], paths[3]])
        assert "skip_broken" not in str(caught.value)
        with pytest.raises(HplError, match="new row 0: there is no picture"): model.predict(["gone.png"])

    def test_another_kind_than_that_of_fit(self, pictures, rows):
        (paths, y), (x, y_table, _) = pictures, rows
        fitted = {"picture files": (ssr(reading=Reading(8)).fit(paths, y), paths), "a table": (ssr().fit(x, y_table), x)}
        pixels = np.zeros((9, 8, 8))
        for kind, (model, _) in fitted.items():
            for other in [X for name, (_, X) in fitted.items() if name != kind] + [pixels]:
                with pytest.raises(HplError, match=f"but fit was given {kind}") as caught: model.predict(other)
                assert "from_frame" not in str(caught.value)

    def test_advice_names_no_argument_that_is_not_there(self, rows):
        "Pixels that are missing or no numbers."
        _, y, _ = rows
        pixels = np.random.default_rng(0).normal(size=(120, 4, 4))
        for bad in (np.where(pixels > 3, np.nan, pixels), pixels.astype(str), np.ma.masked_greater(pixels, 3)):
            with pytest.raises(HplError) as caught: ssr().fit(bad, y)
            assert "from_frame" not in str(caught.value)


COLUMNS = {"cut": pd.cut(np.arange(120) % 7, [-1, 2, 5, 9]), "interval": pd.arrays.IntervalArray.from_tuples([(0, 1), (1, 2)]*60),
           "period": pd.period_range("2020", periods=3, freq="Y").repeat(40), "bool": np.arange(120) % 2 == 0,
           "days": pd.Categorical(pd.to_datetime(["2020-01-01", "2021-01-01"]*60)), "numbers": pd.Categorical([1, 2]*60),
           "boolean": pd.array([True, False]*60, dtype="boolean"), "Int8": pd.array([1, 2, 3]*40, dtype="Int8"),
           "arrow text": pd.array(["a", "b"]*60, dtype="string[pyarrow]"), "tuple": [(1,), (2,)]*60, "bytes": [b"a", b"b"]*60,
           "decimal": [decimal.Decimal("1.5"), decimal.Decimal("2.5")]*60, "flags": np.array([True, False]*60, dtype=object)}


class TestColumns:
    "Case 14: what is saved can be loaded, or is refused before."
    @pytest.mark.parametrize("name", COLUMNS)
    def test_round_trip(self, name, rows, tmp_path):
        x, y, _ = rows
        frame = pd.DataFrame(x, columns=list("abcd")).assign(new=COLUMNS[name])
        try: model = ssr().fit(frame, y)
        except HplError as error: return "'new'" in str(error) or pytest.fail(str(error))
        assert np.array_equal(reload(model, tmp_path).predict(frame), model.predict(frame))
        other = frame.assign(new=frame["new"].to_numpy()[::-1])
        features = model.preprocessor_.transform # where the labelled rows have one value of the column, no prediction knows it
        assert not np.array_equal(features(other), features(frame))

    def test_save_refuses_what_load_would(self, rows, tmp_path):
        x, y, _ = rows
        model = ssr(preprocessor=FunctionTransformer(int_part)).fit(x, y)
        with pytest.raises(HplError, match=r"int_part.*save\(path, trusted=\["): model.save(tmp_path/"m.safetensors")
        assert not [*tmp_path.iterdir()]
        name = f"{int_part.__module__}.int_part"
        path = model.save(tmp_path/"m.safetensors", trusted=[name])
        assert np.array_equal(SemiSupervisedRegressor.load(path, trusted=[name]).predict(x), model.predict(x))

    @pytest.mark.parametrize("method", [Mine(scale=.3), HPL.paper(learner=own_learner), HPL.release(learner=own_learner)],
                             ids=lambda method: method.title)
    def test_a_method_or_learner_of_ones_own_is_passed_again(self, method, rows, tmp_path):
        x, y, _ = rows
        model = ssr(method).fit(x, y)
        path = model.save(tmp_path/"m.safetensors")
        again = SemiSupervisedRegressor.load(path, method=method)
        assert np.array_equal(again.predict(x), model.predict(x)) and again.method_ == model.method_ and again.method == method
        assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(x), model.predict(x))
        name = "kind is 'Mine'" if isinstance(method, Mine) else f"learner is '{__name__}.own_learner'"
        with pytest.raises(HplError, match=f"{name}.*load.path, method="): SemiSupervisedRegressor.load(path)
        other = HPL.paper(outer_every=2)
        with pytest.raises(HplError, match="kind is 'Mine'|another method: "): SemiSupervisedRegressor.load(path, method=other)

    def test_array_for_a_frame_whose_columns_have_no_names(self, rows):
        x, y, _ = rows
        frame = pd.DataFrame(x).assign(kind=["p", "q"]*60).set_axis(range(5), axis=1)
        model = ssr().fit(frame, y)
        assert np.array_equal(model.predict(frame.to_numpy(dtype=object)), model.predict(frame))

    def test_a_file_without_the_new_parameters(self, rows, tmp_path):
        from hpl_nb.predictor import read_content, write_content
        x, y, _ = rows
        model = ssr().fit(x, y)
        content = read_content(model.save(tmp_path/"m.safetensors"))
        for name in ("reading", "views"): del content["estimator"]["parameters"][name]
        old = SemiSupervisedRegressor.load(write_content(tmp_path/"old.safetensors", content))
        assert np.array_equal(old.predict(x), model.predict(x)) and old.reading is None and old.views is None
        marked = reload(clone(model).set_params(reading=Reading(missing_label=-9)).fit(x, np.where(np.isnan(y), -9, y)), tmp_path)
        assert marked.reading == Reading(missing_label=-9) and marked.score(x, np.where(np.isnan(y), -9, y)) == model.score(x, y)


def int_part(x): return np.floor(x)


WAYS = {"None": lambda y: [None if np.isnan(v) else v for v in y], "pd.NA": lambda y: pd.array(y, dtype="Float64"),
        "NaT": lambda y: np.array([pd.NaT if np.isnan(v) else v for v in y], dtype=object),
        "text": lambda y: ["" if np.isnan(v) else str(v) for v in y], "masked": lambda y: np.ma.masked_array(np.nan_to_num(y), np.isnan(y)),
        "arrow": lambda y: pd.Series(y, dtype="float64[pyarrow]"), "tensor": torch.tensor, "series": pd.Series,
        "masked column": lambda y: np.ma.masked_array(np.nan_to_num(y), np.isnan(y))[:, None]}


class TestNoLabel:
    "Case 15: every way to say that a row has no label."
    @pytest.mark.parametrize("way", WAYS)
    def test_ways(self, way, rows):
        y = rows[1]
        np.testing.assert_array_equal(label_columns(WAYS[way](y), 120)[:, 0], y)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.integers(-99999, 99999), st.integers(1, 3), st.data())
    def test_missing_label_is_nan(self, values, missing, outputs, data):
        hidden = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
        y = np.stack([values]*outputs, axis=1)
        hidden |= (y == missing).all(axis=1)
        expected, marked = np.where(hidden[:, None], np.nan, y), np.where(hidden[:, None], missing, y)
        for form in (marked, marked.tolist(), pd.DataFrame(marked)):
            np.testing.assert_array_equal(label_columns(form, len(y), missing), expected)

    def test_fit_score_and_calibrate_know_it(self, rows):
        x, y, t = rows
        marked, few = np.where(np.isnan(y), -9999, y), np.where(np.arange(120) % 3 == 0, t, np.nan)
        by_nan, by_number = ssr().fit(x, y), ssr(reading=Reading(missing_label=-9999)).fit(x, marked)
        assert np.array_equal(by_nan.predict(x), by_number.predict(x)) and by_nan.pseudo_labels_.equals(by_number.pseudo_labels_)
        assert by_nan.score(x, few) == by_number.score(x, np.nan_to_num(few, nan=-9999)) == by_number.score(x, few)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            intervals = by_nan.calibrate(x, few), by_number.calibrate(x, np.nan_to_num(few, nan=-9999))
        assert np.array_equal(*(model.predict_interval(x, .8) for model in intervals))

    def test_refusals(self, rows):
        x, y, _ = rows
        for wrong in (None, "NA", pd.NA):
            with pytest.raises(HplError, match="missing_label is .*give a number"): ssr(reading=Reading(missing_label=wrong)).fit(x, y)
        with pytest.raises(HplError, match="row 40 .*it has some of its labels only"):
            ssr(reading=Reading(missing_label=-1)).fit(x, np.stack([np.nan_to_num(y, nan=-1), np.zeros(120)], 1))
        with pytest.warns(UserWarning, match="NaN or the missing_label in y"): ssr().fit(x, np.nan_to_num(y, nan=-1))

    @pytest.mark.parametrize("wrap", [
        lambda model: TransformedTargetRegressor(model, func=lambda y: np.where(y == -9999, y, y/10), inverse_func=lambda y: y*10,
                                                 check_inverse=False),
        lambda model: BaggingRegressor(model.set_params(reading=Reading(missing_label=-9999, deduplicate=True)), n_estimators=2,
                                       random_state=0),
        MultiOutputRegressor])
    def test_meta_estimators(self, wrap, rows):
        x, y, t = rows
        marked = np.nan_to_num(y, nan=-9999)
        model, train = ssr(reading=Reading(missing_label=-9999)), Train(iterations_per_epoch=40, optimizer=OptimizerSettings(.01, .01))
        model = wrap(model.set_params(train=train, epochs=2))
        marked = np.stack([marked, np.where(np.arange(120) < 60, t, -9999)], 1) if isinstance(model, MultiOutputRegressor) else marked
        truth = np.stack([t, t], 1) if marked.ndim == 2 else t
        assert model.fit(x, marked).score(x, truth) > .5 # far below zero, had it learnt the number
        scores = cross_val_score(model, x, marked, cv=LabelledKFold(2, missing_label=-9999, random_state=0)) if marked.ndim == 1 else [1.]
        assert (np.array(scores) > 0).all()


class TestLabelledKFold:
    def test_cross_validation_of_a_table_whose_labelled_rows_come_first(self, rows):
        x, y, _ = rows
        with pytest.warns(UserWarning, match=r"cv=LabelledKFold\(\)"): default = cross_val_score(ssr("supervised"), x, y, cv=KFold(3))
        assert np.isnan(default).any()
        folds = LabelledKFold(3, random_state=0)
        for scoring in (None, "neg_mean_absolute_error"):
            assert np.isfinite(cross_val_score(ssr("supervised"), x, y, cv=folds, scoring=scoring, error_score="raise")).all()
        search = GridSearchCV(ssr(), {"method": ["supervised", "pseudo_label"]}, cv=folds, error_score="raise").fit(x, y)
        assert np.isfinite(search.cv_results_["mean_test_score"]).all()

    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 6), st.integers(0, 99), st.data())
    def test_folds(self, splits, seed, data):
        "The labelled rows are tested once each, all others train always, and the seed decides."
        known = np.array(data.draw(st.lists(st.booleans(), min_size=splits, max_size=30)))
        y = np.where(known, 1., np.nan)
        folds = LabelledKFold(splits, random_state=seed)
        if known.sum() < splits:
            with pytest.raises(HplError, match=f"{known.sum()} rows have a label, fewer than the {splits} folds"): list(folds.split(y, y))
            return
        pairs = [*folds.split(y[:, None], y)]
        assert len(pairs) == splits == folds.get_n_splits()
        assert sorted(np.concatenate([test for _, test in pairs])) == [*np.flatnonzero(known)]
        again = LabelledKFold(splits, missing_label=-3, random_state=seed).split(y, np.nan_to_num(y, nan=-3))
        for (train, test), (train_again, test_again) in zip(pairs, again):
            assert sorted([*train, *test]) == [*range(len(y))] and np.array_equal(train, train_again) and np.array_equal(test, test_again)

    def test_without_y(self):
        with pytest.raises(HplError, match="y"): list(LabelledKFold(2).split(np.ones((5, 1))))


class Squeezed(Regressor):
    def forward(self, x): return super().forward(x)[:, 0]


def batch_norm(shape, outputs):
    return Regressor(Body(nn.Sequential(nn.Linear(shape[0], 8), nn.BatchNorm1d(8)), 8), nn.Linear(8, outputs))


def plain(shape, outputs): return nn.Sequential(nn.Linear(shape[0], 8), nn.Dropout(.1), nn.Linear(8, outputs))


ONE, LINEAR = mlp(4), nn.Linear(4, 1)


class TestNetworks:
    "A network of one's own works, or the error names `network` before training."
    @pytest.mark.parametrize("network", [lambda shape, outputs: mlp(shape[0], (8,), outputs).double(), batch_norm,
                                         lambda shape, outputs: mlp(shape[0], (8,), outputs).bfloat16()])
    def test_works(self, network, rows, tmp_path):
        x, y, _ = rows
        model = ssr(network=network).fit(x, y)
        again = SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors"), network=network)
        assert np.isfinite(model.predict(x)).all() and np.array_equal(again.predict(x), model.predict(x))

    @pytest.mark.parametrize("network, message", [
        (lambda shape, outputs: None, r"network\(\(4,\), 1\) returns a NoneType; return an nn.Module"),
        (ONE, "network is of type Regressor; give a function"),
        ("resnet", "network is of type str"), (lambda: ONE, "fails .*positional argument"),
        (lambda shape, outputs: Squeezed(Body(nn.Linear(4, 3), 3), nn.Linear(3, 1)), r"predicts shape \(16,\).*must be \(16, 1\)"),
        (lambda shape, outputs: mlp(4, outputs=2), r"predicts shape \(16, 2\)"), (lambda shape, outputs: ONE, "same parameters again"),
        (lambda shape, outputs: LINEAR, "same parameters again"), (LINEAR, "network is of type Linear; give a function"),
        (lambda shape, outputs: nn.Linear(5, 1), r"the network fails on two inputs of shape \(4,\)"),
        (lambda shape, outputs: mlp(7), r"fails on a training batch of shape \(16, 4\)")])
    def test_named(self, network, message, rows):
        x, y, _ = rows
        with pytest.raises(HplError, match=message): ssr(network=network).fit(x, y)

    @pytest.mark.parametrize("method", ["hpl_paper", "hpl_release", "ucvme", "mean_teacher", "tnnr"])
    def test_as_others_make_it(self, method, rows, tmp_path):
        "Methods with dropout, with two networks, with a teacher; what is loaded predicts the same."
        x, y, _ = rows
        model = ssr(method, network=plain).fit(x, y)
        assert model.predictor_.method.regressor.head.in_features == 8
        again = SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors"), network=plain)
        assert np.isfinite(model.predict(x)).all() and np.array_equal(again.predict(x), model.predict(x))

    def test_torchvision(self, tmp_path):
        x = np.random.default_rng(0).random((24, 3, 32, 32), np.float32)
        y = np.where(np.arange(24) < 12, x[:, 0].mean((1, 2)), np.nan)
        def network(shape, outputs): return mobilenet_v3_small(num_classes=outputs)
        model = ssr("hpl_paper", network=network).fit(x, y)
        again = SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors"), network=network)
        assert np.array_equal(again.predict(x), model.predict(x))
        with pytest.raises(HplError, match="pictures of 3 channels, and these have 1; give X.reshape"): ssr(network=network).fit(x[:, 0], y)

    def test_trying_it_draws_nothing(self, rows, monkeypatch):
        x, y, _ = rows
        calls = []
        def counted(shape, outputs):
            calls.append(torch.initial_seed())
            return plain(shape, outputs)
        tried = ssr(network=counted).fit(x, y).predict(x)
        assert len(calls) == 2
        monkeypatch.setattr("hpl_nb.defaults.try_network", lambda *arguments: None)
        assert np.array_equal(ssr(network=counted).fit(x, y).predict(x), tried) and len(calls) == 3


class TestTinyBatches:
    @pytest.mark.parametrize("labelled", [1, 2, 3])
    @pytest.mark.parametrize("method", ["supervised", "pseudo_label", "hpl_paper", "hpl_release", "tnnr"])
    def test_few_labels(self, method, labelled, rows):
        "Works, or says how many more are needed; batch norm in a network of one's own gets two rows where it can."
        x, _, t = rows
        y = np.where(np.arange(120) < labelled, t, np.nan)
        if labelled == 1 and method in ("hpl_paper", "tnnr"):
            with pytest.raises(HplError, match="label more rows"): ssr(method).fit(x, y)
        else: assert np.isfinite(ssr(method).fit(x, y).predict(x)).all()
        if labelled > 1 and not method.startswith("hpl"): assert np.isfinite(ssr(method, network=batch_norm).fit(x, y).predict(x)).all()
        elif method != "hpl_paper" or labelled > 1:
            with pytest.raises(HplError, match=r"network\(\(4,\), 1\) fails on a training batch of shape \(1, 4\)"):
                ssr(method, network=batch_norm).fit(x, y)

    def test_one_picture_in_a_batch(self):
        "Which pooling has made 1 x 1."
        x = np.random.default_rng(0).normal(size=(20, 5, 5))
        model = ssr("hpl_paper").fit(x, np.where(np.arange(20) < 2, np.arange(20.), np.nan))
        assert np.isfinite(model.predict(x)).all()


def test_check_estimator():
    "All of scikit-learn's checks, but the one that it skips itself."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # of its own fits, where every row has a label
        train = Train(epochs=4, iterations_per_epoch=40, optimizer=OptimizerSettings(.01, .01))
        quick = SemiSupervisedRegressor(train=train, random_state=0)
        checks = pd.DataFrame(check_estimator(quick, on_fail=None, on_skip=None))
    assert set(checks.query("status != 'passed'")["check_name"]) <= {"check_array_api_input"} and len(checks) > 40


def test_masked_features(rows):
    "Masked values are missing ones."
    x, y, _ = rows
    masked = np.ma.masked_greater(x, 2)
    with pytest.warns(UserWarning, match="missing values are filled"): filled = ssr().fit(masked, y)
    assert np.array_equal(filled.predict(masked), ssr().fit(masked.filled(np.nan), y).predict(masked.filled(np.nan)))
    with pytest.raises(ValueError, match="is nan"): from_arrays(masked, y)
    model = ssr(preprocessor=StandardScaler()).fit(x, y)
    with pytest.raises(ValueError, match="NaN"): model.predict(masked)


def stays(n=240, labelled=160, seed=0):
    "Positive labels whose errors grow with them: exp of a line."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    t = np.exp(2 + .6*x[:, 0] - .3*x[:, 1] + rng.normal(0, .3, n))
    return x, np.where(np.arange(n) < labelled, t, np.nan), t


class TestTarget:
    "Labels are learnt on another scale, and everything that is told is in their own unit."
    def test_log_is_the_model_of_logarithms(self, tmp_path):
        "The oracle: the same estimator on log labels, and exp of what it says."
        x, y, t = stays()
        model, plain = ssr("hpl_paper", target="log").fit(x, y), ssr("hpl_paper").fit(x, np.log(y))
        np.testing.assert_allclose(model.predict(x), np.exp(plain.predict(x)))
        for scaled in (None, False, True):
            for found, expected in zip(model.predict_interval(x, .8, scaled), plain.predict_interval(x, .8, scaled)):
                np.testing.assert_allclose(found, np.exp(expected))
        assert (model.predict_interval(x, .8).low > 0).all()
        np.testing.assert_allclose(model.pseudo_labels_["pseudo_label"], np.exp(plain.pseudo_labels_["pseudo_label"]))
        pd.testing.assert_frame_equal(model.pseudo_labels_[["variance", "weight"]], plain.pseudo_labels_[["variance", "weight"]])
        assert model.score(x, y) == r2_score(t[:160], model.predict(x[:160]))
        for copy in (reload(model, tmp_path), pickle.loads(pickle.dumps(model))):
            assert copy.target == "log" and np.array_equal(copy.predict(x), model.predict(x))
        new, _, true = stays(40, seed=1)
        both = model.calibrate(new, true), plain.calibrate(new, np.log(true))
        np.testing.assert_allclose(both[0].predict_interval(x, .8).high, np.exp(both[1].predict_interval(x, .8).high))

    @pytest.mark.parametrize("target", [StandardScaler(), PowerTransformer(), FunctionTransformer(np.negative, np.negative), "log1p"])
    def test_transformers(self, target, tmp_path):
        x, y, t = stays()
        x, y = x[:150], np.stack([y, 2*y], 1)[:150] # all are labelled
        y[100:] = np.nan
        model = ssr(target=target).fit(x, y)
        assert clone(model).target is not target or isinstance(target, str)
        assert not hasattr(target, "scale_") and not hasattr(target, "lambdas_") # the caller's own is not fitted
        prediction, low, high = model.predict_interval(x, .8)
        assert prediction.shape == (150, 2) and (low <= prediction).all() and (prediction <= high).all()
        assert np.abs(np.log(prediction.mean(axis=0)/np.nanmean(y, axis=0))).max() < .7 # label units
        guessed = model.pseudo_labels_.query("output == 1").set_index("row")["pseudo_label"]
        assert len(guessed) == 50 and 5 < guessed.median() < 60
        again = reload(model, tmp_path)
        assert np.array_equal(again.predict(x), prediction) and type(again.target) is type(target)

    def test_grid_search(self):
        x, y, _ = stays(120, 80)
        search = GridSearchCV(ssr("supervised"), {"target": [None, "log", PowerTransformer()]}, cv=LabelledKFold(2, random_state=0),
                              error_score="raise").fit(x, y)
        assert len(set(search.cv_results_["mean_test_score"])) == 3

    @pytest.mark.parametrize("target, label, message", [
        ("log", 0., r"row 3 .*its label 0 has no logarithm; 1 such row\(s\). Use target='log1p'"),
        ("log", -2., r"row 3 .*its label -2 has no logarithm; 1 such row\(s\). Correct it, or leave target out"),
        ("log1p", -2., "row 3 .*its label -2 cannot be transformed by target"),
        ("sqrt", 1., "target is 'sqrt'; give 'log', 'log1p', or a transformer"),
        (OneHotEncoder(sparse_output=False), 1., "target makes shape"), (np.log, 1., "target is <ufunc 'log'>; give"),
        (PowerTransformer("box-cox"), 0., "cannot be fitted to the labels .*strictly positive")])
    def test_named(self, target, label, message):
        x, y, t = stays()
        y[3] = label
        with pytest.raises(HplError, match=message): ssr(target=target).fit(x, y)

    def test_calibration_with_a_label_that_has_no_logarithm(self):
        x, y, t = stays()
        with pytest.raises(HplError, match="row 161 .*its label 0 has no logarithm"):
            ssr(target="log").fit(x, y).calibrate(x, np.where(np.arange(240) < 160, np.nan, np.where(np.arange(240) == 161, 0, t)))


class TestScaled:
    "The calibration rows decide whether the method's own sigma makes intervals narrower."
    def test_the_narrower_is_taken(self):
        x, y, _ = stays(160, 120)
        model = ssr("hpl_paper").fit(x, y)
        errors, chosen = np.abs(np.random.default_rng(0).normal(size=(200, 1))), []
        sigma = np.exp(np.random.default_rng(1).normal(size=(200, 1)))
        for sizes in (errors*sigma, errors): # sigma is right, sigma is noise
            model.predictor_ = replace(model.predictor_, errors=sizes, deviations=sigma)
            by = {scaled: model.predict_interval(x, .9, scaled) for scaled in (None, True, False)}
            chosen.append([np.array_equal(by[None].high, by[scaled].high) for scaled in (True, False)])
        assert chosen == [[True, False], [False, True]]

    def test_without_a_variance(self):
        x, y, _ = stays(160, 120)
        model = ssr("pseudo_label").fit(x, y)
        assert all(np.array_equal(a, b) for a, b in zip(model.predict_interval(x, .8), model.predict_interval(x, .8, False)))
