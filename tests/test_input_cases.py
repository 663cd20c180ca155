"Whatever a person may hand in: numbers as text, dates, sparse columns, masks, odd shapes, pictures of any mode, files of any name."
import csv
import datetime
import io
import os
import struct
import unicodedata
import warnings
import zlib
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as some
from PIL import Image
from scipy import sparse
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from hpl_nb import SemiSupervisedRegressor
from hpl_nb.core import HplError
from hpl_nb.data.columns import FrameEncoder, default_preprocessor
from hpl_nb.data.images import ImageFiles, ImageSource, decode_image
from hpl_nb.data.own import Reading, from_arrays, from_frame, from_images
from hpl_nb.data.pixels import on_disk
from hpl_nb.data.rotated_digits import RotatedDigits
from hpl_nb.data.tables import label_problems, read_table
from hpl_nb.experiment import Experiment
from hpl_nb.methods.core import Supervised
from hpl_nb.models import small_cnn
from hpl_nb.predictor import Predictor
from hpl_nb.report import finished_runs, report
from hpl_nb.runner import train_experiment
from hpl_nb.store import merge_runs
from hpl_nb.training.loop import fit
from hpl_nb.training.run import load_run
from hpl_nb.training.state import Train

pytestmark = pytest.mark.filterwarnings("ignore")
few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(contains, function, *args, **kwargs):
    with pytest.raises(HplError) as error: function(*args, **kwargs)
    assert contains in str(error.value), str(error.value)
    return str(error.value)


def regressor(**arguments):
    return SemiSupervisedRegressor("pseudo_label", train=Train(iterations_per_epoch=10), epochs=2, random_state=0, **arguments)


# case 2: columns

AGES = [str(age) for age in range(20, 60)]
TIMES = pd.date_range("2023-12-25", periods=40, freq="30h")
NUMBERS_AS_TEXT = {
    "object": pd.Series(AGES, dtype=object), "str": pd.Series(AGES, dtype="str"), "string": pd.Series(AGES, dtype="string"),
    "arrow": pd.Series(AGES, dtype=pd.ArrowDtype(pa.string())), "category": pd.Series(AGES).astype("category"),
    "spaces": pd.Series([f" {age} " for age in AGES]), "missing": pd.Series([*AGES[:39], "n/a"]),
    "mixed": pd.Series([*AGES[:20], *range(20)], dtype=object),
    "thousands": pd.Series([f"{40*int(age):,}" for age in AGES]), "decimal comma": pd.Series([f"{age},5" for age in AGES]),
    "apostrophe": pd.Series([f"{age}'000.5" for age in AGES]), "percent": pd.Series([f"{age} %" for age in AGES]),
    "signs": pd.Series([f"-{age}.25e1" for age in AGES])}
DATES = {
    "datetime": TIMES.to_series(index=range(40)), "zone": TIMES.tz_localize("Asia/Tokyo").to_series(index=range(40)),
    "date": pd.Series(TIMES.date, dtype=object), "date text": pd.Series(TIMES.strftime("%Y-%m-%d")),
    "ISO": pd.Series(TIMES.strftime("%Y-%m-%dT%H:%M:%S")),
    "day first": pd.Series(TIMES.strftime("%d.%m.%Y")), "American": pd.Series(TIMES.strftime("%m/%d/%Y")),
    "month": pd.Series(TIMES.strftime("%d %b %Y")),
    "timestamps": pd.Series(list(TIMES), dtype=object), "category": TIMES.to_series(index=range(40)).astype("category"),
    "date category": pd.Series(TIMES.date, dtype=object).astype("category"),
    "arrow": pd.Series(TIMES.date, dtype=pd.ArrowDtype(pa.date32())),
    "period": pd.Series(TIMES.to_period("D")), "periods": pd.Series(list(TIMES.to_period("D")), dtype=object),
    "timedelta": pd.Series(TIMES - TIMES[0]), "durations": pd.Series(list(TIMES - TIMES[0]), dtype=object),
    "clock": pd.Series(TIMES.time, dtype=object), "clock text": pd.Series(TIMES.strftime("%H:%M"))}
NUMBERS = {
    "bool": [True, False], "np.bool_": [np.True_, np.False_], "Decimal": [Decimal("1.5"), Decimal(2)],
    "Fraction": [Fraction(1, 2), Fraction(3)],
    "int8": [np.int8(1), np.int8(2)], "float16": [np.float16(1.5), 2], "all": [1, 2.5, np.int8(3), Decimal(4), Fraction(1, 2), True]}


def advised(message, X):
    "What the message says to type, typed: a column for each line."
    *_, lines = message.partition(". Type ")
    for line in lines.partition(", or, where they name")[0].split(" or X"):
        names = {"X": X.copy(), "frame": X.copy(), "pd": pd, "np": np}
        exec(line if line.startswith(("X", "frame")) else f"X{line}", names)
        yield names["X"]["age"]


AMBIGUOUS = {"thousands": pd.Series([f"{age},500" for age in AGES]),
             "either first": pd.Series([f"0{1 + day % 9}/0{1 + day % 7}/2024" for day in range(40)]),
             "zeros": pd.Series([f"0{age}" for age in AGES]), "category": NUMBERS_AS_TEXT["category"],
             "date category": DATES["date category"]}


@pytest.mark.parametrize("kind", [*NUMBERS_AS_TEXT, *DATES])
def test_numbers_as_text_and_dates_are_refused_by_from_frame_with_a_line_that_makes_numbers(kind):
    column = (NUMBERS_AS_TEXT | DATES)[kind]
    X = pd.DataFrame({"age": column, "other": np.arange(40.)})
    message = refused("column 'age': its values are ", from_frame, X.assign(y=np.arange(40.)), "y", impute="median")
    assert "Type frame['age'] = " in message and "'is ' + frame['age'].astype(str)" in message
    for numbers in advised(message.replace("frame[", "X["), X):
        assert pd.api.types.is_numeric_dtype(numbers) and numbers.nunique() == column.nunique() - (kind == "missing"), (message, numbers)
        if kind in DATES and kind not in ("clock", "clock text", "periods", "timedelta", "durations", "period"):
            day = (TIMES - pd.Timestamp("2000-01-01")).days
            assert np.abs(np.asarray(numbers) - day).max() <= 1.5, (message, numbers)


@pytest.mark.parametrize("kind", [*NUMBERS_AS_TEXT, *DATES])
def test_the_estimator_reads_what_has_one_reading_as_the_line_does(kind):
    "The oracle is pandas, by the line that from_frame advises."
    column = (NUMBERS_AS_TEXT | DATES)[kind]
    X = pd.DataFrame({"age": column, "other": np.arange(40.)**.5})
    if kind in AMBIGUOUS: refused("Type X['age'] = ", default_preprocessor, X); return
    with pytest.warns(UserWarning, match="X: columns are read as numbers: 'age'"): fitted = default_preprocessor(X).fit(X)
    lines = refused("", from_frame, X.assign(y=np.arange(40.)), "y", impute="median").replace("frame[", "X[")
    numbers = next(advised(lines, X))
    by_line = X.assign(age=np.asarray(numbers, dtype=float))
    expected = default_preprocessor(by_line).fit_transform(by_line)
    np.testing.assert_allclose(fitted.transform(X), expected, atol=1e-9)
    np.testing.assert_allclose(fitted.transform(X[::-1])[::-1], expected, atol=1e-9)
    refused("row 0 (the first is 0): 'soon' cannot be read as the ", fitted.transform, X.astype({"age": object}).assign(age="soon"))


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused(kind):
    message = refused("column 'age': its values are ", regressor().fit, pd.DataFrame({"age": AMBIGUOUS[kind]}), np.arange(40.))
    assert message.count("X['age'] = ") == (3 if kind in ("thousands", "either first") else 2), message


@pytest.mark.parametrize("column", [
    ["a", "1", "b", "2"]*10, ["1st", "2nd"]*20, ["May", "June"]*20, ["A 2024", "B 2024"]*20, ["10 kg", "20 kg"]*20, ["1,2,3", "4"]*20,
        ["yes", "no"]*20,
    ["", "n/a"]*20, ["1.2.3.4", "1.10"]*20, pd.Categorical([1, 2]*20), pd.cut(np.arange(40.), 4)])
def test_other_texts_and_categories_stay_categories(column):
    frame = pd.DataFrame({"c": column, "y": np.arange(40.)})
    values = pd.Series(column).astype(object).map(str)
    encoder = from_frame(frame, "y").notes["encoder"]
    assert set(encoder["categories"]["c"]) <= set(values) and not encoder["medians"]
    assert default_preprocessor(frame[["c"]]).fit_transform(frame[["c"]]).shape == (40, values.nunique())


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_in_a_column_of_any_type_are_numbers(kind):
    values = NUMBERS[kind]*20
    frame = pd.DataFrame({"a": pd.Series(values, dtype=object), "y": np.arange(len(values), dtype=float)})
    data = from_frame(frame, "y")
    assert data.inputs.flatten().tolist() == [float(value) for value in values]
    scaled = default_preprocessor(frame[["a"]]).fit_transform(frame[["a"]])
    floats = frame[["a"]].astype(float)
    np.testing.assert_allclose(scaled, default_preprocessor(floats).fit_transform(floats))
    encoder = FrameEncoder(**data.notes["encoder"])
    np.testing.assert_array_equal(encoder.encode(frame.assign(a=[f" {float(value)}" for value in values])),
        data.inputs) # of another program


def test_a_column_of_numbers_that_comes_as_something_else_is_refused():
    frame = pd.DataFrame({"a": np.arange(20.), "y": np.arange(20.)})
    encoder = FrameEncoder(**from_frame(frame, "y").notes["encoder"])
    refused("row 0 (the first is 0): '2024-01-31' is not a number", encoder.encode, frame.assign(a=datetime.date(2024, 1, 31)))
    refused("is not a number", encoder.encode, frame.assign(a=pd.Timestamp("2024-01-31")))
    refused("features are missing: 'a' in 20 row(s)", encoder.encode, frame.assign(a="nan"))


def test_ages_stored_as_text_are_numbers():
    ages = np.repeat(np.arange(20, 60), 3)
    X, y = pd.DataFrame({"age": ages.astype(str)}), ages.astype(float)
    model = SemiSupervisedRegressor("supervised", epochs=10, random_state=0).fit(X, y)
    old, older, young = model.predict(pd.DataFrame({"age": ["65", "70", "15"]}))
    assert young < 25 < 50 < old < older
    assert np.array_equal(model.predict(pd.DataFrame({"age": [65, 70, 15]})), [old, older, young])


# case 13: sparse

@pytest.mark.parametrize("others", [{}, {"n": np.arange(120.)}, {"c": ["a", "b"]*60}])
def test_sparse_dummies(others, tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"k": rng.choice(list("abcd"), 120)})
    X, thick = (pd.get_dummies(frame, sparse=s).assign(**others) for s in (True, False))
    y = thick["k_a"] + rng.normal(0, .1, 120)
    model, plain = regressor().fit(X, y.where(X.index < 40)), regressor().fit(thick, y.where(X.index < 40))
    np.testing.assert_array_equal(model.predict(X), plain.predict(thick))
    np.testing.assert_array_equal(model.predict(thick), plain.predict(X))
    np.testing.assert_array_equal(SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors")).predict(X), plain.predict(X))
    assert torch.equal(from_frame(X.assign(y=y), "y").inputs, from_frame(thick.assign(y=y), "y").inputs)


def test_sparse_matrices_name_what_to_type():
    x = sparse.random_array((20, 3), rng=0, format="csr")
    refused("Give them as .toarray()", from_arrays, x, np.arange(20.))
    refused("Give them as .toarray()", from_arrays, np.ones((20, 2)), x)
    refused("not one array", from_arrays, torch.eye(20).to_sparse(), np.arange(20.))
    with pytest.raises(TypeError, match="toarray"): regressor().fit(x, np.arange(20.))
    dummies = pd.get_dummies(pd.Series(list("abc")*9))
    np.testing.assert_array_equal(*(default_preprocessor(X).fit_transform(X) for X in (dummies, dummies.astype(pd.SparseDtype(bool)))))


# issue 17: a CSV as people have it

def patients(n=400, seed=0):
    "Hospital stays: an identifier, a date, gaps, impossible values, a skewed label that a third of the rows have."
    rng = np.random.default_rng(seed)
    days = TIMES[0] + pd.to_timedelta(rng.integers(0, 900, n), "D")
    frame = pd.DataFrame({"patient_id": np.arange(n) + 1000, "admission": days.strftime("%Y-%m-%d"),
                          "age": rng.normal(60, 12, n).round().clip(18, 95), "bmi": rng.gamma(30, .9, n).round(1),
                          "ward": rng.choice(list("ABC"), n), "name": [f"patient {row}" for row in range(n)],
                          "emergency": rng.random(n) < .3, "empty": np.nan})
    stay = np.exp(1 + .03*(frame["age"] - 60) + .5*(frame["ward"] == "A") + .4*frame["emergency"] + rng.normal(0, .2, n))
    frame.loc[rng.random(n) < .1, "bmi"], frame.loc[rng.random(n) < .1, "ward"] = np.nan, None
    frame.loc[[5, 9], "bmi"], frame.loc[7, "age"] = 999, -1
    return frame, stay, stay.where(np.arange(n) % 3 == 0)


def test_no_refusal_before_the_first_fit(tmp_path):
    "One sentence for each thing that was done; new rows lack other values, and have a ward that is new."
    X, stay, y = patients()
    X.assign(length=y).to_csv(tmp_path/"patients.csv", index=False)
    table = pd.read_csv(tmp_path/"patients.csv")
    X, y = table.drop(columns="length"), table["length"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = regressor().fit(X, y)
    said = [str(warning.message) for warning in told]
    for part in ("are left out: 'empty'", "only name the rows: 'patient_id'; 'name'",
                 f"'bmi' in {X['bmi'].isna().sum()} row(s); 'ward' in ",
                 "'admission' (dates, as days since 2000-01-01)", "'age' in 1 row(s), such as -1 in row 7",
                 "'bmi' in 2 row(s), such as 999 in row 5"):
        assert sum(part in sentence for sentence in said) == 1, (part, said)
    assert len(said) == 5 and all(warning.filename == __file__ for warning in told)
    new = X.tail(30).astype({"emergency": object}).assign(ward="D")
    new.loc[new.index[3], ["age", "admission", "emergency"]] = np.nan
    assert np.isfinite(model.predict(new)).all() and np.isfinite(model.predict(new[:0].reindex([0]).astype(object))).all()
    assert model.predict(X.assign(patient_id=0, name=None, empty=1.)).tolist() == model.predict(X).tolist()
    loaded = SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors")) # nothing to trust
    np.testing.assert_array_equal(loaded.predict(new), model.predict(new))


def test_filling_is_scikit_learns():
    "Medians and most frequent values of the training rows, and an indicator for each column with a gap in them."
    X, _, _ = patients()
    X = X[["age", "bmi", "ward", "emergency"]].assign(age=X["age"].where(X["age"] > 0), bmi=X["bmi"].where(X["bmi"] < 999))
    train = np.arange(300)
    found = default_preprocessor(X, train).fit(X.iloc[train]).transform(X)
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler()).fit(X.iloc[train, [0, 1, 3]].astype(float)).transform(
        X.iloc[:, [0, 1, 3]].astype(float))
    np.testing.assert_allclose(found[:, :3], numbers)
    ward = X["ward"].fillna(X["ward"][:300].mode()[0])
    np.testing.assert_array_equal(found[:, 3:6], pd.get_dummies(ward))
    np.testing.assert_array_equal(found[:, 6:], X[["age", "bmi", "ward"]].isna())


def test_arrays_with_gaps_are_filled():
    x = np.random.default_rng(0).normal(size=(60, 3))
    y, holes = x[:, 0] + 3, np.where(np.random.default_rng(1).random((60, 3)) < .1, np.nan, x)
    model, complete = regressor().fit(holes, np.where(np.arange(60) < 30, y, np.nan)), regressor().fit(x, y)
    assert np.isfinite(model.predict(x)).all() and np.isfinite(complete.predict(np.full((2, 3), np.nan))).all()
    assert model.__sklearn_tags__().input_tags.allow_nan
    other = regressor().fit(holes[:, :2], np.where(np.arange(60) < 30, y, np.nan)).predict(np.array([[np.nan, 1.], [1., np.nan]]))
    assert np.isfinite(other).all()


@pytest.mark.parametrize("value", [999., 1e30])
def test_one_impossible_value_leaves_the_others_different(value):
    values = np.append(np.random.default_rng(0).normal(27, 4, 399), value)
    features = default_preprocessor(pd.DataFrame({"bmi": values})).fit_transform(pd.DataFrame({"bmi": values}))
    assert .9 < features[:-1].std() < 1.1 and features.max() < 10


def test_identifiers():
    "Left out by name only; a column that counts the rows is kept, a score with a value in each row as well."
    n = np.arange(200)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"CaseID": rng.permutation(200), "Unnamed: 0": n, "order": n, "score": rng.permutation(10_000)[:200],
                          "group_id": n % 7, "weight_kg": rng.normal(size=200)})
    with pytest.warns(UserWarning) as told: reader = default_preprocessor(frame)[0]
    assert {*reader.numbers} == {2, 3, 4, 5} and not reader.texts
    assert [str(warning.message) for warning in told] == [
        "X: columns with a value of their own in nearly every row are left out, since they only name the rows: 'CaseID'; 'Unnamed: 0'.",
        "X: columns that count the rows are kept: 'order'. Drop them if the order of the rows means nothing."]
    refused("no column is left", default_preprocessor, frame[["CaseID"]])


def test_text_of_many_values_keeps_the_frequent_ones():
    codes = pd.DataFrame({"icd": [f"I{row % 60}" if row % 2 else "I0" for row in range(600)]})
    with pytest.warns(UserWarning, match="only the most frequent values get a feature of their own: 'icd' has 31"):
        few_features = default_preprocessor(codes, most=10)
    features = few_features.fit(codes).transform(pd.concat([codes, pd.DataFrame({"icd": ["new"]})]))
    assert features.shape == (601, 10) and (features.sum(axis=1) == 1).all() and (features[-1] == features[3]).all()


def test_other_columns_at_predict_are_one_sentence():
    X, _, y = patients()
    X = X[["age", "bmi", "emergency"]]
    model = regressor().fit(X, y)
    for other, what in ((X[["bmi", "age", "emergency"]], "must be in the same order"), (X[["age", "bmi"]], "now missing:\n- emergency"),
                        (X.assign(weight=1.), "unseen at fit time:\n- weight")):
        message = refused(what, model.predict, other)
        assert "\nType X = X.reindex(columns=model.feature_names_in_), which leaves new columns out" in message
        assert np.isfinite(model.predict(other.reindex(columns=model.feature_names_in_))).all()


def test_a_filling_preprocessor_of_ones_own_is_loaded_without_trusted(tmp_path):
    X, _, y = patients()
    X = X[["age", "bmi", "ward"]]
    numbers = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    texts = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    steps = (numbers, make_column_selector(dtype_include="number")), (texts, make_column_selector(dtype_exclude="number"))
    model = regressor(preprocessor=make_column_transformer(*steps)).fit(X, y)
    loaded = SemiSupervisedRegressor.load(model.save(tmp_path/"m.safetensors"))
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


# labels

NO_LABEL = [None, np.nan, pd.NA, pd.NaT, "", " ", "nan", "NaN", "NA", "n/a", "N/A", "None", "null", "NULL", "<NA>", "#N/A", np.ma.masked,
    np.datetime64("NaT"), Decimal("NaN")]


@few
@given(some.lists(some.one_of(some.sampled_from(NO_LABEL), some.floats(-1e6, 1e6), some.integers(-10**6, 10**6),
    some.fractions(max_denominator=9)), min_size=1, max_size=12))
def test_every_way_to_say_no_label(values):
    numbers, problems = label_problems(values, unknown_ok=True)
    unknown = np.isnan(numbers)
    said = [any(value is other for other in NO_LABEL) for value in values]
    assert unknown.tolist() == said and not problems
    assert [float(value) for value, none in zip(values, said) if not none] == numbers[~unknown].tolist()


@pytest.mark.parametrize("label", [1+2j, np.timedelta64(3, "D"), np.datetime64("2024-01-01"), datetime.date(2024, 1, 1), pd.Timedelta(1),
    pd.Period("2024"), "old", "1,5", (1,), {}])
def test_what_is_no_number_is_no_label(label):
    column = pd.Series([label, *np.arange(19.)], dtype=object)
    for function in (lambda: from_frame(pd.DataFrame({"a": np.arange(20.), "y": column}), "y"),
        lambda: from_arrays(np.ones((20, 2)), column)):
        refused("row 0 (the first is 0): label ", function)


@pytest.mark.parametrize("kind", [int, float, object])
def test_masked_labels_are_unlabelled_everywhere(kind):
    x, y = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40)
    masked = np.ma.array(y.astype(kind), mask=y % 2 == 1)
    data = from_arrays(x, masked)
    assert np.isnan(data.targets[1::2]).all() and (data.unlabelled % 2 == 1).all() and len(data.unlabelled) == 20
    model = regressor().fit(x, masked)
    assert (model.pseudo_labels_["row"] % 2 == 1).all() and len(model.pseudo_labels_) == 20
    two = from_arrays(x, np.ma.array(np.stack([y, y], 1), mask=np.stack([y % 2 == 1]*2, 1)))
    assert np.array_equal(np.isnan(two.targets), np.isnan(np.repeat(data.targets, 2, 1)))
    frame = pd.DataFrame({"a": x[:, 0], "y": pd.array(y, dtype="Int64")}).astype({"y": pd.ArrowDtype(pa.int64())})
    frame.loc[1::2, "y"] = pd.NA
    assert len(from_frame(frame, "y").unlabelled) == 20


def test_masked_features_are_missing():
    x = np.ma.array(np.ones((20, 2)), mask=np.eye(20, 2))
    refused("row 0 (the first is 0): position [0] is nan", from_arrays, x, np.arange(20.))
    with pytest.warns(UserWarning, match="missing values are filled.*: 0 in 1 row"): regressor().fit(x, np.arange(20.))


@pytest.mark.parametrize("write", [str.upper, str.title, " {}\t".format, str])
def test_split_names_in_any_spelling(write):
    names = [write(name) for name in ["train"]*12 + ["val"]*4 + ["test"]*4]
    for data in (from_arrays(np.ones((20, 2)), np.arange(20.), split=names),
                 from_frame(pd.DataFrame({"a": np.arange(20.), "y": np.arange(20.), "part": names}), "y", split="part")):
        assert [len(data.rows(split)) for split in ("labelled", "val", "test")] == [12, 4, 4]


@pytest.mark.parametrize("none", NO_LABEL[:6])
def test_no_split_is_refused(none):
    names = ["train"]*19 + [none]
    refused("row 19 (the first is 0): split ", from_arrays, np.ones((20, 2)), np.arange(20.), split=names)


# shapes and types of arrays

x20, y20 = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20.)


@pytest.mark.parametrize(("contains", "inputs", "targets", "arguments"), [
    ("20 inputs but 1 targets", x20, y20[None], {}), ("targets have shape (20, 1, 1)", x20, y20[:, None, None], {}),
    ("inputs have shape (20,)", y20, y20, {}), ("targets have shape ()", x20, 3., {}), ("not one array", x20, [[1], [2, 3]]*10, {}),
    ("targets have 1 column(s), but true_targets 2", x20, y20, {"true_targets": np.stack([y20, y20], 1)}),
    ("targets have 2 column(s), but true_targets 1", x20, np.stack([y20, y20], 1), {"true_targets": y20}),
    ("20 inputs but 3 sample_names", x20, y20, {"sample_names": list("abc")}),
    ("label '1j' is not a number", x20, np.full(20, 1j), {}), ("label '1j' is not a number", x20, torch.full((20,), 1j), {}),
    ("position [0] is nan", [[None, 1.]]*20, y20, {}), ("type object, not numbers", np.array([["1"]]*20, dtype=object), y20, {}),
    ("position [0, 0] is inf", np.full((20, 4, 4), 1e300), y20, {}),
    ("inputs are not one array", [torch.ones(2, requires_grad=True)]*20, y20, {}),
    ("type datetime64", np.full((20, 2), np.datetime64("2024-01-01", "s")), y20, {}), ("type complex", torch.ones(20, 2)*1j, y20, {})])
def test_what_does_not_fit_is_refused(contains, inputs, targets, arguments): refused(contains, from_arrays, inputs, targets, **arguments)


VARIANTS = {"fortran": np.asfortranarray, "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "strided": lambda a: np.repeat(a, 2, 0)[::2],
            "reversed": lambda a: a[::-1][::-1], "object": lambda a: a.astype(object), "list": lambda a: a.tolist(),
            "longdouble": lambda a: a.astype(np.longdouble),
            "fractions": lambda a: np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(a),
            "frame": lambda a: pd.DataFrame(a.reshape(len(a), -1)),
            "masked": lambda a: np.ma.array(a), "tensor": torch.tensor, "grad": lambda a: torch.tensor(a, requires_grad=True),
            "bfloat16": lambda a: torch.tensor(a, dtype=torch.bfloat16), "float16": lambda a: a.astype(np.float16),
            "half": lambda a: torch.tensor(a).half()}


@few
@example("fortran", "fortran", True)
@given(some.sampled_from(list(VARIANTS)), some.sampled_from(list(VARIANTS)), some.booleans())
def test_any_type_of_array_gives_the_same_data(kind, other, picture):
    x = np.random.default_rng(0).integers(-100, 100, (20, 2, 5, 6) if picture else (20, 3)).astype(float) # which every type can hold
    assume(not (picture and kind == "frame"))
    given_x, given_y = VARIANTS[kind](x), VARIANTS[other](y20)
    if isinstance(given_x, np.ndarray): given_x.flags.writeable = False
    data, plain = from_arrays(given_x, given_y), from_arrays(x, y20)
    assert torch.equal(data.inputs, plain.inputs) and np.array_equal(data.targets, plain.targets) and data.plain == plain.plain


@few
@given(some.integers(0, 3), some.integers(0, 3), some.lists(some.sampled_from([0., 1., np.nan]), max_size=3))
def test_a_few_rows_are_data_or_refused(rows, features, labels):
    try: data = from_arrays(np.ones((rows, features)), labels)
    except HplError: return
    assert len(data.labelled) >= 1 and torch.isfinite(data.plain(data.inputs)).all()


# case 9: pictures

def png(values, colour_type):
    "A PNG of 16 bits: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."
    def chunk(kind, content): return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def pixels(path, **arguments): return np.asarray(decode_image(ImageSource(path), **arguments))


DEEP = {"I;16": lambda v: v.astype(np.uint16), "I": lambda v: v.astype(np.int32), "F": lambda v: v.astype(np.float32)}


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I;16", "tiff"), ("I", "tiff"), ("F", "tiff")])
@few
@given(some.integers(9, 16), some.lists(some.floats(0, 1), min_size=4, max_size=4))
def test_a_range_is_asked_for_and_keeps_pictures_distinct(tmp_path, mode, suffix, bits, shares):
    white = 2**bits - 1
    values = np.rint(np.array([shares])*white)
    Image.fromarray(DEEP[mode](values)).save(tmp_path/f"a.{suffix}")
    refused(f"its values run from {values.min():g} to {values.max():g}", pixels, tmp_path/f"a.{suffix}")
    grey = pixels(tmp_path/f"a.{suffix}", pixel_range=(0, white))[0, :, 0]
    assert np.abs(grey/255 - np.array(shares)).max() < .005
    if values.max() > 256: refused("beyond pixel_range=(0, 255)", pixels, tmp_path/f"a.{suffix}", pixel_range=(0, 255))


def test_forty_pictures_of_twelve_bits_stay_forty(tmp_path):
    for row in range(40): Image.fromarray(np.full((8, 8), 105*row, np.uint16)).save(tmp_path/f"{row}.png")
    table = pd.DataFrame({"file": [f"{row}.png" for row in range(40)], "y": np.arange(40.)})
    data = from_images(tmp_path, table, "file", "y", reading=Reading(8, (0, 4095)))
    assert len({np.asarray(picture).tobytes() for picture in data.inputs[np.arange(40)]}) == 40
    paths, labels = [str(tmp_path/name) for name in table["file"]], table["y"].where(table.index % 2 == 0)
    refused("Pass reading=Reading(pixel_range=(black, white))", regressor(reading=Reading(16)).fit, paths, labels)
    model = regressor(reading=Reading(16, (0, 4095))).fit(paths, labels)
    again = SemiSupervisedRegressor.load(model.save(tmp_path/"model.safetensors"))
    np.testing.assert_array_equal(again.predict(paths), model.predict(paths))
    assert len(set(model.predict(paths))) > 30


@pytest.mark.parametrize("colour_type", [2, 4, 6])
def test_colours_of_sixteen_bits_are_not_cut_silently(tmp_path, colour_type):
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, {2: 3, 4: 2, 6: 4}[colour_type])).astype(np.uint16)
    (tmp_path/"a.png").write_bytes(png(values, colour_type))
    refused("pixel_range=(0, 65535)", pixels, tmp_path/"a.png")
    refused("pixel_range=(0, 65535)", pixels, tmp_path/"a.png", pixel_range=(0, 4095))
    colours = values[..., :3] if colour_type != 4 else values[..., :1].repeat(3, -1)
    assert np.array_equal(pixels(tmp_path/"a.png", pixel_range=(0, 65535)), colours >> 8)


def test_a_file_that_names_its_range_needs_none(tmp_path):
    (tmp_path/"a.pgm").write_bytes(b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes())
    assert pixels(tmp_path/"a.pgm")[0, :, 0].tolist() == [0, 128, 255]
    assert np.array_equal(pixels(tmp_path/"a.pgm", pixel_range=(0, 1)), pixels(tmp_path/"a.pgm"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_eight_bits_stay_distinct(tmp_path, mode):
    greys = (0, 255) if mode == "1" else range(0, 256, 8)
    for grey in greys:
        picture = Image.new("RGB", (4, 4), (grey, grey, 255 - grey))
        picture = picture.quantize(2) if mode == "P" else picture.convert("L" if mode == "LA" else mode).convert(mode)
        picture.save(tmp_path/f"{grey}.{'tiff' if mode == 'CMYK' else 'png'}")
    assert len({pixels(path).tobytes() for path in tmp_path.iterdir()}) == len(greys)


def test_a_shape_in_the_alpha_channel_is_seen(tmp_path):
    for row in range(4):
        icon = np.zeros((4, 4, 4), np.uint8)
        icon[row, :, 3] = 255
        Image.fromarray(icon).save(tmp_path/f"{row}.png")
    assert len({pixels(tmp_path/f"{row}.png").tobytes() for row in range(4)}) == 4


@pytest.mark.parametrize(("mode", "turn"), [("L", 6), ("RGB", 3), ("I;16", 8), ("RGBA", 5)])
def test_the_orientation_mark_is_obeyed_in_every_mode(tmp_path, mode, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)*40
    picture = Image.fromarray(values.astype(np.uint16)*257) if mode == "I;16" else Image.fromarray(values).convert(mode)
    picture.save(tmp_path/"a.png", exif=exif)
    expected = {6: np.rot90(values, -1), 3: np.rot90(values, 2), 8: np.rot90(values), 5: values.T}[turn]
    assert np.array_equal(pixels(tmp_path/"a.png", pixel_range=(0, 65535))[..., 0], expected)


@pytest.mark.parametrize("wrong", [4095, (0,), (5, 5), (9, 1), (0, np.nan), (0, np.inf), "ab"])
def test_a_range_that_is_none(wrong): refused("Give the values that mean black and white", ImageFiles, [], 8, pixel_range=wrong)


# files and tables of other programs

letters = some.text(some.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12)
def plain_name(name): return unicodedata.normalize("NFC", name).casefold().strip().replace("\\", "/")


file_names = some.builds("{}{}{}".format, some.sampled_from(["", ".", " ", "a/", "50% #", "é"]), letters,
    some.sampled_from([".png", ".PNG", ".Png "]))


@few
@given(some.lists(file_names, min_size=4, max_size=6, unique_by=lambda name: plain_name(name)))
def test_any_file_name(tmp_path_factory, names):
    assume(all(name.split("/")[-1].strip(" .") and len(name.encode()) < 200 and ".." not in name for name in names))
    folder = tmp_path_factory.mktemp("names")
    (folder/"a").mkdir()
    for row, name in enumerate(names): Image.new("RGB", (4, 4), (40*row, 0, 0)).save(folder/name, "PNG")
    table = pd.DataFrame({"file": names, "y": np.arange(len(names), dtype=float)})
    table.to_csv(folder/"t.csv", index=False, quoting=csv.QUOTE_ALL)
    assert read_table(folder/"t.csv", ["file"])["file"].tolist() == names
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are in no row of the table")
        for source in (table, folder/"t.csv"):
            data = from_images(folder, source, "file", "y", reading=Reading(4), split={"train": range(len(names))})
            assert [picture.getpixel((0, 0))[0] for picture in data.inputs[np.arange(len(names))]] == [40*row for row in range(len(names))]


@pytest.mark.parametrize(("there", "named"), [("Zoë.png", unicodedata.normalize("NFD", "Zoë.png")),
                                              (unicodedata.normalize("NFD", "é/Zoë.png"), "é/Zoë.png"),
                                              ("a/b.png", r"a\b.png"), ("b.png", " b.png "), ("b.png", "./b.png")])
def test_names_of_other_systems(tmp_path, there, named):
    (tmp_path/there).parent.mkdir(exist_ok=True)
    for name in (there, "other.png"): Image.new("RGB", (4, 4)).save(tmp_path/name)
    table = pd.DataFrame({"file": [named, "other.png"], "y": [1., 2.]})
    assert len(from_images(tmp_path, table, "file", "y", reading=Reading(4), split={"train": [0, 1]}).inputs[np.array([0])]) == 1
    refused("stands in row 0 already", from_images, tmp_path, pd.concat([table, pd.DataFrame({"file": [there], "y": [3.]})]), "file", "y")


cells = some.text(some.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=6)


@few
@given(some.lists(some.tuples(cells, cells), min_size=1, max_size=4), some.sampled_from([",", ";", "\t"]),
    some.sampled_from(["\n", "\r\n", "\r"]),
       some.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), some.booleans(), some.sampled_from([".csv", ".CSV", ".tsv"]))
def test_tables_of_any_program(tmp_path_factory, rows, mark, end, encoding, quoted, suffix):
    assume(quoted or not any(end in cell for row in rows for cell in row for end in "\r\n")) # pandas leaves some of them unquoted
    table, text = pd.DataFrame(rows, columns=["a b", "ü"]), io.StringIO(newline="")
    table.to_csv(text, index=False, sep=mark, lineterminator=end, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
    path = tmp_path_factory.getbasetemp()/f"any{suffix}"
    path.write_bytes(text.getvalue().encode(encoding))
    assert read_table(path, ["a b", "ü"]).values.tolist() == table.values.tolist()


def test_the_line_that_excel_reads(tmp_path):
    (tmp_path/"t.csv").write_bytes(b'sep=;\r\n"name";age\r\n"a;b.jpg";"3"\r\n')
    assert read_table(tmp_path/"t.csv", ["name", "age"]).values.tolist() == [["a;b.jpg", "3"]]
    (tmp_path/"t.csv").write_bytes("name,age\nZoë,3\n".encode("latin-1"))
    refused("save it as UTF-8 .csv", read_table, tmp_path/"t.csv", [])


# case 7: the explorer

def predictions(rows=50, epochs=(1, 2), **columns):
    rng, parts = np.random.default_rng(0), []
    for epoch in epochs:
        y = rng.normal(size=rows)
        parts.append(pd.DataFrame({"run": "r", "method": "HPL", "epoch": epoch, "index": np.arange(rows), "y_true": y,
            "pseudo_label": y + rng.normal(size=rows)}))
    return pd.concat(parts, ignore_index=True).assign(**columns)


def explored(table, **arguments):
    from hpl_nb.explorer import Explorer
    explorer = Explorer(table, **arguments)
    for name in explorer.height.options: explorer.height.value = name
    for epoch in explorer.epoch.options: explorer.epoch.value = epoch
    explorer.choose(explorer.rows()["index"][:3])
    explorer.reset.click()
    words = explorer.words.value
    explorer.close()
    return explorer, words


def test_explorer_draws_exactly_the_columns_that_it_requires():
    explorer, words = explored(predictions())
    assert explorer.height.options == ("pseudo-label",) and len(explorer.scatter.data[0].x) == 50 and "50 samples" in words
    assert "50 samples" in words and np.isfinite(np.asarray(explorer.scatter.data[0].y, float)).all()


fillings = some.sampled_from(["absent", "whole", "partly", "all missing", "pd.NA", "None", "huge"])


@settings(max_examples=12, deadline=None)
@given(some.fixed_dictionaries({"log_variance": fillings, "strong_prediction": fillings}), some.integers(1, 4), some.integers(1, 2),
    some.booleans(), some.booleans())
def test_explorer_draws_what_there_is(columns, rows, epochs, constant, zero):
    table = predictions(rows, range(1, epochs + 1))
    if constant: table["y_true"] = 3.
    if zero: table["pseudo_label"] = table["y_true"]
    for name, filling in columns.items():
        values = pd.Series(np.linspace(-3, 3, len(table)))
        if filling == "absent": continue
        if filling == "huge": values += 1e6
        if filling in ("partly", "pd.NA", "None"): values[0] = np.nan
        table[name] = {"all missing": np.nan, "pd.NA": values.astype("Float64"),
            "None": values.astype(object).where(values.notna(), None)}.get(filling, values)
    explorer, words = explored(table)
    assert explorer.height.options[-1] == "pseudo-label" and f"{rows} samples" in words
    known = {"whole", "partly", "pd.NA", "None"}
    if len(table) == 1: known = {"whole"} # the others miss the first row
    assert ("variance σ²" in explorer.height.options) == (columns["log_variance"] in known)


def test_explorer_counts_the_rows_that_have_a_variance():
    from hpl_nb.explorer import Explorer
    table = predictions(epochs=(1,)).assign(log_variance=np.linspace(-1, 1, 50))
    table.loc[[3, 7, 9], "log_variance"] = np.nan
    explorer = Explorer(table)
    heights = np.asarray(explorer.scatter.data[0].y, float)
    assert explorer.height.value == "variance σ²" and np.flatnonzero(np.isnan(heights)).tolist() == [3, 7, 9]
    assert "47 samples have a variance σ²" in explorer.words.value
    explorer.close()


@pytest.mark.parametrize(("contains", "change"), [
    ("has no rows", lambda t: t[:0]), ("no row has a pseudo_label", lambda t: t.assign(pseudo_label=np.nan)),
    ("has no column pseudo_label", lambda t: t.drop(columns="pseudo_label")),
    ("no output 0. Give one of [1]", lambda t: t.assign(output=1)),
    ("rows without epoch", lambda t: t.assign(epoch=np.nan)), ("rows without run", lambda t: t.assign(run=None)),
    ("rows without index", lambda t: t.assign(index=np.nan))])
def test_explorer_refuses_with_a_reason(contains, change):
    from hpl_nb.explorer import Explorer
    refused(contains, Explorer, change(predictions()))


@pytest.mark.parametrize("change", [lambda t: t.assign(y_true=np.nan), lambda t: t.assign(y_true=None), lambda t: t.drop(columns="y_true")])
def test_explorer_needs_no_true_label(change):
    rng = np.random.default_rng(1)
    table = change(predictions(log_variance=rng.normal(size=100), strong_prediction=rng.normal(size=100), weight=rng.uniform(size=100)))
    from hpl_nb.explorer import Explorer
    explorer = Explorer(table)
    assert explorer.height.options == ("variance σ²", "disagreement |r − pseudo-label|", "weight ω") and explorer.boxes is None
    last, points = table[table["epoch"] == 2], explorer.scatter.data[0]
    heights = {"variance σ²": np.exp(last["log_variance"]), "weight ω": last["weight"],
               "disagreement |r − pseudo-label|": (last["strong_prediction"] - last["pseudo_label"]).abs()}
    for name, height in heights.items():
        explorer.height.value = name
        np.testing.assert_allclose(points.x, last["pseudo_label"])
        np.testing.assert_allclose(points.y, height)
        explorer.choose(np.arange(50))
        first = explorer.cards.value.split('<figure class="hpl-card">')[1]
        assert "the 24 highest of them" in explorer.cards.value and first.startswith(f"sample {height.idxmax() - 50}<")
    assert "true labels are unknown" in explorer.words.value and "nan" not in explorer.words.value + explorer.cards.value
    explorer.labels.value = (0., explorer.labels.max)
    assert len(points.x) == (last["pseudo_label"] >= 0).sum()
    explorer.close()


def test_explorer_of_little_but_pseudo_labels():
    explorer, words = explored(predictions().drop(columns="y_true"))
    assert explorer.height.options == ("pseudo-label",) and "50 samples" in words


def test_explorer_opens_on_a_method_with_a_variance():
    from hpl_nb.explorer import Explorer
    without = predictions(strong_prediction=1.).assign(run="p", method="PseudoLabel")
    other = predictions().assign(run="s", method="Supervised")
    explorer = Explorer(pd.concat([without, predictions(log_variance=.5), other], ignore_index=True))
    assert (explorer.method.value, explorer.run.value, explorer.height.value) == ("HPL", "r", "variance σ²")
    assert explorer.method.options == ("PseudoLabel", "HPL", "Supervised") and "Epoch 2" in explorer.words.value
    explorer.close()


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    "Estimators on a table, on pictures and on files whose unlabelled rows have no true label: (X, estimator) by kind."
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    y, pixels = np.where(np.arange(60) < 30, rng.normal(size=60), np.nan), rng.integers(0, 256, (60, 8, 8)).astype(np.uint8)
    for row in range(60): Image.fromarray(pixels[row]).save(folder/f"{row}.png")
    table = pd.DataFrame({"age": rng.normal(size=60), "city": ["<i>Ulm", "Bari"]*30})
    X = {"numbers": rng.normal(size=(60, 3)), "frame": table, "pixels": pixels.astype(float),
         "files": [folder/f"{row}.png" for row in range(60)]}
    train = Train(epochs=2, iterations_per_epoch=2)
    return {kind: (x, SemiSupervisedRegressor(train=train, random_state=0).fit(x, y)) for kind, x in X.items()}


@pytest.mark.parametrize(("kind", "shown"), [("numbers", "…</div>"), ("frame", "city &lt;i&gt;Ulm"), ("pixels", "<img"), ("files", "<img")])
def test_explorer_of_an_estimators_run_shows_rows_of_its_X(blind, kind, shown):
    from hpl_nb.explorer import Explorer
    x, model = blind[kind]
    explorer = Explorer(model.run_, x)
    assert explorer.height.value == "variance σ²" and len(explorer.rows()) == 30
    explorer.choose(explorer.rows()["index"])
    assert shown in explorer.cards.value and explorer.cards.value.count("<figure") == 24
    explorer.close()
    if kind != "files": return
    folder = Explorer(model.run_, x[0].parent) # in the order of names, in which an estimator reads it
    folder.choose([59])
    assert f"<div>{sorted(file.name for file in x)[59]}</div>" in folder.cards.value
    folder.close()


def test_explorer_tells_runs_of_one_name_apart_and_refuses_other_things(blind):
    from hpl_nb.explorer import Explorer
    (x, model), (_, other) = blind["numbers"], blind["numbers"]
    explorer = Explorer([model.run_, other.run_])
    assert len(explorer.run.options) == 2 and len(explorer.rows()) == 30
    explorer.close()
    refused("predictions is a SemiSupervisedRegressor: give a predictions table, or runs such as the run_", Explorer, model)
    refused("predictions is a list", Explorer, [])
    refused("data is a int", Explorer, model.run_, 3)
    refused("X is 'years', which is no folder and no file", Explorer, model.run_, "years")
    refused("data has 10 rows, and the predictions have one of row 59", Explorer, model.run_, x[:10])


def test_datasets_without_true_labels_can_be_explored(blind, tmp_path):
    from hpl_nb.core import seed_everything
    from hpl_nb.methods.hpl import HPL
    from hpl_nb.models import mlp, small_cnn
    from hpl_nb.training.loop import fit
    y, files = [*np.linspace(0, 1, 30), *[np.nan]*30], blind["files"][0]
    table = pd.DataFrame({"file": [file.name for file in files], "y": y})
    sets = [(from_arrays(blind["numbers"][0], y, unit="years"), partial(mlp, 3)),
            (from_images(files[0].parent, table, "file", "y", reading=Reading(size=8)), partial(small_cnn, channels=3, width=4))]
    for number, (data, network) in enumerate(sets):
        seed_everything(0)
        method, settings = HPL.paper().build(network()), Train(epochs=2, iterations_per_epoch=2, record_every=1)
        run = fit(method, data, settings, folder=tmp_path/str(number), progress=False)
        explorer, words = explored(run, data=data)
        assert explorer.epoch.options == (1, 2) and "true labels are unknown" in words and explorer.unit == data.unit


@few
@given(some.integers(1, 3), some.booleans(), some.sampled_from([1., 1e-9, 1e9]))
def test_boxplots_of_few_rows(rows, constant, scale):
    from hpl_nb.figures import pseudo_label_boxplots
    table = predictions(rows, (1,))
    table[["y_true", "pseudo_label"]] *= scale
    if constant: table["y_true"] = scale
    assert sum(pseudo_label_boxplots(table).data[0].y) == rows


def test_a_folder_whose_name_is_no_text(tmp_path):
    "Bytes that are not UTF-8, as a Linux disk may have them: runs, stored runs, pictures. safetensors opens none, so `save` refuses."
    folder, rng = tmp_path/os.fsdecode(b"r\xff"), np.random.default_rng(0)
    experiment = Experiment(RotatedDigits(), Supervised(), train=Train(epochs=2, iterations_per_epoch=2, record_every=1))
    for stop in (3, None): run = train_experiment(experiment, folder/"run", progress=False, stop_after=stop)
    assert load_run(folder/"run").predictions.equals(run.predictions)
    [stored] = merge_runs(folder/"run", folder/"store")
    assert len(load_run(stored.with_suffix("")).predictions)
    assert report(finished_runs([folder/"store"]), folder/"report.html", "Runs").exists()
    for row in range(24): Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder/f"{row}.png")
    table = pd.DataFrame({"file": [f"{row}.png" for row in range(24)], "y": rng.normal(size=24)})
    (folder/"t.parquet").write_bytes(table.to_parquet())
    data = from_images(folder, folder/"t.parquet", "file", "y", reading=Reading(size=8))
    method = Supervised().build(small_cnn(3, 4))
    fit(method, on_disk(data, folder/"cache"), Train(epochs=1, iterations_per_epoch=1), folder=folder/"pictures", progress=False)
    refused("is not valid UTF-8. Save under another name", Predictor.from_method(method, data).save, folder/"m.safetensors")
