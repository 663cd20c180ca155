"The estimator keeps scikit-learn's rules, reaches every method, and its intervals are MAPIE's."
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, clone
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from small_runs import on_cpu  # noqa: F401

from hpl_nb.core import HplError
from hpl_nb.data.core import StreamSettings
from hpl_nb.data.own import Reading
from hpl_nb.defaults import build_method, default_network
from hpl_nb.estimator import SemiSupervisedRegressor
from hpl_nb.inputs import table
from hpl_nb.methods.core import Supervised
from hpl_nb.methods.hpl import HPL, JointUncertainty
from hpl_nb.methods.known import known_methods
from hpl_nb.methods.mean_teacher import MeanTeacher
from hpl_nb.methods.ssdkl import SSDKL
from hpl_nb.methods.ucvme import UCVME
from hpl_nb.models import mlp
from hpl_nb.predictor import Predictor
from hpl_nb.training.state import OptimizerSettings, Train

TRAIN = Train(iterations_per_epoch=10, optimizer=OptimizerSettings(lr_body=.01, lr_head=.01))
QUICK = dict(epochs=3, train=TRAIN, random_state=0)
NOT_HERE = {"fully_supervised"} # needs the labels that are NaN here


def rows(n=120, labelled=40, outputs=1, seed=0):
    "A table, labels with NaN, and the labels without."
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 4))
    y = 3*x @ random.normal(size=(4, outputs)) + 10 + .1*random.normal(size=(n, outputs))
    y = y[:, 0] if outputs == 1 else y
    known = np.arange(n) < labelled
    return x, np.where(known if outputs == 1 else known[:, None], y, np.nan), y


def same(a, b, x):
    "Two fitted estimators predict the same to the bit."
    return all(np.array_equal(p, q) for p, q in zip(a.predict_interval(x, .5), b.predict_interval(x, .5)))


def mlp_of(shape, outputs): return mlp(shape[0], (8,), outputs, dropout=.1)


class Doubler(BaseEstimator):
    "A transformer that scikit-learn does not know."
    def fit(self, X, y=None): return self
    def transform(self, X): return 2*np.asarray(X, dtype=float)


@pytest.mark.parametrize("name", [name for name in known_methods() if name not in NOT_HERE])
@pytest.mark.parametrize("outputs", [1, 2])
def test_every_method(name, outputs, tmp_path):
    "Fits, says what it thinks of the unlabelled rows, and comes back from its file and from pickle with the same bits."
    if outputs == 2 and name.startswith("rankup"): pytest.skip("RankUp ranks one number")
    x, y, _ = rows(outputs=outputs)
    value = known_methods()[name]
    model = SemiSupervisedRegressor(name, **QUICK).fit(x, y)
    assert same(model, SemiSupervisedRegressor(value, **QUICK).fit(x, y), x) and type(model.method_) is type(value)
    assert model.predict(x).shape == y.shape and np.isfinite(model.predict(x)).all()
    assert same(model, clone(model).fit(x, y), x)
    path = model.save(tmp_path/"model.safetensors")
    for copy in (SemiSupervisedRegressor.load(path), pickle.loads(pickle.dumps(model))):
        assert same(model, copy, x) and copy.pseudo_labels_.equals(model.pseudo_labels_) and copy.method_ == model.method_
    guesses = model.pseudo_labels_
    assert len(guesses) == (80*outputs) and set(guesses["row"]) == set(range(40, 120))
    assert guesses["weight"].between(0, np.inf).all() and np.isfinite(guesses["pseudo_label"]).all()
    has_variance = isinstance(value, (HPL, JointUncertainty, UCVME, SSDKL))
    assert guesses["variance"].notna().all() == has_variance and (model.predictor_.deviations is not None) == has_variance


def test_short_names():
    "The name of a method is that of its first preset."
    x, y, _ = rows()
    assert same(*(SemiSupervisedRegressor(name, **QUICK).fit(x, y) for name in ("hpl", HPL.paper())), x)
    with pytest.raises(HplError, match="fully supervised training needs the true labels"):
        SemiSupervisedRegressor("fully_supervised", **QUICK).fit(*rows()[:2])


def test_weights_are_those_of_the_loss():
    "HPL's weight is exp(-z) in normalised units: the scale's square over the variance; the release has half of it."
    x, y, _ = rows()
    for method, factor in ((HPL.paper(), 1), (HPL.release(), .5)):
        model = SemiSupervisedRegressor(method, **QUICK).fit(x, y)
        scale = model.predictor_.normalizer.scale[0]
        assert np.allclose(model.pseudo_labels_["weight"], factor*scale**2/model.pseudo_labels_["variance"], rtol=1e-5)
    network = lambda shape, outputs: mlp(shape[0], outputs=outputs, dropout=.05) # noqa: E731 - which does not start at ridge regression
    ups = SemiSupervisedRegressor("ups_reg", network, **QUICK).fit(x, y).pseudo_labels_["weight"]
    assert set(ups) <= {0., 1.} and ups.nunique() > 1


@pytest.mark.parametrize("scaled", [False, True])
def test_intervals_are_mapies(scaled):
    "MAPIE's split conformal regression, with absolute and with normalised residuals, gives the same limits."
    regression = pytest.importorskip("mapie.regression")
    from mapie.conformity_scores import AbsoluteConformityScore
    class Scaled(AbsoluteConformityScore):
        def get_signed_conformity_scores(self, y, y_pred, X=None, **others): return (y - y_pred)/sigma(X)
        def get_estimation_distribution(self, y_pred, scores, X=None, **others): return y_pred + scores*sigma(X)
    x, _, y = rows(400)
    model = SemiSupervisedRegressor("hpl", **QUICK).fit(x[:100], rows(400)[1][:100]).calibrate(x[100:200], y[100:200])
    def sigma(X):
        p = model.predictor_
        with torch.no_grad(): z = p.method.eval().inspect(p.view(torch.as_tensor(X)), p.view(torch.as_tensor(X)))["log_variance"]
        return (np.exp(z.double().numpy()/2)*p.normalizer.scale[0])
    def flat(X): return sigma(X)[:, 0]
    score = AbsoluteConformityScore() if not scaled else Scaled()
    if scaled:
        Scaled.get_signed_conformity_scores = lambda self, y, y_pred, X=None, **others: (y - y_pred)/flat(X)
        Scaled.get_estimation_distribution = lambda self, y_pred, scores, X=None, **others: (
            np.reshape(y_pred, (-1, 1)) + np.asarray(scores)*flat(X)[:, None])
        score.consistency_check = False
    oracle = regression.SplitConformalRegressor(model, confidence_level=.8, conformity_score=score, prefit=True)
    oracle.conformalize(x[100:200], y[100:200])
    _, limits = oracle.predict_interval(x[200:])
    interval = model.predict_interval(x[200:], .8, scaled=scaled)
    np.testing.assert_allclose(limits[:, 0, 0], interval.low, rtol=1e-6)
    np.testing.assert_allclose(limits[:, 1, 0], interval.high, rtol=1e-6)


def test_global_generators_go_on():
    "What a caller draws after `fit` does not depend on it."
    x, y, _ = rows()
    def draws(): return np.random.random(), torch.rand(1).item()
    np.random.seed(0), torch.manual_seed(0)
    before = draws()
    np.random.seed(0), torch.manual_seed(0)
    SemiSupervisedRegressor(**QUICK).fit(x, y)
    assert draws() == before


def test_random_state():
    "A number is the seed; a generator is drawn from; None draws from NumPy's own."
    x, y, _ = rows()
    quick = {**QUICK, "method": "supervised"}
    def prediction(state): return SemiSupervisedRegressor(**{**quick, "random_state": state}).fit(x, y).predict(x)
    assert np.array_equal(prediction(np.random.RandomState(3)), prediction(np.random.RandomState(3)))
    assert not np.array_equal(prediction(3), prediction(4))
    np.random.seed(5)
    first, second = prediction(None), prediction(None)
    np.random.seed(5)
    assert np.array_equal(first, prediction(None)) and not np.array_equal(first, second)


def test_many_rows_are_predicted_in_pieces_as_a_whole():
    "Arrays and data frames, with gaps and text, to the bit; a row that is refused has its own number."
    x = np.random.default_rng(0).normal(size=(2800, 400))
    x[::50, 3] = np.nan
    frame = pd.DataFrame(x).rename(columns=str).assign(text=np.where(x[:, 0] > 0, "a", "b"))
    y = np.where(np.arange(200) < 60, x[:200, 0], np.nan)
    for X in (x, frame):
        model = SemiSupervisedRegressor("supervised", epochs=1, random_state=0).fit(X[:200], y)
        assert np.array_equal(model.predict(X), model.predictor_.predict(table(model, X)))
    wrong = frame.astype({"5": object})
    wrong.iloc[2700, 5] = "seven"
    with pytest.raises(HplError, match="column '5': row 2700 .* 1 such row"): model.predict(wrong)


def test_run_folder_is_resumed(tmp_path):
    "A killed fit goes on by the same call, with the bits of one that was not."
    x, y, _ = rows()
    model = SemiSupervisedRegressor("hpl", **QUICK)
    whole = clone(model).fit(x, y)
    code = ("import os, signal\nimport sys; sys.path.insert(0, 'tests')\nfrom test_estimator import *\n"
            "from hpl_nb.training.checkpoint import Checkpoint\nsave, count = Checkpoint.save, []\n"
            "def killing(self):\n    save(self); count.append(0)\n    if len(count) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
            "Checkpoint.save = killing\nx, y, _ = rows()\n"
            f"SemiSupervisedRegressor('hpl', folder={str(tmp_path/'run')!r}, **QUICK).fit(x, y)\n")
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment(), capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    again = clone(model).set_params(folder=tmp_path/"run").fit(x, y)
    assert same(whole, again, x) and whole.pseudo_labels_.equals(again.pseudo_labels_)
    finished = clone(model).set_params(folder=tmp_path/"run").fit(x, y)
    assert same(whole, finished, x) and whole.pseudo_labels_.equals(finished.pseudo_labels_)
    with pytest.raises(HplError, match="holds another run"): clone(model).set_params(folder=tmp_path/"run", train=Train()).fit(x, y)


def environment():
    import os
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}


def test_fully_labelled_rows_say_so():
    x, _, y = rows()
    with pytest.warns(UserWarning, match=r"HPL \(release\) has nothing to guess: Supervised is trained"):
        model = SemiSupervisedRegressor(HPL.release(), **QUICK).fit(x, y)
    assert model.method_ == Supervised() and model.pseudo_labels_.empty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(model, SemiSupervisedRegressor("supervised", **QUICK).fit(x, y), x)


class TestFrames:
    frame = pd.DataFrame(rows()[0], columns=list("abcd")).assign(kind=np.tile(["p", "q", "r"], 40), flag=np.arange(120) % 2 == 0)
    y = pd.Series(rows()[1], index=frame.index)

    def test_new_text_has_no_feature(self):
        model = SemiSupervisedRegressor(**QUICK).fit(self.frame, self.y)
        encoded = table(model, self.frame.assign(kind="new"))
        assert encoded.shape == (120, 8) and not encoded[:, 5:].any()

    def test_rows_keep_their_names(self):
        named = self.frame.set_axis([f"sample {i}" for i in range(120)])
        model = SemiSupervisedRegressor(**QUICK).fit(named, self.y.set_axis(named.index))
        assert list(model.pseudo_labels_["row"]) == list(named.index[40:])

    def test_names_of_columns(self):
        model = SemiSupervisedRegressor(**QUICK).fit(self.frame, self.y)
        with pytest.raises(ValueError, match="feature names"): model.predict(self.frame[list("dabc") + ["kind", "flag"]])
        with pytest.raises(ValueError, match="feature names"): model.predict(self.frame.drop(columns="a"))
        with pytest.warns(UserWarning, match="feature names"): by_position = model.predict(self.frame.to_numpy(dtype=object))
        assert np.array_equal(by_position, model.predict(self.frame))

    def test_columns_without_names(self, tmp_path):
        numbered = self.frame.set_axis([10, 3, 7, 0, 1, 2], axis=1)
        model = SemiSupervisedRegressor(**QUICK).fit(numbered, self.y)
        by_name = SemiSupervisedRegressor(**QUICK).fit(self.frame, self.y)
        with pytest.warns(UserWarning, match="valid feature names"): assert same(model, by_name, numbered)
        assert same(model, SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors")), numbered)

    def test_missing_values(self):
        holes = self.frame.mask(np.random.default_rng(0).random(self.frame.shape) < .05)
        with pytest.warns(UserWarning, match="missing values are filled"): model = SemiSupervisedRegressor(**QUICK).fit(holes, self.y)
        complete = SemiSupervisedRegressor(**QUICK).fit(self.frame, self.y)
        assert np.isfinite(model.predict(self.frame)).all() and np.isfinite(complete.predict(holes)).all()
        numbers = make_column_transformer((make_pipeline(SimpleImputer(), StandardScaler()), list("abcd")))
        filled = SemiSupervisedRegressor(preprocessor=numbers, **QUICK).fit(holes, self.y)
        assert np.isfinite(filled.predict(holes)).all()

    def test_dates_are_read_and_names_left_out(self):
        days = pd.Timestamp("2026-01-01") + pd.to_timedelta(np.arange(120) % 50, "D")
        with pytest.warns(UserWarning, match="'day' \\(dates, as days since"):
            dated = SemiSupervisedRegressor(**QUICK).fit(self.frame.assign(day=days), self.y)
        assert not np.array_equal(dated.predict(self.frame.assign(day=days)), dated.predict(self.frame.assign(day=days[0])))
        named = self.frame.assign(name=[f"n{i}" for i in range(120)])
        with pytest.warns(UserWarning, match="are left out, since they only name the rows: 'name'"):
            model = SemiSupervisedRegressor(**QUICK).fit(named, self.y)
        assert np.array_equal(model.predict(named), SemiSupervisedRegressor(**QUICK).fit(self.frame, self.y).predict(self.frame))

    def test_text_among_numbers_is_refused_by_its_row(self):
        mixed = self.frame.assign(kind=self.frame["kind"].astype(object).where(np.arange(120) != 77, 7))
        with pytest.raises(HplError, match=r"'kind': row 77 .*7 is no text.*astype\(str\)"):
            SemiSupervisedRegressor(**QUICK).fit(mixed, self.y)
        assert SemiSupervisedRegressor(**QUICK).fit(mixed.assign(kind=mixed["kind"].astype(str)), self.y).preprocessor_

    def test_own_preprocessor_travels_if_it_is_trusted(self, tmp_path):
        x, y, _ = rows()
        plain = SemiSupervisedRegressor(preprocessor=StandardScaler(), **QUICK).fit(x, y)
        loaded = SemiSupervisedRegressor.load(plain.save(tmp_path/"plain.safetensors"))
        assert same(plain, loaded, x) and isinstance(loaded.preprocessor, StandardScaler)
        own = SemiSupervisedRegressor(preprocessor=Doubler(), **QUICK).fit(x, y)
        trusted = [f"{Doubler.__module__}.Doubler"]
        with pytest.raises(HplError, match=r"Doubler.*save\(path, trusted=") as caught: own.save(tmp_path/"own.safetensors")
        assert str(trusted) in str(caught.value) and not (tmp_path/"own.safetensors").exists()
        path = own.save(tmp_path/"own.safetensors", trusted=trusted)
        with pytest.raises(HplError, match=r"Doubler.*load\(path, trusted="): SemiSupervisedRegressor.load(path)
        assert same(own, SemiSupervisedRegressor.load(path, trusted=trusted), x)

    def test_a_file_runs_nothing(self, tmp_path):
        "A function hidden in the preprocessor is named and not called."
        x, y, _ = rows()
        own = SemiSupervisedRegressor(preprocessor=FunctionTransformer(abs), **QUICK).fit(x, y)
        own.preprocessor_ = FunctionTransformer(print)
        types = skops.io.get_untrusted_types(data=skops.io.dumps(own.preprocessor_))
        assert "print" in " ".join(types)
        path = own.save(tmp_path/"own.safetensors", trusted=types)
        with pytest.raises(HplError, match="print"): SemiSupervisedRegressor.load(path)


def test_repeated_rows_are_left_out_on_request():
    "The warning of the data layer names an argument that there is."
    x, y, _ = rows()
    x[60], x[61] = x[3], x[100]
    with pytest.warns(UserWarning, match="Pass deduplicate=True"): SemiSupervisedRegressor(**QUICK).fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = SemiSupervisedRegressor(reading=Reading(deduplicate=True), **QUICK).fit(x, y).pseudo_labels_["row"]
    assert set(range(40, 120)) - set(kept) == {60, 100}


def test_own_network(tmp_path):
    x, y, _ = rows()
    model = SemiSupervisedRegressor("ucvme", network=mlp_of, **QUICK).fit(x, y)
    path = model.save(tmp_path/"model.safetensors")
    with pytest.raises(HplError, match="network of your own"): SemiSupervisedRegressor.load(path)
    with pytest.raises(HplError, match="checkpoint of another method or model"):
        SemiSupervisedRegressor.load(path, network=lambda shape, outputs: mlp(shape[0], (9,), outputs, dropout=.1))
    assert same(model, SemiSupervisedRegressor.load(path, network=mlp_of), x)
    with pytest.raises(HplError, match="dropout"):
        SemiSupervisedRegressor("ucvme", network=lambda shape, outputs: mlp(shape[0], (8,), outputs), **QUICK).fit(x, y)


def test_predictor_reads_an_estimators_file(tmp_path):
    "For those who want the predictor alone; the other way round is refused."
    x, y, _ = rows()
    model = SemiSupervisedRegressor("pseudo_label", **QUICK).fit(x, y)
    predictor = Predictor.load(model.save(tmp_path/"model.safetensors"), build_method(model.method_, model.shape_, 1))
    assert np.array_equal(predictor.predict(x), model.predict(x))
    with pytest.raises(HplError, match="Predictor.load"): SemiSupervisedRegressor.load(predictor.save(tmp_path/"predictor.safetensors"))
    with pytest.raises(HplError, match="damaged"):
        broken = tmp_path/"broken.safetensors"
        broken.write_bytes((tmp_path/"model.safetensors").read_bytes()[:-7])
        SemiSupervisedRegressor.load(broken)


def test_grid_search_over_processes():
    "Folds without many labels, two processes, settings of a method."
    x, y, true = rows()
    grid = {"method": [MeanTeacher(decay=.9), MeanTeacher(decay=.99)]}
    search = GridSearchCV(SemiSupervisedRegressor(**QUICK), grid, cv=KFold(3, shuffle=True, random_state=0), n_jobs=2)
    results = search.fit(x, y).cv_results_["mean_test_score"]
    assert np.isfinite(results).all() and results[0] != results[1] and np.isfinite(search.score(x, true))


class TestRefusals:
    "Before training, naming the argument."
    x, y, _ = rows()

    def refuses(self, message, x=None, y=None, error=HplError, **parameters):
        model = SemiSupervisedRegressor(**{**QUICK, **parameters})
        with pytest.raises(error, match=message): model.fit(self.x if x is None else x, self.y if y is None else y)

    def test_labels(self):
        text = self.y.astype(object)
        text[3] = "12,5"
        self.refuses(r"row 3 \(the first is 0\)", y=text)
        self.refuses("Input y contains infinity", y=np.where(np.arange(120) == 3, np.inf, self.y), error=ValueError)
        self.refuses("no training row has a label", y=np.full(120, np.nan))
        self.refuses("120 inputs but 119 targets", y=self.y[:-1])
        self.refuses("some of its labels only", y=np.stack([self.y, np.full(120, 1.)], 1))
        with pytest.raises(HplError, match="requires y to be passed"): SemiSupervisedRegressor(**QUICK).fit(self.x, None)

    def test_inputs(self):
        self.refuses("Sparse data was passed", x=sparse.csr_array(self.x), error=TypeError)
        self.refuses("contains infinity", x=np.where(self.x > 2, np.inf, self.x), error=ValueError)
        self.refuses("Expected 2D array", x=self.x[:, 0], error=ValueError)
        self.refuses("channels last", x=np.zeros((120, 8, 8, 3), np.uint8))
        self.refuses("X, row 0 .*there is no such file", x=[f"picture{i}.png" for i in range(120)])
        model = SemiSupervisedRegressor(**QUICK).fit(self.x, self.y)
        with pytest.raises(ValueError, match="X has 3 features, but SemiSupervisedRegressor is expecting 4"): model.predict(self.x[:, :3])

    def test_parameters(self):
        self.refuses("method is 'mean_techer'; did you mean 'mean_teacher'", method="mean_techer")
        self.refuses("method is {'decay': 0.9}; give settings such as HPL", method={"decay": .9})
        self.refuses("method is <class .*MeanTeacher'>; give settings", method=MeanTeacher)
        self.refuses("train is 30; give Train", train=30)
        self.refuses("preprocessor is for tables", x=np.zeros((120, 8, 8), np.uint8), preprocessor=StandardScaler())
        self.refuses("random_state is None; a run folder", folder="never", random_state=None)
        self.refuses("validation_fraction is 1", validation_fraction=1)
        self.refuses("epochs is 0", epochs=0)
        with pytest.raises(TypeError, match="nonsense"): SemiSupervisedRegressor(nonsense=1)
        self.refuses("RowStrengths", views=SemiSupervisedRegressor())
        self.refuses("give Reading", reading=16)

    def test_intervals(self):
        few = SemiSupervisedRegressor(**QUICK).fit(*rows(labelled=10)[:2])
        with pytest.raises(HplError, match=r"needs 9 rows .*\(validation_fraction, or calibrate\(X, y\)\)"): few.predict_interval(self.x)
        without = SemiSupervisedRegressor("pseudo_label", **QUICK).fit(self.x, self.y)
        with pytest.raises(HplError, match="no variance of its own"): without.predict_interval(self.x, .5, scaled=True)
        with pytest.raises(HplError, match="nothing to compare with"): without.score(self.x, np.full(120, np.nan))

    def test_an_unfitted_one(self):
        from sklearn.exceptions import NotFittedError
        for call in (lambda m: m.predict(self.x), lambda m: m.save("never.safetensors"), lambda m: m.predict_interval(self.x)):
            with pytest.raises(NotFittedError): call(SemiSupervisedRegressor())


def test_parameters_may_change_after_fit(tmp_path):
    "What was fitted is what is saved, pickled and loaded; NumPy's numbers are numbers."
    x, y, _ = rows()
    model = SemiSupervisedRegressor(MeanTeacher(decay=np.float64(.9)), **QUICK).fit(x, y)
    expected = model.predict(x)
    model.set_params(method=HPL.paper(unlabelled_weight=np.float32(2)), train=None, epochs=np.int64(4))
    for copy in (pickle.loads(pickle.dumps(model)), SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors"))):
        assert np.array_equal(copy.predict(x), expected) and copy.method == HPL.paper(unlabelled_weight=2) and copy.train is None
        assert copy.method_ == MeanTeacher(decay=.9, unlabelled_weight=1)


def test_schedule():
    "Epochs of its own win; batches are no larger than rows allow, and what belongs to one method alone stays."
    x, y, _ = rows()
    streams = StreamSettings(8, 9, outer_batch=5)
    train = Train(epochs=4, iterations_per_epoch=2, patience=1, streams=streams, optimizer=OptimizerSettings(.01))
    model = SemiSupervisedRegressor("supervised", train=train, random_state=0)
    log = model.fit(x, y).run_.config["train"]
    assert (log["epochs"], log["iterations_per_epoch"], log["patience"], log["optimizer"]["lr_body"]) == (4, 2, 1, .01)
    assert (log["streams"]["labelled_batch"], log["streams"]["unlabelled_batch"], log["streams"]["outer_batch"]) == (8, 9, 5)
    default = SemiSupervisedRegressor("supervised", epochs=1, random_state=0).fit(x, y).run_.config["train"]
    assert (default["epochs"], default["iterations_per_epoch"], default["optimizer"]["lr_head"]) == (1, 50, .001)
    assert (default["streams"]["labelled_batch"], default["streams"]["unlabelled_batch"]) == (16, 32)


def test_pictures_are_saved_and_forget_the_table_before(tmp_path):
    x, y, _ = rows()
    model = SemiSupervisedRegressor("supervised", **QUICK).fit(pd.DataFrame(x, columns=list("abcd")), y)
    pixels = np.random.default_rng(0).integers(0, 255, (120, 8, 8), dtype=np.uint8)
    model.fit(pixels, y)
    assert not hasattr(model, "feature_names_in_") and not hasattr(model, "n_features_in_")
    assert np.array_equal(SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors")).predict(pixels), model.predict(pixels))


def test_files_with_other_parameters_are_refused(tmp_path):
    "A file cannot set what is no parameter, nor a folder to write to."
    from hpl_nb.predictor import read_content, write_content
    x, y, _ = rows()
    path = SemiSupervisedRegressor("supervised", **QUICK).fit(x, y).save(tmp_path/"m.safetensors")
    for name in ("folder", "frobnicate", "network"):
        content = read_content(path)
        content["estimator"]["parameters"][name] = "evil"
        changed = write_content(tmp_path/"changed.safetensors", content)
        with pytest.raises(HplError, match=f"changed.safetensors.*{name}"): SemiSupervisedRegressor.load(changed)


def test_labels_in_frames_and_sparse_features():
    x, y, _ = rows()
    model = SemiSupervisedRegressor("supervised", **QUICK).fit(x, pd.DataFrame({"y": y}))
    assert model.predict(x).shape == (120, 1)
    sparse_output = make_column_transformer((OneHotEncoder(), ["kind"]), remainder="passthrough")
    model = SemiSupervisedRegressor("supervised", preprocessor=sparse_output, **QUICK).fit(TestFrames.frame, y)
    assert np.isfinite(model.predict(TestFrames.frame)).all()


def test_scaled_intervals_repeat_themselves():
    "Also where g reads passes with dropout."
    x, y, _ = rows()
    method = HPL.paper(learner_inputs="pair+disagreement", passes=3)
    model = SemiSupervisedRegressor(method, network=mlp_of, **QUICK).fit(x, y)
    assert same(model, model, x)


def test_calibration_by_other_rows():
    "Coverage on fresh rows is the nominal one within what 500 calibration rows and 3,000 new ones let it vary."
    x, y, true = rows(4000, 100)
    model = SemiSupervisedRegressor("pseudo_label", **QUICK).fit(x[:500], y[:500]).calibrate(x[500:1000], true[500:1000])
    _, low, high = model.predict_interval(x[1000:], .9)
    assert abs(((low <= true[1000:]) & (true[1000:] <= high)).mean() - .9) < .05


def test_default_networks():
    assert default_network((7,), 2)(torch.zeros(3, 7)).shape == (3, 2)
    assert default_network((1, 28, 28), 1)(torch.zeros(2, 1, 28, 28)).shape == (2, 1)
    assert default_network((3, 96, 96), 1).eval()(torch.zeros(2, 3, 96, 96)).shape == (2, 1)
