"Metrics against their formulas in NumPy and against scipy, and the tables that they must refuse."
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hpl_nb.core import PREDICTION_COLUMNS, HplError
from hpl_nb.metrics import (
    evaluate,
    format_mean_sd,
    format_table,
    gaussian_negative_log_likelihood,
    group_errors,
    group_labels,
    last_epochs,
    mean_absolute_error,
    mean_squared_error,
    paired_test,
    r2_score,
    reliability,
    reliability_summary,
    spearman,
    summarise,
    variance_summary,
)


def predictions(n=400, seed=0, method="a", epoch=3):
    "One run: `n` unlabelled rows with known noise, then `n` test rows without pseudo-labels."
    rng = np.random.default_rng(seed)
    y, sigma = rng.integers(20, 40, n).astype(float), np.exp(rng.normal(size=n))
    unlabelled = dict(split="unlabelled", y_true=y, y_pred=y + 1, pseudo_label=y + sigma * rng.normal(size=n),
                      strong_prediction=y + sigma * rng.normal(size=n), log_variance=2 * np.log(sigma))
    test = dict(split="test", y_true=y, y_pred=y + rng.normal(size=n), pseudo_label=np.nan, strong_prediction=np.nan,
                log_variance=np.nan)
    table = pd.concat([pd.DataFrame(part).assign(index=range(n)) for part in (unlabelled, test)], ignore_index=True)
    table = table.assign(run=f"{method}{seed}", method=method, dataset="made-up", label_ratio=.1, seed=seed, epoch=epoch,
                         output=0)
    return table.reindex(columns=PREDICTION_COLUMNS)


@pytest.mark.parametrize("shape", [(1,), (2,), (50,), (50, 1), (50, 3)])
def test_errors_agree_with_the_formulas(shape):
    rng = np.random.default_rng(0)
    y, f = rng.normal(size=shape) * 10 + 30, rng.normal(size=shape) * 10 + 30
    assert mean_absolute_error(y, f) == pytest.approx(np.abs(f - y).mean(), rel=1e-12)
    assert mean_squared_error(y, f) == pytest.approx(((f - y)**2).mean(), rel=1e-12)
    if len(y) == 1: assert np.isnan(r2_score(y, f))
    else: assert r2_score(y, f) == pytest.approx(np.mean(1 - ((f - y)**2).sum(0)/((y - y.mean(0))**2).sum(0)), rel=1e-12)


@pytest.mark.parametrize("y", [[.1] * 3, [7, 7], [0, 1e-200], [[1, 5], [2, 5]]], ids=str)
def test_r2_of_constant_labels_is_nan(y):
    "Also where rounding gives them a spread, where the spread underflows, and where one output of two is constant."
    assert np.isnan(r2_score(y, y))


def test_float32_inputs_are_measured_in_float64():
    y = np.full(100_000, 60, np.float32)
    assert mean_squared_error(y, y + np.float32(.1)) == pytest.approx(np.float64(np.float32(60.1) - 60)**2, rel=1e-9)


@pytest.mark.parametrize("y, f, message", [
    ([1, 2], [[1], [2]], "same shape"), ([1, 2], [1, 2, 3], "same shape"), ([], [], "empty"),
    ([1, np.nan], [1, 2], "y_true is nan in row 1"), ([1, 2], [np.inf, 2], "y_pred is inf in row 0"),
    (np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), "same shape")])
@pytest.mark.parametrize("metric", [mean_absolute_error, mean_squared_error, r2_score])
def test_wrong_arrays_are_refused(metric, y, f, message):
    with pytest.raises(HplError, match=message): metric(y, f)


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_pearson_of_the_ranks(ties):
    a, b = np.random.default_rng(0).normal(size=(2, 200))
    if ties: a, b = a.round(), b.round()
    assert spearman(a, b) == pytest.approx(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1], abs=1e-12)


def test_spearman_of_a_constant_or_of_too_few_is_nan():
    for a, b in (([1, 1, 1], [1, 2, 3]), ([1, 2], [3, 3]), ([1], [2]), ([], [])): assert np.isnan(spearman(a, b))
    with pytest.raises(HplError, match="same shape"): spearman([1], [1, 2])
    with pytest.raises(HplError, match="b is nan"): spearman([1, 2], [1, np.nan])


def test_evaluate_gives_one_row_for_each_run_split_epoch_and_output():
    table = pd.concat([predictions(seed=0), predictions(seed=1), predictions(seed=1, epoch=4),
                       predictions(seed=2).assign(output=1)])
    before = table.copy()
    errors = evaluate(table)
    pd.testing.assert_frame_equal(table, before)
    assert len(errors) == 8 and errors.n.eq(400).all()
    assert errors[errors.split == "unlabelled"].mae.tolist() == pytest.approx([1] * 4)
    part = table[(table.run == "a1") & (table.epoch == 4) & (table.split == "test")]
    row = errors[(errors.run == "a1") & (errors.epoch == 4) & (errors.split == "test")].iloc[0]
    assert row.r2 == pytest.approx(1 - ((part.y_pred - part.y_true)**2).mean()/part.y_true.var(ddof=0))
    assert evaluate(last_epochs(table)).epoch.tolist() == [3, 3, 4, 4, 3, 3]


def test_evaluate_pseudo_labels_uses_unlabelled_rows_only():
    assert evaluate(predictions(), "pseudo_label").split.tolist() == ["unlabelled"]


def test_unknown_labels_are_left_out_and_lost_predictions_refused():
    table = predictions()
    assert evaluate(table.assign(y_true=table.y_true.where(table["index"] < 10))).n.tolist() == [10, 10]
    with pytest.raises(HplError, match="no row has both"): evaluate(table.assign(y_true=np.nan))
    with pytest.raises(HplError, match="run a0, epoch 3, index 5"):
        evaluate(table.assign(y_pred=table.y_pred.where(table["index"] != 5)))
    with pytest.raises(HplError, match="diverged"): evaluate(table.assign(pseudo_label=np.inf), "pseudo_label")
    with pytest.raises(HplError, match="no column y_pred"): evaluate(table.drop(columns="y_pred"))
    with pytest.raises(HplError, match="no rows"): evaluate(table[:0])


@pytest.mark.parametrize("how", [dict(width=1), dict(width=5), dict(width=.1), dict(edges=[20, 25, 39])])
def test_group_errors_average_to_the_whole(how):
    table = pd.concat([predictions(seed=0), predictions(seed=1)])
    groups, whole = group_errors(table, "pseudo_label", **how), evaluate(table, "pseudo_label").set_index("run")
    for run, rows in groups.groupby("run"):
        assert rows["count"].sum() == 400
        assert np.average(rows.mse, weights=rows["count"]) == pytest.approx(whole.mse[run])
        assert np.average(rows.mae, weights=rows["count"]) == pytest.approx(whole.mae[run])
        assert rows.group.is_monotonic_increasing and (rows.low < rows.group).all() and (rows.group < rows.high).all()


def test_group_errors_agree_with_pandas():
    table = predictions()
    rows = table[(table.split == "unlabelled") & (table.y_true == 30)]
    group = group_errors(table, "pseudo_label").query("group == 30").iloc[0]
    assert group["count"] == len(rows) and group.sd == pytest.approx(rows.pseudo_label.std())
    assert group.bias == pytest.approx((rows.pseudo_label - 30).mean())


def test_groups():
    assert group_labels([.05, .149, .15, .25], width=.1)[0].tolist() == [.1, .1, .2, .3]
    assert group_labels([-1.5, -.4, .5], width=1)[0].tolist() == [-1, 0, 1]
    for how in (dict(width=0), dict(edges=[3]), dict(edges=[3, 2]), dict(edges=[0, 1])):
        with pytest.raises(HplError): group_labels([2.], **how)


def test_variance_summary():
    table = predictions()
    rows = table[table.split == "unlabelled"]
    row = variance_summary(table).iloc[0]
    error = (rows.y_true - rows.pseudo_label).abs()
    assert row.spearman_error == pytest.approx(stats.spearmanr(rows.log_variance, error).statistic)
    assert row.weight_mean == pytest.approx(np.exp(-rows.log_variance).mean()) and row.n == 400
    scaled = variance_summary(table, scale=3).iloc[0]
    assert scaled.log_variance_mean == pytest.approx(row.log_variance_mean - 2 * np.log(3))
    assert scaled.weight_mean == pytest.approx(9 * row.weight_mean)
    constant = variance_summary(table.assign(log_variance=0., y_true=np.nan, strong_prediction=np.nan)).iloc[0]
    assert np.isnan(constant.spearman_error) and np.isnan(constant.spearman_residual) and constant.log_variance_sd == 0
    with pytest.raises(HplError, match="learns no variance"): variance_summary(table.assign(log_variance=np.nan))


def test_reliability_bins_hold_all_rows_and_keep_their_means():
    table = predictions()
    rows, bins = table[table.split == "unlabelled"], reliability(table, bins=8)
    assert bins["count"].tolist() == [50] * 8 and bins.variance_mean.is_monotonic_increasing
    assert np.average(bins.variance_mean, weights=bins["count"]) == pytest.approx(np.exp(rows.log_variance).mean())
    assert np.average(bins.squared_error_mean, weights=bins["count"]) == pytest.approx(
        ((rows.pseudo_label - rows.y_true)**2).mean())
    assert reliability(table.assign(log_variance=1.), bins=8)["count"].tolist() == [400]
    with pytest.raises(HplError, match="bins is 0"): reliability(table, bins=0)
    with pytest.raises(HplError, match="learns no variance"): reliability(table[table.split == "test"])


def test_reliability_summary_tells_a_true_a_scaled_and_a_constant_variance_apart():
    table = predictions(20_000)
    runs = [table.assign(run="true"), table.assign(run="scaled", log_variance=table.log_variance - np.log(4)),
            table.assign(run="constant", log_variance=np.log(evaluate(table, "pseudo_label").mse[0]))]
    summary = reliability_summary(pd.concat(runs)).set_index("run")
    assert summary.ratio["true"] == pytest.approx(1, abs=.1) and summary.slope["true"] == pytest.approx(1, abs=.05)
    assert summary.ratio["scaled"] == pytest.approx(4 * summary.ratio["true"])
    assert summary.slope["scaled"] == pytest.approx(summary.slope["true"])
    assert summary.nll_gain["true"] > .5 and summary.nll["scaled"] > summary.nll["true"]
    assert summary.nll_gain["constant"] == pytest.approx(0) and np.isnan(summary.slope["constant"])


def test_negative_log_likelihood_agrees_with_scipy():
    error, z = np.random.default_rng(0).normal(size=(2, 100))
    expected = -stats.norm.logpdf(error, scale=np.exp(z / 2)).mean()
    assert gaussian_negative_log_likelihood(error, z) == pytest.approx(expected)


def test_summarise_counts_seeds_and_refuses_to_count_twice():
    runs = evaluate(pd.concat([predictions(seed=seed, method=method) for method in "ab" for seed in range(3)]))
    table = summarise(runs)
    assert len(table) == 4 and table.n.eq(3).all()
    part = runs[(runs.method == "b") & (runs.split == "test")]
    row = table[(table.method == "b") & (table.split == "test")].iloc[0]
    assert row.mae_mean == pytest.approx(part.mae.mean()) and row.mae_sd == pytest.approx(stats.tstd(part.mae))
    with pytest.raises(HplError, match="seed 0 is there more than once"): summarise(runs, by=["method"])
    with pytest.raises(HplError, match="no column rmse"): summarise(runs, columns=["rmse"])
    lost = summarise(runs.assign(mae=runs.mae.where(runs.seed > 0)))
    assert lost.mae_mean.isna().all() and format_table(lost).mae.eq("n/a").all()


def test_paired_test_refuses_to_pair_twice():
    runs = evaluate(pd.concat([predictions(seed=seed, method=method) for method in "ab" for seed in range(3)]))
    with pytest.raises(HplError, match="seed 0 of a is there more than once in .*keep one epoch, split and output"): paired_test(runs, "a")
    assert paired_test(runs[runs["split"] == "test"], "a")["n"].eq(3).all()


def test_a_single_seed_shows_no_spread():
    one = summarise(evaluate(predictions()))
    assert one.n.eq(1).all() and one.mae_sd.isna().all() and "±" not in "".join(format_table(one).mae)
    assert format_mean_sd(1.23456, .5, 6, digits=2) == "1.23 ± 0.50 (n = 6)"


def test_import_is_light():
    code = "import sys, hpl_nb.metrics; print([m for m in ('scipy', 'sklearn', 'plotly', 'torchvision') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
