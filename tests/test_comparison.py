"`compare` scores every method on the same unseen rows, keeps what is finished, and its sentence follows the stated rule."
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import t
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hpl_nb import compare, comparison
from hpl_nb.comparison import PENALTIES, Comparison
from hpl_nb.core import HplError
from hpl_nb.data.columns import default_preprocessor
from hpl_nb.data.own import Reading
from hpl_nb.estimator import LabelledKFold, SemiSupervisedRegressor
from hpl_nb.models import mlp
from hpl_nb.training.state import Train

SMALL = SemiSupervisedRegressor(epochs=1, train=Train(iterations_per_epoch=3))


def rows(n=80, labelled=30, outputs=1):
    "A table and labels with NaN."
    random = np.random.default_rng(0)
    x = random.normal(size=(n, 4))
    y = 10 + 3*x @ random.normal(size=(4, outputs)) + .1*random.normal(size=(n, outputs))
    y[labelled:] = np.nan
    return x, y[:, 0] if outputs == 1 else y


def quiet(*arguments, cv=3, estimator=SMALL, **named): return compare(*arguments, cv=cv, estimator=estimator, verbose=False, **named)


def errors(result, name): return result.scores.query("method == @name")["mae"].to_numpy()


def by_scikit_learn(model, features, y):
    "Errors of the folds from scikit-learn; `features` are those that the training rows of a fold give."
    folds, known = LabelledKFold(3, random_state=0).split(y, y), np.isfinite(y)
    return np.array([-cross_val_score(model, features(train), y, cv=[(train[known[train]], test)], scoring="neg_mean_absolute_error")[0]
                     for train, test in folds])


@pytest.mark.parametrize("kind", ["array", "frame"])
def test_ridge_and_boosting_are_scikit_learns(kind):
    X, y = rows()
    if kind == "frame": X = pd.DataFrame(X, columns=[*"abcd"]).assign(e=np.where(X[:, 0] > 0, "yes", "no"), d=3. + 100*X[:, 3])
    def features(train):
        if kind == "array": return StandardScaler().fit(X[train]).transform(X)
        return default_preprocessor(X, train).fit(X.iloc[train]).transform(X)
    result = quiet(X, y, [])
    assert np.allclose(errors(result, "Ridge"), by_scikit_learn(RidgeCV(PENALTIES), features, y), rtol=1e-9)
    boosting = HistGradientBoostingRegressor(random_state=0)
    assert np.allclose(errors(result, "Boosting"), by_scikit_learn(boosting, features, y), rtol=1e-9)
    assert "No method learned from unlabelled rows" in result.sentence and not result.helped


class Spy(SemiSupervisedRegressor):
    "Notes what `fit` and `predict` were given."
    seen = []

    def fit(self, X, y):
        self.seen.append([X, y])
        return super().fit(X, y)

    def predict(self, X):
        self.seen[-1].append(X)
        return super().predict(X)


def test_no_fit_sees_its_test_rows():
    "Neither labelled nor unlabelled; every fit has all unlabelled rows and the labels of the other folds."
    X, y = rows()
    Spy.seen.clear()
    quiet(X, y, {"spy": Spy(**SMALL.get_params())})
    assert len(Spy.seen) == 3
    for (train, labels, test), (given, held_out) in zip(Spy.seen, LabelledKFold(3, random_state=0).split(X, y)):
        assert np.array_equal(train, X[given]) and np.array_equal(labels, y[given], equal_nan=True) and np.array_equal(test, X[held_out])
        assert np.isfinite(y[held_out]).all() and np.isnan(labels).sum() == 50 and not {*map(tuple, test)} & {*map(tuple, train)}


def test_own_models_get_their_kind_of_rows():
    "A regressor gets numbers, a pipeline the frame, a pipeline that ends with the estimator the rows without a label too."
    X, y = rows()
    frame = pd.DataFrame(X, columns=[*"abcd"]).assign(e="text")
    small = make_pipeline(default_preprocessor(frame), SemiSupervisedRegressor(**SMALL.get_params()))
    forest = RandomForestRegressor(5)
    own = {"forest": forest, "own steps": make_pipeline(default_preprocessor(frame), forest), "network at the end": small}
    result = quiet(frame, y, own)
    learns = result.table["unlabelled"]
    assert learns["network at the end"] and not learns[["forest", "own steps", "Ridge", "Boosting", "Supervised"]].any()
    assert result.scores.equals(result.scores.dropna()) and forest.random_state is None


def test_ridge_learns_the_labels_that_the_estimator_learns():
    "With target='log' Ridge is fitted to logarithms; a label that has none is refused."
    X, y = rows()
    y, logs = np.exp(y/10), SemiSupervisedRegressor(**SMALL.get_params() | {"target": "log"})
    ridge = TransformedTargetRegressor(RidgeCV(PENALTIES), func=np.log, inverse_func=np.exp)
    expected = by_scikit_learn(ridge, lambda train: StandardScaler().fit(X[train]).transform(X), y)
    assert np.allclose(errors(quiet(X, y, [], estimator=logs), "Ridge"), expected, rtol=1e-9)
    with pytest.raises(HplError, match="row 2.*has no logarithm"): quiet(X, np.where(np.arange(80) == 2, -1., y), [], estimator=logs)


def test_missing_values_are_filled_for_all():
    "Ridge sees what the estimator's preprocessor fills in, and the sentence about it is told once."
    X, y = rows()
    frame = pd.DataFrame(np.where(np.random.default_rng(1).random(X.shape) < .1, np.nan, X), columns=[*"abcd"])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = quiet(frame, y, [])
    assert np.isfinite(result.scores["mae"]).all() and errors(result, "Ridge").mean() < errors(result, "Supervised").mean()
    assert len(told) == len({re.sub(r"\d+", "#", str(warning.message)) for warning in told})


def test_two_outputs_and_a_number_for_no_label():
    X, y = rows(outputs=2)
    result = quiet(X, y, ["pseudo_label"])
    marked = quiet(X, np.where(np.isnan(y), -9., y), ["pseudo_label"],
                   estimator=SemiSupervisedRegressor(**SMALL.get_params() | {"reading": Reading(missing_label=-9)}))
    assert len(result.scores) == 12 and np.array_equal(result.scores["mae"], marked.scores["mae"])


def test_jobs_change_nothing_but_the_time():
    "A network of one's own may be a lambda, which other processes get too."
    X, y = rows()
    own = SemiSupervisedRegressor(**SMALL.get_params() | {"network": lambda shape, outputs: mlp(shape[0], (8,), outputs)})
    alone, together = (quiet(X, y, [], cv=2, estimator=own, jobs=jobs).scores.drop(columns="seconds") for jobs in (1, 2))
    pd.testing.assert_frame_equal(alone, together)


def test_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    "What was finished is not trained again; the result is that of one call; another dataset or setting has scores of its own."
    X, y = rows()
    whole, count, score = quiet(X, y, ["pseudo_label"]), [], comparison.score_fold
    def counted(*arguments):
        count.append(arguments)
        if len(count) == 8: raise KeyboardInterrupt
        return score(*arguments)
    monkeypatch.setattr(comparison, "score_fold", counted)
    with pytest.raises(KeyboardInterrupt): quiet(X, y, ["pseudo_label"], folder=tmp_path)
    assert len([*tmp_path.glob("*.json")]) == 7
    first, again = (quiet(X, y, ["pseudo_label"], folder=tmp_path) for _ in range(2))
    assert len(count) == 8 + 5 and again.scores.equals(first.scores)
    pd.testing.assert_frame_equal(first.scores.drop(columns="seconds"), whole.scores.drop(columns="seconds"))
    quiet(X, y + 1, [], folder=tmp_path), quiet(X + 1, y, [], folder=tmp_path), quiet(X, y, [], random_state=1, folder=tmp_path)
    assert len(count) == 8 + 5 + 3*9
    longer = SemiSupervisedRegressor(**SMALL.get_params() | {"epochs": 2})
    quiet(X, y, [], estimator=longer, folder=tmp_path)
    assert len(count) == 8 + 5 + 3*9 + 3, "Ridge and boosting have no epochs"


def test_damaged_score_is_named(tmp_path):
    X, y = rows()
    quiet(X, y, [], folder=tmp_path)
    path = next(tmp_path.glob("*.json"))
    for content in ("", "{}", "[1]", '{"mae": "low", "r2": 1, "seconds": 1, "warnings": []}'):
        path.write_text(content)
        with pytest.raises(HplError, match=f"{path.name} cannot be read .* Delete it"): quiet(X, y, [], folder=tmp_path)


def made(**methods):
    "A comparison with these errors; names of methods that learn from unlabelled rows are capitals."
    scores = [{"method": name, "unlabelled": name.isupper(), "fold": fold, "mae": mae, "r2": .5, "seconds": 1.}
              for name, maes in methods.items() for fold, mae in enumerate(maes)]
    return Comparison(pd.DataFrame(scores))


def test_of_methods_that_are_level_the_first_is_advised():
    "Ridge regression stands first, and a network that stays there differs from it by rounding."
    assert made(ridge=(4., 4.), network=(3.99999, 4.), A=(4.1, 4.)).sentence.endswith("Use ridge.")


@pytest.mark.parametrize("errors, said", [
    ((3., 3.2, 3.1, 3.3, 3.), "Unlabelled rows helped: .* 4 .a. to 3.12 .B., with a gain in 5 of 5 folds."),
    ((3.9, 3.9, 3.9, 3.9, 1.), "Unlabelled rows helped"), # in every fold, though not by a standard error
    ((2., 2., 2., 2., 4.1), "Unlabelled rows helped: .* 4 of 5 folds"), # by more than a standard error
    ((3.9, 4.1, 3.9, 4.1, 3.9), "did not clearly help: .* 3 of 5 folds, by less than the standard error. Use a."),
    ((4., 4.2, 3.9, 4.3, 4.), "did not help: .* 4 .a. to 4.08 .B., with a gain in 1 of 5 folds. Use a."),
    ((4., 4., 4., 4., 4.), "did not help: the mean absolute error stayed at 4 .a., as with B, .* 0 of 5 folds. Use a.")])
def test_the_sentence_follows_its_rule(errors, said):
    "`a` is the best labelled-only method with an error of 4 in each fold, `C` a worse method with unlabelled rows."
    result = made(a=[4.]*5, b=[6.]*5, B=errors, C=[5.]*5)
    assert re.search(said, result.sentence) and result.helped == ("helped" in result.sentence.split(":")[0].split())


def test_the_differences_are_nadeau_and_bengios():
    d = np.array([-.1, -.2, .05, -.3])
    table = made(a=[4.]*4, B=4 + d).table
    error = np.sqrt((1/4 + 1/3)*d.var(ddof=1))
    assert np.isclose(table.loc["B", "difference"], d.mean()) and np.isclose(table.loc["B", "standard_error"], error)
    assert np.isclose(table.loc["B", "p"], 2*t.cdf(d.mean()/error, 3)) and table.loc["B", "folds_won"] == 3


def test_it_shows_itself():
    result = made(a=[4., 5.], B=[3., 3.5])
    html = result._repr_html_()
    assert result.sentence in html and "<table" in html and "hpl-figure" in html and result.sentence in repr(result)
    dots = [trace.x for trace in result.figure("years").data if trace.customdata is not None]
    assert sorted(map(sorted, dots)) == [[3., 3.5], [4., 5.]] and "years" in result.figure("years").layout.xaxis.title.text


@pytest.fixture
def folder(tmp_path):
    "Twelve grey pictures whose brightness is the label."
    for number in range(12): Image.new("RGB", (20, 20), (20*number,)*3).save(tmp_path/f"{number:02}.png")
    return tmp_path


def test_pictures(folder):
    "As an array and as files: Ridge sees their grey pixels."
    labels = np.where(np.arange(12) < 8, 20.*np.arange(12), np.nan)
    array = np.stack([np.full((20, 20), 20*number, dtype=np.uint8) for number in range(12)])
    files = quiet(folder, pd.Series(labels, [f"{number:02}.png" for number in range(12)]), [], cv=2)
    assert errors(files, "Ridge").max() < 1 and errors(quiet(array, labels, [], cv=2), "Ridge").max() < 1


def test_broken_pictures(folder):
    labels = np.where(np.arange(12) < 8, 20.*np.arange(12), np.nan)
    paths = sorted(folder.glob("*.png"))
    paths[3].write_bytes(b"no picture")
    with pytest.raises(HplError, match="X, row 3"): quiet(paths, labels, [], cv=2)
    skipping = SemiSupervisedRegressor(**SMALL.get_params() | {"reading": Reading(skip_broken=True)})
    with pytest.warns(UserWarning, match="1 rows of X are left out"): result = quiet(paths, labels, [], cv=2, estimator=skipping)
    others = [path for path in paths if path != paths[3]]
    assert np.array_equal(errors(result, "Ridge"), errors(quiet(others, np.delete(labels, 3), [], cv=2), "Ridge"))


def test_nothing_unlabelled():
    X, y = rows(30)
    with pytest.warns(UserWarning, match="every row of y has a label.*only labelled-only methods"): result = quiet(X, y, ["pseudo_label"])
    assert [*result.table["unlabelled"]] == [False]*3


class Hesitant(RandomForestRegressor):
    def fit(self, X, y):
        warnings.warn(f"the forest has {len(X)} rows", stacklevel=2)
        return super().fit(X, y)


def test_a_warning_is_shown_once():
    X, y = rows()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet(X, y, {"forest": Hesitant(2)})
    assert [str(warning.message) for warning in told].count("the forest has 20 rows") == 1


BAD = {
    "fewer labels than folds": (dict(cv=31), "30 rows have a label, fewer than the 31 folds; label more rows, or lower cv"),
    "one fold": (dict(cv=1), "cv is 1; give a whole number of at least 2"), "no jobs": (dict(jobs=0), "jobs is 0"),
    "an unknown method": (dict(methods=["ucmve"]), "did you mean 'ucvme'"),
    "a method twice": (dict(methods=["ucvme", "ucvme"]), "'UCVME' would be in the table twice"),
    "a regressor twice": (dict(methods=[RidgeCV()]*2), "'RidgeCV' would be in the table twice"),
    "Ridge again": (dict(methods={"Ridge": "ucvme"}), "'Ridge' would be in the table twice"),
    "all labels": (dict(methods="fully_supervised"), "needs the labels of all rows"),
    "no regressor": (dict(methods={"mine": StandardScaler()}), "under 'mine'; give a short name"),
    "no methods": (dict(methods=3), "methods is 3"), "a class": (dict(methods=[RandomForestRegressor]), "a regressor of scikit-learn"),
    "texts": (dict(X=["A man is playing."]*80), "no method here reads texts. Make sentence embeddings"),
    "no estimator": (dict(estimator=RidgeCV()), "estimator is a RidgeCV")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_trained(name, monkeypatch):
    X, y = rows()
    monkeypatch.setattr(comparison, "score_fold", None)
    changed, said = BAD[name]
    with pytest.raises(HplError, match=said) as refusal:
        quiet(**{"X": X, "y": y, "methods": ["ucvme"]} | changed)
    assert "\n" not in str(refusal.value)


def test_a_method_that_fails_is_named():
    X, y = rows()
    nothing = SemiSupervisedRegressor(network=lambda shape, outputs: None)
    with pytest.raises(HplError, match="mine fails in fold 0: network.* returns a NoneType"): quiet(X, y, {"mine": nothing})
