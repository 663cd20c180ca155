"What must hold for any input: loss, hypergradient, metrics, splits and streams, normaliser, the check of a data set."
import csv
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays
from scipy.stats import rankdata
from torch import nn

from hpl_nb import data, loss, metrics
from hpl_nb.core import HplError, LabelNormalizer
from hpl_nb.data.core import SETS, SemiSupervisedData, announce, label_warnings, outer_rows, repeated_samples, split_rows, stream_rows
from hpl_nb.data.own import Split, make_sets
from hpl_nb.hypergrad import Labelled, PseudoLabelled, hypergradient, hypergradient_autograd, optimizer_step, sgd_step

settings.register_profile("here", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("here")

seeds = some.integers(0, 2**31 - 1)
floats = some.floats(-1e6, 1e6)
shapes = some.tuples(some.integers(1, 12), some.integers(1, 3))


def double(random, *shape): return torch.from_numpy(random.normal(size=shape))


def labels_and_predictions(minimum=1):
    "Two arrays of one shape."
    shape = some.tuples(some.integers(minimum, 30), some.integers(1, 3))
    return shape.flatmap(lambda s: some.tuples(*[arrays.arrays(np.float64, s, elements=some.floats(-1e4, 1e4))]*2))


# ---- the loss

@given(seeds, shapes, some.booleans(), some.sampled_from(["mean", "sum"]))
def test_loss_is_the_gaussian_likelihood(seed, shape, shared, reduction):
    "Eq. 2 is twice torch's own, less a constant; eq. 3 is it with its weight written out; gradients as the documentation says."
    random = np.random.default_rng(seed)
    r, pseudo_label = double(random, *shape).requires_grad_(), double(random, *shape)
    z = (2*double(random, shape[0], 1 if shared else shape[1])).requires_grad_()
    nll = loss.pseudo_label_nll(r, pseudo_label, z)
    variance = z.exp().expand(shape)
    torch.testing.assert_close(nll, 2*nn.functional.gaussian_nll_loss(r, pseudo_label, variance, eps=1e-30, reduction="none"))
    weight = loss.pseudo_label_weight(z)
    total = loss.unlabelled_loss(r, pseudo_label, weight, z, reduction)
    torch.testing.assert_close(total, getattr(torch, reduction)(nll))
    gradient, = torch.autograd.grad(loss.unlabelled_loss(r, pseudo_label, weight.detach(), None, "sum"), r)
    torch.testing.assert_close(gradient, 2*weight.detach()*(r - pseudo_label).detach())
    assert torch.equal(loss.pseudo_label_weight(z, half=True), weight/2)


@given(seeds, shapes)
def test_the_best_variance_is_the_squared_error(seed, shape):
    "Eq. 2 is smallest where the variance is the squared error, and grows on both sides."
    random = np.random.default_rng(seed)
    r, pseudo_label = double(random, *shape), double(random, *shape)
    assume((r - pseudo_label).abs().min() > 1e-6)
    z = (r - pseudo_label).square().log()
    at = loss.pseudo_label_nll(r, pseudo_label, z)
    for step in (-1., -.01, .01, 1.): assert (loss.pseudo_label_nll(r, pseudo_label, z + step) > at).all()


# ---- the hypergradient

@settings(max_examples=80)
@given(seeds, some.integers(1, 9), some.integers(1, 3), some.integers(1, 7), some.integers(1, 7), some.integers(1, 7),
       some.sampled_from(["mean", "sum"]), some.sampled_from(["(m,)", "(m, 1)", "(m, K)"]), some.floats(0, 3),
       some.sampled_from(["eq7", "sgd", "adam", "adamw", "amsgrad"]))
def test_hypergradient_is_autograds(seed, d, k, n, m, outer, reduction, shape, unlabelled_weight, kind):
    "The closed form against differentiating through the step, on any shapes, after some steps of the optimiser."
    random = np.random.default_rng(seed)
    head = nn.Linear(d, k).double()
    kinds = {"sgd": partial(torch.optim.SGD, momentum=.9, weight_decay=.1), "adam": partial(torch.optim.Adam, weight_decay=.1),
             "adamw": torch.optim.AdamW, "amsgrad": partial(torch.optim.Adam, amsgrad=True)}
    for p in head.parameters(): p.data = double(random, *p.shape)
    step = partial(sgd_step, learning_rate=.1)
    if kind != "eq7":
        optimizer = kinds[kind](head.parameters(), lr=.1)
        for _ in range(random.integers(1, 4)):
            for p in head.parameters(): p.grad = double(random, *p.shape)
            optimizer.step()
        step = lambda eta, gradient: optimizer_step(optimizer, head, gradient)
    weights = double(random, *{"(m,)": (m,), "(m, 1)": (m, 1), "(m, K)": (m, k)}[shape]).exp()
    given_ = (Labelled(double(random, n, d), double(random, n, k)), PseudoLabelled(double(random, m, d), double(random, m, k), weights),
              Labelled(double(random, outer, d), double(random, outer, k)), unlabelled_weight, reduction)
    ours, reference = hypergradient(head, step, *given_), hypergradient_autograd(head, step, *given_)
    for name in ("weights", "slope", "outer_prediction", "outer_loss", "head"):
        torch.testing.assert_close(getattr(ours, name), getattr(reference, name), rtol=1e-6, atol=1e-9,
                                   msg=lambda text, name=name: f"{name}: {text}")


# ---- metrics

@given(labels_and_predictions())
def test_metrics_are_their_formulas(pair):
    y, f = pair
    assert metrics.mean_absolute_error(y, f) == pytest.approx(np.abs(f - y).mean(), rel=1e-9, abs=1e-12)
    assert metrics.mean_squared_error(y, f) == pytest.approx(((f - y)**2).mean(), rel=1e-9, abs=1e-12)
    assume(len(y) > 1 and (y.std(axis=0) > 1e-6).all())
    assert metrics.r2_score(y, f) == pytest.approx((1 - ((f - y)**2).mean(0)/y.var(0)).mean(), rel=1e-9, abs=1e-9)


@given(some.lists(some.tuples(some.integers(-5, 5), some.integers(-5, 5)), min_size=2, max_size=40))
def test_spearman_is_pearson_of_the_ranks(pairs):
    "With many ties."
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0: assert np.isnan(metrics.spearman(a, b))
    else: assert metrics.spearman(a, b) == pytest.approx(np.corrcoef(rankdata(a), rankdata(b))[0, 1], abs=1e-12)


@given(arrays.arrays(np.float64, some.integers(1, 50), elements=some.floats(-1e4, 1e4)), some.sampled_from([.5, 1., 2., 10.]))
def test_every_label_is_in_its_group(labels, width):
    centre, low, high = metrics.group_labels(labels, width)
    assert ((low <= labels + 1e-6) & (labels <= high + 1e-6)).all()
    assert np.allclose(high - low, width) and np.allclose((low + high)/2, centre)


# ---- splits and streams

@given(some.integers(1, 400), some.lists(some.floats(0, 1), min_size=1, max_size=5), seeds)
def test_split_rows_are_disjoint(rows, shares, seed):
    shares = [share/max(1, sum(shares)) for share in shares]
    parts = split_rows(rows, shares, seed)
    joined = np.concatenate(parts)
    assert len(parts) == len(shares) and len(np.unique(joined)) == len(joined)
    assert all((0 <= part).all() and (part < rows).all() for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts) and all(abs(len(part) - share*rows) <= 1 for part, share in zip(parts, shares))
    assert all(np.array_equal(a, b) for a, b in zip(parts, split_rows(rows, shares, seed)))
    if abs(sum(shares) - 1) < 1e-12: assert len(joined) == rows


@given(arrays.arrays(np.bool_, some.integers(5, 200)), some.floats(0, .45), some.floats(0, .45), some.none() | some.floats(.01, 1), seeds)
def test_make_sets_shares_every_row_out(known, val_share, test_share, label_ratio, seed):
    "Each row once; only rows with a label are held out or labelled; the same again; more labels never lose one."
    labels = np.where(known, 1., np.nan)[:, None]
    make = lambda ratio: make_sets(labels, Split(None, val_share, test_share, ratio, seed), "any")
    if known.sum() == int(np.round((val_share + test_share)*known.sum())): # also where the few that are known are all held out
        with pytest.raises(HplError, match="no training row has a label"): make(label_ratio)
        return
    sets = make(label_ratio)
    joined = np.concatenate(list(sets.values()))
    assert sorted(joined) == list(range(len(known))) and known[np.concatenate([sets[s] for s in ("labelled", "val", "test")])].all()
    assert all(np.array_equal(sets[s], again) for s, again in make(label_ratio).items())
    assert set(sets["labelled"]) <= set(make(None)["labelled"]) and np.array_equal(sets["test"], make(None)["test"])


@given(some.integers(1, 60), some.integers(1, 60), some.integers(1, 3), seeds)
def test_a_stream_shows_each_row_once_a_pass(rows, batch_size, copies, seed):
    "No row more often than its copies; all of them but for the short batch at the end, in the next pass too; it is the same again."
    assume(batch_size <= rows*copies)
    numbers, per_pass = np.arange(rows)*7 + 3, rows*copies//batch_size
    for first in (0, per_pass):
        seen = np.concatenate([stream_rows(numbers, batch_size, first + step, seed, "any", copies) for step in range(per_pass)])
        counts = np.bincount(np.searchsorted(numbers, seen), minlength=rows)
        assert np.isin(seen, numbers).all() and counts.max() <= copies and counts.sum() == per_pass*batch_size
        assert (rows*copies) - counts.sum() < batch_size
    again = [stream_rows(numbers, batch_size, 1, seed, "any", copies) for _ in range(2)]
    assert np.array_equal(*again)


@given(some.integers(2, 60), some.data(), seeds)
def test_the_outer_batch_shares_no_row_with_the_inner(rows, draw, seed):
    numbers, inner_size = np.arange(rows)*3, draw.draw(some.integers(1, rows - 1))
    inner = stream_rows(numbers, inner_size, 0, seed, "labelled")
    outer = outer_rows(numbers, inner, draw.draw(some.integers(1, rows - inner_size)), 0, seed)
    assert not set(inner) & set(outer) and len(set(outer)) == len(outer) and set(outer) <= set(numbers)


# ---- the normaliser

@given(arrays.arrays(np.float64, some.tuples(some.integers(1, 40), some.integers(1, 3)), elements=floats),
       some.floats(1e-3, 1e3), some.floats(-1e3, 1e3))
@example(np.full((5, 1), .1), 1., 0.)
def test_normaliser(labels, scale, shift):
    "There and back; zero mean and unit spread; another unit of the labels changes nothing of what the network sees."
    normalizer = LabelNormalizer.fit(labels)
    normal = normalizer.normalize(labels)
    assert np.isfinite(normal).all() and all(s > 0 for s in normalizer.scale)
    size = np.abs(labels).max() + 1
    np.testing.assert_allclose(normalizer.denormalize(normal), labels, rtol=1e-9, atol=1e-9*size)
    spread = labels.std(axis=0)
    if (spread > 1e-6*size).all():
        np.testing.assert_allclose(normal.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(normal.std(axis=0), 1, rtol=1e-6)
        np.testing.assert_allclose(LabelNormalizer.fit(labels*scale + shift).normalize(labels*scale + shift), normal, atol=1e-4)
    torch.testing.assert_close(normalizer.normalize(torch.from_numpy(labels)).numpy(), normal)


# ---- the check of a data set

def data_set(seed, rows=60, copies=()):
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(rows, 3)), random.uniform(20, 60, rows)
    for row, twin in copies: x[twin] = x[row]
    sets = dict(zip(SETS, np.split(random.permutation(rows), (20, 36, 48))))
    return SemiSupervisedData("any", torch.from_numpy(x), y, **sets)


@given(seeds, some.lists(some.tuples(some.integers(0, 59), some.integers(0, 59)), max_size=4))
def test_repeated_samples_are_found_and_no_others(seed, copies):
    "Against comparing all rows with all rows."
    loaded = data_set(seed, copies=copies)
    x, where = loaded.inputs.numpy(), {row: split for split in SETS for row in loaded.rows(split).tolist()}
    expected = {}
    for i, one in enumerate(SETS):
        for other in SETS[i + 1:]:
            hits = [row for row in loaded.rows(one) if any((x[row] == x[twin]).all() for twin in loaded.rows(other))]
            if hits: expected[one, other] = hits
    found = repeated_samples(loaded)
    assert {sets: [row for row, _ in pairs] for sets, pairs in found.items()} == expected
    assert all((x[row] == x[twin]).all() and where[twin] == other for (_, other), pairs in found.items() for row, twin in pairs)
    report = data.check(loaded, progress=False)
    assert report.ok and ("same sample in several splits" in set(report.problems["kind"])) == bool(expected)


@given(seeds, some.floats(1e-6, 1e6), some.floats(-1e3, 1e3), some.integers(0, 19))
def test_warnings_do_not_depend_on_the_unit(seed, scale, shift, row):
    "One label 1,000 spreads away is named, in any unit; without it there is no warning."
    loaded = data_set(seed)
    sets = {split: loaded.rows(split) for split in ("labelled", "val", "test")}
    labels = scale*(loaded.targets + shift)
    assert label_warnings(labels, sets) == []
    wrong = loaded.labelled[row]
    labels[wrong] += 40_000*scale
    assert [(problem.kind, problem.row) for problem in label_warnings(labels, sets)] == [("label far from the others", wrong)]


@given(seeds, some.sampled_from([1000, 365.25, 100, 12, 1/12, 1/100, 1/1000]), some.sampled_from(["val", "test"]))
def test_another_unit_of_a_held_out_set_is_found(seed, factor, split):
    loaded = data_set(seed)
    loaded.targets[loaded.rows(split)] *= factor
    with pytest.warns(UserWarning, match=f"{split} labels lie on another scale"): announce(loaded)


odd_words = ["", "nan", "inf", "-inf", "1,5", "old", "1e999", " 7 ", "None", "NA", "0x10", "--"]
words = some.one_of(floats.map(str), some.sampled_from(odd_words), some.text(max_size=4))


@given(some.lists(words, min_size=1, max_size=20))
def test_a_label_is_a_number_or_named(labels):
    "Each text is a finite number, an unlabelled row, or a problem with its row."
    from hpl_nb.data.tables import label_problems
    values, problems = label_problems(labels, unknown_ok=True)
    named = {problem.row for problem in problems}
    for row, (label, value) in enumerate(zip(labels, values)):
        if row in named: continue
        if np.isnan(value): assert label.strip().lower() in ("", "nan", "na", "none")
        else: assert np.isfinite(value) and value == float(label)
    assert all(repr(str(labels[problem.row])) in problem.detail for problem in problems)


@given(some.lists(some.lists(words, min_size=2, max_size=2), min_size=1, max_size=8))
def test_a_table_reads_as_it_was_written(tmp_path_factory, rows):
    "What pandas writes as .csv and .tsv, the reader gives back, text for text."
    from hpl_nb.data.tables import read_table
    assume(not any("\0" in cell or "\r" in cell for row in rows for cell in row))
    table = pd.DataFrame(rows, columns=["a", "b"], dtype=str)
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path_factory.getbasetemp()/f"table{suffix}"
        table.to_csv(path, sep=separator, index=False, errors="surrogatepass", lineterminator="\n")
        assert read_table(path, ["a", "b"]).values.tolist() == table.values.tolist()

parts = ["a", ",", ",", "\n", "\r", "\r\n", " ", '"', '""', "\ufeff", "é", "nan", "1", "\0", "\x85", "\u2028", "#"]
texts = some.lists(some.sampled_from(parts), min_size=1, max_size=20).map("".join)


@given(texts)
@settings(max_examples=300)
def test_arrow_reads_what_python_reads(text):
    "Whatever Arrow accepts, it reads as Python's reader, blank lines, quotes and all; the rest goes to that reader."
    from hpl_nb.data import tables
    try: expected = tables._rows(text, ",")
    except (ValueError, csv.Error) as error:
        with pytest.raises(type(error), match=re.escape(str(error))): tables._cells(text, ",")
    else:
        found = tables._cells(text, ",")
        assert found.values.tolist() == expected.values.tolist() and [*found.dtypes] == [*expected.dtypes]


def test_python_reads_only_what_arrow_refuses(monkeypatch):
    from hpl_nb.data import tables
    monkeypatch.setattr(tables, "_rows", lambda text, separator: "Python's")
    assert tables._cells('a,b\n1,"2\n"\n', ",").values.tolist() == [["a", "b"], ["1", "2\n"]]
    assert tables._cells("a,b\n1\n", ",") == tables._cells("a\n1\n", ",") == "Python's"


@given(some.sampled_from([np.float64, np.float32, np.int16, np.uint8, np.bool_]).flatmap(lambda kind: arrays.arrays(kind, 4)))
def test_arrays_of_numbers_are_read_as_lists_are(values):
    from hpl_nb.data.tables import as_numbers
    for one, other in zip(as_numbers(values), as_numbers(list(values))): np.testing.assert_array_equal(one, other, strict=True)
