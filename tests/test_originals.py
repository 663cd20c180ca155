"Our methods and STS-B beside the originals' arithmetic, transcribed from the descriptions in FACTS.md: rows F1, F5, F6, F8 and F9."
import warnings
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import SETTINGS, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.data.stsb import STSB, read_pairs, stsb
from hpl_nb.methods.cadr import CADR
from hpl_nb.methods.core import PseudoLabel, Supervised
from hpl_nb.methods.mean_teacher import MeanTeacher
from hpl_nb.methods.rankup import RankUp
from hpl_nb.models import bilstm, mlp
from hpl_nb.training.loop import fit
from hpl_nb.training.state import Clock

few = settings(max_examples=8, deadline=None)


def moved(method, average, weights):
    "The averaged head after each step, for trained heads that are set to `weights`."
    for step, weight in enumerate(weights):
        method.clock = Clock(step, len(weights), len(weights))
        with torch.no_grad(): method.regressor.head.weight.fill_(weight)
        method.after_step()
        yield average.head.weight[0, 0].item()


class TestAverages:
    "F1: the averaged weights of Mean Teacher and of RankUp are two different recursions."
    weights = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=12)

    @few
    @given(weights, st.floats(0, 1))
    def test_mean_teacher(self, weights, decay):
        "Authors' code: `global_step` is 1 at the first update, and alpha is min(1 - 1/(global_step + 1), decay)."
        method = MeanTeacher(decay=decay).build(mlp(2, (4,)).double())
        with torch.no_grad(): method.teacher.head.weight.fill_(.5)
        expected = .5
        for global_step, (actual, weight) in enumerate(zip(moved(method, method.teacher, weights), weights), 1):
            alpha = min(1 - 1/(global_step + 1), decay)
            expected = alpha*expected + (1 - alpha)*weight
            assert actual == pytest.approx(expected, abs=1e-9)

    @few
    @given(weights, st.floats(0, 1))
    def test_rankup(self, weights, decay):
        "Authors' code: the same decay from the first update on."
        method = RankUp.arc(decay=decay).build(mlp(2, (4,)).double())
        with torch.no_grad(): method.average.head.weight.fill_(.5)
        expected = .5
        for actual, weight in zip(moved(method, method.average, weights), weights):
            expected = decay*expected + (1 - decay)*weight
            assert actual == pytest.approx(expected, abs=1e-9)


class TestAlignment:
    "F5: RDA notes the step's predictions before it aligns."
    @few
    @given(st.sampled_from([5, 6, 8]), st.integers(0, 10**6))
    def test_pseudo_labels(self, per_epoch, seed):
        "Three epochs that each see every row: align at every first step; the first epoch has its own predictions."
        seed_everything(seed)
        data, method = vectors(), RankUp().build(mlp(3, ()).double()) # linear: no ties, which the original orders arbitrarily
        method.prepare(data)
        method.double()
        rows = np.array_split(np.random.permutation(data.unlabelled), per_epoch)
        raw, refined = np.ones(len(data.targets)), np.ones(len(data.targets))
        labels = np.sort(data.normalizer.normalize(data.targets[data.labelled])[:, 0]).astype(np.float32)
        for it in range(3*per_epoch):
            index = rows[it % per_epoch]
            with torch.no_grad():
                for p in method.regressor.parameters(): p.add_(.05*torch.randn_like(p))
            guess = self.step(method, data, index, Clock(it, 3*per_epoch, per_epoch))
            raw[index] = guess
            if it % per_epoch == 0 and it:
                order = data.unlabelled[raw[data.unlabelled].argsort()]
                refined[order] = np.interp(np.linspace(0, 1, len(order)), np.linspace(0, 1, len(labels)), labels)
            expected = refined[index] if it >= per_epoch else guess
            np.testing.assert_allclose(method.record["pseudo_label"][:, 0], expected, atol=1e-6)

    def step(self, method, data, index, clock):
        "One training step on these unlabelled rows, and the predictions on their weak views."
        method.clock, x = clock, data.inputs[index].double()
        known = data.labelled[:8]
        y = torch.from_numpy(data.normalizer.normalize(data.targets[known]))
        method.training_step({"labelled": {"weak": data.inputs[known].double(), "y": y},
                              "unlabelled": {"weak": x, "strong": x, "index": torch.from_numpy(index)}})
        with torch.no_grad(): return method.regressor(x)[:, 0].numpy()


class TestWeights:
    "F6: CADR's `upper` clips the coefficients of the pseudo-inverse, and no weight of a labelled row."
    def transcribed(self, average, probability, target, upper):
        "p = clip(average pinv(P), 0, upper) P, and n (1/p_y) over the sum of the batch's 1/p_y."
        p = np.clip(average @ np.linalg.pinv(probability), 0, upper) @ probability
        inverse = 1/p[target]
        return len(target)*inverse/inverse.sum()

    @few
    @given(st.integers(2, 6), st.sampled_from([.02, .5, 5., 10.]), st.integers(0, 10**6))
    def test_labelled_loss(self, bins, upper, seed):
        method, batch = self.prepared(bins, seed, upper=upper)
        loss, expected, _ = self.losses(method, batch, upper)
        assert loss == pytest.approx(expected, rel=1e-6)

    def test_a_row_may_weigh_more_than_five(self):
        "The default cut is ours: it keeps one row from being the whole batch."
        losses = {}
        for most in (float("inf"), 5.):
            method, batch = self.prepared(6, 1, max_weight=most)
            rare = method.classes.target(batch["labelled"]["y"]).max()
            with torch.no_grad(): method.classes.classifier.bias[rare] = -9.
            losses[most], expected, weight = self.losses(method, batch, 5.)
        assert losses[float("inf")] == pytest.approx(expected, rel=1e-6) and weight.max() > 7
        assert losses[5.] != pytest.approx(expected, rel=1e-3)

    def prepared(self, bins, seed, max_weight=float("inf"), **changes):
        "A method that is sure of the bins, in float64, and a batch."
        seed_everything(seed)
        data = vectors()
        method = CADR(bins=bins, prior="predicted", max_weight=max_weight, **changes).build(mlp(3, (16,))).double()
        method.prepare(data)
        with torch.no_grad(): method.classes.classifier.weight.mul_(8)
        batch = Streams(data, method.needs, StreamSettings(16, 24), 1, seed=seed % 1000)[0]
        return method, {s: {k: v.double() if v.is_floating_point() else v for k, v in part.items()} for s, part in batch.items()}

    def losses(self, method, batch, upper):
        "Ours, and the same of the transcribed weights."
        average = method.marginal[:, 0].numpy().copy()
        loss = method.training_step(batch)["labelled"].item()
        with torch.no_grad():
            probability = method.classes(method.regressor.features(batch["unlabelled"]["weak"])).softmax(1)[..., 0].numpy()
            error = (method.regressor(batch["labelled"]["weak"]) - batch["labelled"]["y"])[:, 0].numpy()
        weight = self.transcribed(average, probability, method.classes.target(batch["labelled"]["y"])[:, 0].numpy(), upper)
        return loss, (weight*error**2).mean(), weight


def dir_folder(path, rows=40):
    "Three tables as STS-B-DIR writes them: ten columns, no split, no strong sentences."
    path.mkdir(parents=True)
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    for start, split in enumerate(("train", "dev", "test")):
        lines = [f'{i}\tmain-news\theadlines\t2014\t0{i}\tnone\tnone\tA "dog {split} {i}.\tA cat {split} {i}.\t{(i + start) % 6}.00'
                 for i in range(rows)]
        (path/f"{split}_new.tsv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


class TestDirSplit:
    "F8: the three tables of STS-B-DIR load."
    @pytest.mark.parametrize("place", ["", "glue_data/STS-B"])
    def test_three_tables(self, place, tmp_path):
        dir_folder(tmp_path/"dir"/place)
        data = STSB(str(tmp_path/"dir"), label_ratio=.25, split="dir", strong="none").load()
        assert [len(data.rows(split)) for split in ("labelled", "unlabelled", "val", "test")] == [10, 30, 40, 40]
        assert data.sample_names[data.val[3]] == 'A "dog dev 3. | A cat dev 3.' and data.targets[data.val[3], 0] == 4
        samples = data.inputs[data.unlabelled]
        assert torch.equal(data.strong(samples, None), data.weak(samples, None)) and data.notes["strong_view"] == "none"
        for method in (Supervised(), PseudoLabel()):
            model = method.build(bilstm(torch.randn(len(data.inputs.vocabulary), 5), hidden=3))
            assert np.isfinite(fit(model, data, replace(SETTINGS, record_every=0), progress=False).metrics["test_mse"])

    def test_what_to_type(self, tmp_path):
        "Each refusal names the argument that helps."
        root = dir_folder(tmp_path/"dir")
        with pytest.raises(HplError, match='no sts.tsv.*split="dir"'): stsb(root)
        with pytest.raises(HplError, match='no strong sentence.*strong="wordnet".*strong="none"'): stsb(root, split="dir")
        (root/"dev_new.tsv").rename(root/"dev.tsv")
        with pytest.raises(HplError, match="no dev_new.tsv.*imbalanced-regression"): stsb(root, split="dir", strong="none")
        with pytest.raises(HplError, match="choose 'release' or 'dir'"): STSB(split="none")
        with pytest.raises(HplError, match="split is 'none'; choose"): stsb(root, split="none")
        with pytest.raises(HplError, match="strong is 'no'; choose"): stsb(root, split="dir", strong="no")

    def test_published(self, shared):
        "The tables beside sts.tsv are of this format and have the same pairs: the release's before it joined them."
        folder = shared/"data/stsb"
        pairs = read_pairs(folder, split="dir")
        assert pairs["split"].value_counts().to_dict() == {"train": 5249, "dev": 1000, "test": 1000}
        columns = ["sentence1", "sentence2", "score", "split"]
        joined = read_pairs(folder)[columns]
        ours, theirs = (table.sort_values(columns, ignore_index=True) for table in (pairs[columns], joined))
        pd.testing.assert_frame_equal(ours, theirs)


def shared_pairs(data):
    "How many pairs of sentences, in either order, two sets share: by pandas."
    pairs = pd.Series(data.sample_names).str.split(" | ", regex=False).map(lambda two: tuple(sorted(two)))
    sets = {split: set(pairs[data.rows(split)]) for split in ("labelled", "unlabelled", "val", "test")}
    return {(one, other): len(sets[one] & sets[other]) for one, other in combinations(sets, 2) if sets[one] & sets[other]}


class TestRepeats:
    "F9: one warning counts the pairs that sets share; `deduplicate` drops the training rows."
    def test_published(self, shared):
        counts = {("labelled", "unlabelled"): 6, ("labelled", "val"): 1, ("unlabelled", "val"): 14, ("unlabelled", "test"): 9,
                  ("val", "test"): 4}
        with pytest.warns(UserWarning) as told: data = STSB(str(shared/"data/stsb"), label_ratio=.1).load()
        assert len(told) == 1 and shared_pairs(data) == counts
        for (one, other), count in counts.items(): assert f"{count} in {one} and {other}" in str(told[0].message)

    def test_deduplicate(self, shared):
        "No warning, and what is left is unlike all else; held-out rows stay."
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = STSB(str(shared/"data/stsb"), label_ratio=.1, deduplicate=True).load()
        assert shared_pairs(data) == {("val", "test"): 4} and len(data.val) == len(data.test) == 1000
        assert len(data.labelled) == 523

    def test_tables_of_one_s_own(self, tmp_path):
        "Also where the sentences are exchanged; without repeats there is no warning."
        root = dir_folder(tmp_path/"dir")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stsb(root, .25, split="dir", strong="none")
        text = (root/"test_new.tsv").read_text().replace('A "dog test 0.\tA cat test 0.', 'A cat train 5.\tA "dog train 5.')
        (root/"test_new.tsv").write_text(text)
        with pytest.warns(UserWarning, match="1 in (un)?labelled and test"): stsb(root, .25, split="dir", strong="none")
