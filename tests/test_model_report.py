"What a model's report says is true and stands in one file, and a ranking of pseudo-labels counts only if it beats chance."
import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from browser import chromium, needs_browser, open_page
from PIL import Image
from plotly.offline import get_plotlyjs
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from small_runs import on_cpu  # noqa: F401

from hpl_nb.core import HplError
from hpl_nb.defaults import PENALTIES
from hpl_nb.estimator import SemiSupervisedRegressor
from hpl_nb.model_report import coverage_table, left_out_inside, thumbnail
from hpl_nb.predictor import conformal_radius
from hpl_nb.training.state import OptimizerSettings, Train
from hpl_nb.trust import LEVEL, nearest_distance, rank_scores, useful_score, verdict

TRAIN = Train(6, iterations_per_epoch=20, optimizer=OptimizerSettings(lr_body=.01, lr_head=.01))
EVIL, NAME = "<script>alert(1)</script>", "<img src=x onerror=alert(2)>"


def table(rows=500, labelled=150, seed=0):
    "A label whose noise grows with it; all labels, and those of the first rows."
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 4))
    true = 10*np.exp(.6*x[:, 0] + .2*x[:, 1] + .4*random.normal(size=rows))
    frame = pd.DataFrame(x, columns=[EVIL, "b", "c", "d"], index=[f"{NAME} {row}" for row in range(rows)])
    return frame, np.where(np.arange(rows) < labelled, true, np.nan), true


class Page(HTMLParser):
    "The elements of a page, and the words outside its scripts and styles."
    VOID = {"meta", "br", "link", "img"}

    def __init__(self, path):
        super().__init__()
        self.elements, self.words, self.open = [], "", []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & {*self.open}: self.words += data

    def having(self, tag): return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def data(): return table()


@pytest.fixture(scope="module")
def model(data):
    X, y, _ = data
    return SemiSupervisedRegressor("ucvme", train=TRAIN, validation_fraction=.5, random_state=1).fit(X.iloc[:400], y[:400])


@pytest.fixture(scope="module")
def page(model, tmp_path_factory): return Page(model.report(tmp_path_factory.mktemp("report")/"report.html"))


# The page

def test_nothing_of_the_users_becomes_markup(page):
    "A column and rows with names that would run: they are words on the page, and no element or attribute has them."
    assert EVIL in page.words and NAME in page.words
    assert not page.having("img") and all(set(attributes) == set() for attributes in page.having("script"))
    assert "alert(" not in str(page.elements)
    assert not re.search(r"<script>alert|<img src=x", page.text)


def test_page_needs_no_other_file(page):
    assert not [attributes for _, attributes in page.elements if {"src", "href"} & {*attributes}]
    policy = next(a["content"] for a in page.having("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert page.text.count(get_plotlyjs()) == 1


def test_page_can_be_read_aloud(page):
    assert page.having("html") == [{"lang": "en"}] and len(page.having("title")) == len(page.having("h1")) == len(page.having("main")) == 1
    headings = {attributes["id"] for attributes in page.having("h2")}
    assert len(headings) == len(page.having("h2")) > 6
    assert all(attributes["aria-labelledby"] in headings for attributes in page.having("figure"))
    assert len(page.having("figure")) == page.words.count("It is drawn by a script") >= 3
    assert page.having("th") and all(attributes.get("scope") in ("col", "row") for attributes in page.having("th"))


def test_page_says_what_was_trained(page, model):
    for words in ("75 labelled, 75 validation, 250 unlabelled", "UCVME", f"6, of which number {model.run_.metrics['epoch']} was",
                  "selected the epoch, so that the error is slightly optimistic", f"torch {model.run_.environment['torch']}", "4 columns"):
        assert words in page.words, words


@needs_browser
def test_page_in_a_browser_without_a_network(page, model, tmp_path):
    path = model.report(tmp_path/"report.html")
    with chromium() as browser, open_page(browser, offline=True) as (shown, errors):
        shown.on("dialog", lambda dialog: errors.append("something of the user's has run"))
        shown.goto(path.as_uri())
        shown.wait_for_selector(".main-svg")
        shown.wait_for_function("document.querySelectorAll('figure .main-svg').length >= 3")
        assert shown.locator(".hpl-figure").count() == len(page.having("figure"))
    assert not errors


# The errors

def test_held_out_rows_are_those_of_the_run(model, data, page):
    rows, run = model.held_out_.set_index("row"), model.run_.predictions
    run = run[(run["split"] == "val") & (run["epoch"] == model.run_.metrics["epoch"])]
    assert np.array_equal(rows["y_true"], pd.Series(data[2], index=data[0].index)[rows.index])
    assert np.array_equal(rows["prediction"], run["y_pred"]) and [*rows.index] == [*data[0].index[run["index"]]]
    assert f"{mean_absolute_error(rows['y_true'], rows['prediction']):.4g}" in page.words


def test_ridge_is_ridge(model, data):
    "Of the 75 rows that trained, standardised as the network's inputs are; the preprocessor of a frame of numbers keeps them."
    X, y, _ = data
    held = X.index.isin(model.held_out_["row"])
    train = X[~held & np.isfinite(y)]
    scaled = (X - X.iloc[:400][~held[:400]].mean())/X.iloc[:400][~held[:400]].std(ddof=0)
    expected = RidgeCV(PENALTIES).fit(scaled.loc[train.index], y[X.index.isin(train.index)])
    assert np.allclose(model.held_out_["ridge"], expected.predict(scaled.loc[model.held_out_["row"]]), rtol=1e-3)


def test_test_rows_make_the_honest_numbers(model, data, tmp_path):
    X, _, true = data
    page = Page(model.report(tmp_path/"report.html", X.iloc[400:], np.where(np.arange(100) < 90, true[400:], np.nan)))
    predicted, true = model.predict(X.iloc[400:490]), true[400:490]
    assert "Error on 90 test rows" in page.words
    for number in (mean_absolute_error(true, predicted), root_mean_squared_error(true, predicted), r2_score(true, predicted)):
        assert f"{number:.4g}" in page.words
    _, low, high = model.predict_interval(X.iloc[400:490], .9)
    assert f"{np.round(100*np.mean((low <= true) & (true <= high)), 1):.4g}" in page.words


def test_rows_that_trained_are_no_test_rows(model, data, tmp_path):
    with pytest.warns(UserWarning, match="150 of 160 test rows are equal to a row that trained"):
        model.report(tmp_path/"report.html", pd.concat([data[0].iloc[:150], data[0].iloc[400:410]]), np.r_[data[2][:150], data[2][400:410]])


@pytest.mark.parametrize("epochs, words", [(None, "the error is slightly optimistic"), (0, "the model that predicts now is Ridge of all"),
                                           (3, "the model was trained again, on all labelled rows")])
def test_page_says_whether_the_model_was_trained_again(epochs, words, model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "_again", epochs)
    page = Page(model.report(tmp_path/"report.html"))
    assert words in page.words and ("of the first training" in page.words) == (epochs == 3)


def test_numbers_are_in_label_units_whatever_is_learned(data, tmp_path):
    "Labels of which the logarithm is learned: errors, baselines, intervals and pseudo-labels come back in days."
    X, y, true = data
    model = SemiSupervisedRegressor("ucvme", target="log", train=TRAIN, validation_fraction=.5, random_state=1).fit(X.iloc[:400], y[:400])
    rows = model.held_out_.set_index("row")
    assert np.allclose(rows["y_true"], pd.Series(true, index=X.index)[rows.index])
    assert np.allclose(rows["error"], np.abs(np.log(rows["y_true"]) - np.log(rows["prediction"])), atol=1e-4)
    assert (rows["ridge"] > 0).all() and np.allclose(np.log(rows["mean"]), np.log(rows["mean"].iloc[0]))
    page, predicted = Page(model.report(tmp_path/"report.html", X.iloc[400:], true[400:])), model.predict(X.iloc[400:])
    assert f"{mean_absolute_error(true[400:], predicted):.4g}" in page.words and "learned as log" in page.words
    assert (model.pseudo_labels_["pseudo_label"] > 0).all()


# Coverage

@pytest.mark.parametrize("coverage", [.5, .8, .9])
def test_left_out_coverage_is_that_of_each_row_left_out(coverage):
    errors = np.random.default_rng(3).exponential(size=41)
    errors[5] = errors[7] # a tie
    one_by_one = [error <= conformal_radius(np.delete(errors, row), coverage)[0] for row, error in enumerate(errors)]
    assert np.array_equal(left_out_inside(errors, coverage), one_by_one)


def test_coverage_of_thirds():
    inside = np.array([True]*6 + [False]*3)[:, None]
    table = coverage_table({.9: inside}, np.arange(9.)[:, None])
    assert table.iloc[0].tolist() == [90., 66.7, 100., 100., 0.]


# Trust

def test_correlations_are_scipys():
    random = np.random.default_rng(0)
    scores = pd.DataFrame({"a": random.normal(size=50), "tied": random.integers(0, 3, 50), "constant": 1.})
    errors = random.exponential(size=50)
    found = rank_scores(scores, errors).set_index("score")
    for name in ("a", "tied"): assert math.isclose(found.loc[name, "correlation"], spearmanr(scores[name], errors).statistic, abs_tol=1e-12)
    assert found.loc["constant"].isna().all() and found.index[-1] == "constant"


@pytest.mark.parametrize("scores, errors", [({"a": [1., 2.]}, [1., 1.]), ({"a": [1.]}, [1.]), ({"a": [np.nan, 1., 2.]}, [1., 2., 3.])])
def test_what_cannot_be_ranked_is_not_used(scores, errors):
    found = rank_scores(pd.DataFrame(scores), np.array(errors))
    assert found["correlation"].isna().all() and useful_score(found) is None
    assert verdict(found, len(errors)).startswith("No score can be compared")


def test_chance_is_rarely_taken_for_trust():
    "Seven useless scores, 60 rows: at most about one table in twenty names one (binomial limit of four standard errors)."
    named = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        named += useful_score(rank_scores(pd.DataFrame(random.normal(size=(60, 7))), random.exponential(size=60), 199, seed)) is not None
    assert named/200 < LEVEL + 4*math.sqrt(LEVEL*(1 - LEVEL)/200)


def test_distance_is_of_the_nearest():
    known, new = np.random.default_rng(0).normal(size=(2, 20, 3))
    each = np.sort(np.linalg.norm((new[:, None] - known)/known.std(axis=0), axis=-1))[:, :5].mean(axis=1)
    assert np.allclose(nearest_distance(known, new), each)


def test_trust_knows_the_errors_of_the_unlabelled_rows(model, data):
    "Of the 250 rows that no label of which took part: those trusted least err most."
    labels = model.pseudo_labels_
    error = np.abs(labels["pseudo_label"] - pd.Series(data[2], index=data[0].index)[labels["row"]].to_numpy())
    assert model.trust_["used"].sum() == 1 and labels["trust"].between(0, 1, inclusive="right").all() and labels["trust"].max() == 1
    assert spearmanr(labels["trust"], error).statistic < -.2
    assert error[labels["trust"] < 1/3].mean() > 1.5*error[labels["trust"] > 2/3].mean()


def test_page_names_the_least_trusted(page, model):
    for row in model.pseudo_labels_.nsmallest(20, "trust")["row"]: assert row in page.words
    assert verdict(model.trust_, 75) in page.words


def test_no_score_is_worth_anything(data, tmp_path):
    "Labels that have nothing to do with the rows and a noise that is the same everywhere."
    X, y, _ = data
    random = np.random.default_rng(0)
    noise = SemiSupervisedRegressor("pseudo_label", train=TRAIN, validation_fraction=.5, random_state=0).fit(
        X.iloc[:400], np.where(np.isfinite(y[:400]), random.normal(size=400), np.nan))
    assert noise.pseudo_labels_["trust"].isna().all() and not noise.trust_["used"].any()
    page = Page(noise.report(tmp_path/"report.html"))
    assert "So the pseudo-labels are not ranked." in page.words and "not to trust" not in page.words


# What is not there

def test_no_held_out_rows(data, tmp_path):
    X, y, true = data
    model = SemiSupervisedRegressor("pseudo_label", train=TRAIN, epochs=1, validation_fraction=0, random_state=0).fit(X.iloc[:400], y[:400])
    page = Page(model.report(tmp_path/"report.html"))
    assert "No rows were held out (validation_fraction=0" in page.words and "Losses" in page.words
    tested = Page(model.report(tmp_path/"report.html", X.iloc[400:], true[400:]))
    assert "Error on 100 test rows" in tested.words and "too few for intervals" in tested.words


def test_a_loaded_model_has_a_report_without_its_run(model, data, tmp_path):
    loaded = SemiSupervisedRegressor.load(model.save(tmp_path/"model.safetensors"))
    for name in ("trust_", "held_out_", "pseudo_labels_"): pd.testing.assert_frame_equal(getattr(loaded, name), getattr(model, name))
    page, before = (Page(each.report(tmp_path/"report.html", data[0].iloc[400:], data[2][400:])) for each in (loaded, model))
    assert "epochs, seconds, seed, versions and learning curves are missing here" in page.words and "Learning curve" not in page.words
    assert page.words.split("What was trained")[0] == before.words.split("What was trained")[0]


def test_x_and_y_go_together(model, data, tmp_path):
    with pytest.raises(HplError, match="got X or y alone"): model.report(tmp_path/"report.html", data[0])
    with pytest.raises(HplError, match="no row of y has a label"): model.report(tmp_path/"report.html", data[0].iloc[:3], [np.nan]*3)
    with pytest.raises(HplError, match="shape"): model.report(tmp_path/"report.html", data[0].iloc[:3], np.ones((3, 2)))
    assert not [*tmp_path.iterdir()]


def test_the_file_is_whole_or_not_there(model, tmp_path):
    (tmp_path/"file").write_text("there before")
    with pytest.raises(HplError, match="could not write"): model.report(tmp_path/"file"/"report.html")
    path = model.report(tmp_path/"new folder"/"report.html")
    assert [*path.parent.iterdir()] == [path] and path.read_text() == model.report(path).read_text()


# Other inputs

def test_two_outputs(tmp_path):
    x, _, true = table()
    both = np.c_[true, 5*x["b"].to_numpy()]
    model = SemiSupervisedRegressor("mean_teacher", train=TRAIN, validation_fraction=.5, random_state=0).fit(
        x.to_numpy()[:400], np.where(np.arange(400)[:, None] < 150, both[:400], np.nan))
    assert {*model.trust_["output"]} == {0, 1} and len(model.held_out_) == 2*75 and len(model.pseudo_labels_) == 2*250
    first = model.held_out_[model.held_out_["output"] == 1]
    assert np.allclose(first["y_true"], both[first["row"], 1])
    page = Page(model.report(tmp_path/"report.html", x.to_numpy()[400:], both[400:]))
    assert "Output 0:" in page.words and "Output 1:" in page.words


@pytest.mark.parametrize("files", [False, True])
def test_pictures_are_shown(files, model, tmp_path, monkeypatch):
    "Two steps on noise, and a trust that is given: the twenty least trusted pictures, in that order, files with their names."
    pixels = np.random.default_rng(0).integers(0, 256, size=(60, 8, 8)).astype(np.uint8)
    paths = [tmp_path/f"<b>{row}.png" for row in range(60)]
    for path, picture in zip(paths, pixels): Image.fromarray(picture).save(path)
    trust = np.random.default_rng(1).permutation(50)[:, None]/50
    monkeypatch.setattr("hpl_nb.estimator.trust_ranking", lambda *_: (model.trust_, np.ones((5, 1)), trust))
    short = SemiSupervisedRegressor("pseudo_label", train=Train(1, iterations_per_epoch=2), validation_fraction=.5, random_state=0)
    fitted = short.fit(paths if files else pixels, np.where(np.arange(60) < 10, np.arange(60.), np.nan))
    page, least = Page(fitted.report(tmp_path/"report.html")), 10 + np.argsort(trust[:, 0])[:20]
    shown = re.findall(r'"source":"(data:image/png;base64,[^"]+)', page.text.replace(r"\u002f", "/"))
    assert len(shown) == 20 and all(len({*shown[:i + 1]}) == i + 1 for i in range(20)) and not page.having("b")
    if not files: assert shown == [thumbnail(pixels[row]) for row in least]
    if files: assert [int(row) for row in re.findall(r"<b>(\d+).png", page.words)] == least.tolist()
