"RankUp's losses against loops over pairs, its table against numpy and scipy, and what must have no gradient."
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from small_runs import differences, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.rankup import RankUp, align, pair_score, ranking_loss, sure_pairs, true_order
from hpl_nb.models import mlp
from hpl_nb.training.loop import fit
from hpl_nb.training.state import Clock, OptimizerSettings, Train

SETTINGS = Train(epochs=3, iterations_per_epoch=10, streams=StreamSettings(8, 16), optimizer=OptimizerSettings(1e-2, 1e-2))


def prepared(outputs=1, step=0, dropout=0., **arguments):
    "A method in float64 on the first batch, at a step of an epoch of ten."
    seed_everything(0)
    method, data = RankUp(**arguments).build(mlp(3, (16,), outputs, dropout)), vectors(outputs)
    method.prepare(data)
    method.double().clock = Clock(step, 30, 10)
    batch = Streams(data, method.needs, StreamSettings(8, 12), 10, seed=0)[0]
    return method, {s: {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()} for s, tensors in batch.items()}


def two_logits(method, features):
    "a of each sample and output, (b, K, 2), by the definition of the paper."
    return torch.stack((features @ method.ranker.weight.T).chunk(2, 1), -1)


class TestPairs:
    "Loops over pairs with a softmax over two logits."

    @pytest.mark.parametrize("outputs", [1, 2])
    def test_labelled(self, outputs):
        method, batch = prepared(outputs)
        y = batch["labelled"]["y"]
        y[3] = y[5]
        a, costs = two_logits(method, method.regressor.features(batch["labelled"]["weak"])), []
        for k in range(outputs):
            for i in range(8):
                for j in range(8):
                    p = 1. if y[j, k] > y[i, k] else 0. if y[j, k] < y[i, k] else .5
                    costs.append(F.cross_entropy(a[j, k] - a[i, k], torch.tensor([1 - p, p]).double()))
        self.same(method, method.training_step(batch)["ranking"], .2*sum(costs)/len(costs))

    @pytest.mark.parametrize("threshold", [.5, .6, .7])
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_unlabelled(self, outputs, threshold):
        method, batch = prepared(outputs, threshold=threshold, unlabelled_weight=.3)
        torch.nn.init.normal_(method.ranker.weight, std=.7)
        weak, strong = (two_logits(method, method.regressor.features(batch["unlabelled"][view])) for view in ("weak", "strong"))
        costs, counted = [], np.zeros((12, outputs))
        for k in range(outputs):
            for i in range(12):
                for j in range(12):
                    p = torch.softmax((weak[j, k] - weak[i, k]).detach(), 0)
                    sure = p.max().item() >= threshold
                    costs.append(sure*F.cross_entropy(strong[j, k] - strong[i, k], p.argmax()))
                    counted[i, k] += sure/12
        self.same(method, method.training_step(batch)["unlabelled"], .2*.3*sum(costs)/len(costs))
        np.testing.assert_allclose(method.record["weight"], counted)
        assert threshold == .5 or 0 < counted.mean() < 1

    def same(self, method, actual, expected):
        "The loss and its gradient in all parameters."
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
        parameters = [*method.regressor.body.parameters(), method.ranker.weight]
        gradients = (torch.autograd.grad(loss, parameters) for loss in (actual, expected))
        for got, correct in zip(*gradients): torch.testing.assert_close(got, correct, rtol=1e-9, atol=1e-14)

    @pytest.mark.parametrize("outputs", [1, 2])
    @pytest.mark.parametrize("processes", [2, 3])
    def test_shares(self, processes, outputs):
        "The processes' mean loss and mean gradient are those of the joined batch."
        seed_everything(0)
        weak, y = torch.randn(2, 12, outputs, dtype=torch.float64)
        strong = torch.randn(12, outputs, dtype=torch.float64, requires_grad=True)
        def loss(rows):
            target, counts = sure_pairs(weak[rows], weak, .7)
            return ranking_loss(strong[rows], strong, target, counts) + ranking_loss(strong[rows], strong, true_order(y[rows], y))
        joined, shared = loss(slice(None)), sum(map(loss, torch.arange(12).split(12//processes)))/processes
        torch.testing.assert_close(shared, joined)
        torch.testing.assert_close(*(torch.autograd.grad(x, strong)[0] for x in (shared, joined)))

    def test_score_is_difference_of_two_columns(self):
        method, batch = prepared(2)
        features = method.regressor.features(batch["labelled"]["weak"])
        a = two_logits(method, features)
        torch.testing.assert_close(pair_score(method, features), a[..., 1] - a[..., 0])

    def test_no_pair_is_sure_above_one(self):
        method, batch = prepared(threshold=1.01)
        torch.nn.init.normal_(method.ranker.weight, std=1e6)
        assert method.training_step(batch)["unlabelled"] == 0 == method.record["weight"].max()


class TestAlign:
    "Against scipy's ranks and numpy's quantiles."

    @pytest.mark.parametrize("rows, labels", [(200, 30), (30, 200), (5, 5), (2, 1), (1, 4), (1, 1)])
    @pytest.mark.parametrize("ties", [False, True])
    def test_table(self, rows, labels, ties):
        random = np.random.default_rng(rows + labels)
        table, known = random.normal(size=(rows, 2)), np.sort(random.normal(size=(labels, 2)), axis=0)
        if ties: table = table.round()
        aligned = align(torch.from_numpy(table), torch.from_numpy(table), torch.from_numpy(known)).numpy()
        for k in range(2):
            expected = np.quantile(known[:, k], (rankdata(table[:, k]) - 1)/max(rows - 1, 1))
            np.testing.assert_allclose(aligned[:, k], expected, rtol=1e-12)
            assert (np.diff(aligned[table[:, k].argsort(), k]) >= 0).all()

    def test_release_without_ties(self):
        "The k-th smallest of m becomes the interpolated label at k (n - 1)/(m - 1)."
        random = np.random.default_rng(0)
        table, known = random.normal(size=50), np.sort(random.normal(size=7))
        expected = np.empty(50)
        expected[table.argsort()] = np.interp(np.linspace(0, 6, 50), np.arange(7), known)
        actual = align(*(torch.from_numpy(x)[:, None] for x in (table, table, known)))
        np.testing.assert_allclose(actual[:, 0], expected, rtol=1e-12)

    def test_between_the_table(self):
        "A new prediction ranks between its neighbours; beyond the table it is the smallest or largest label."
        table, labels = torch.arange(5.)[:, None], torch.tensor([[0.], [8.]])
        assert align(torch.tensor([[-9.], [0.], [.1], [.9], [1.], [3.5], [4.], [9.]]), table, labels)[:, 0].tolist() == [
            0, 0, 1, 1, 2, 7, 8, 8]

    def test_large_table_in_float32(self):
        "IMDB-WIKI's size: still within a label of the quantile."
        table, known = torch.randperm(200_000)[:, None].float(), torch.arange(10_000.)[:, None]
        expected = np.quantile(known[:, 0].double(), table[:, 0].double()/199_999)
        np.testing.assert_allclose(align(table, table, known)[:, 0], expected, atol=5e-3)


class TestTraining:
    @pytest.mark.parametrize("every, ramp", [(None, .4), (4, .5), (7, 0.), (100, .4)])
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_table_and_loss(self, outputs, every, ramp):
        "Every step's pseudo-labels and alignment loss, by a dictionary and numpy."
        seed_everything(0)
        method, data = RankUp(alignment_weight=.7, align_every=every, ramp=ramp).build(mlp(3, (16,), outputs)), vectors(outputs)
        steps, losses, guesses = [], [], []
        step = method.training_step
        method.regressor.head.register_forward_hook(lambda *a: guesses.append(a[-1].detach().double().numpy()) if method.training else None)
        def training_step(batch):
            guesses.clear()
            out = step(batch)
            steps.append((batch["unlabelled"]["index"].tolist(), guesses[0], method.record["pseudo_label"].numpy()))
            losses.append(out["alignment"].item())
            return out
        method.training_step = training_step
        fit(method, data, SETTINGS, progress=False)
        labels = np.sort(data.normalizer.normalize(data.targets[data.labelled]), axis=0)
        table, aligned = {}, {}
        for number, (index, weak, pseudo_label) in enumerate(steps):
            table |= dict(zip(index, weak))
            if number and number % (every or 10) == 0:
                seen = np.stack([*table.values()])
                shares = (rankdata(seen, axis=0) - 1)/(len(seen) - 1)
                columns = [np.quantile(labels[:, k], shares[:, k]) for k in range(outputs)]
                aligned = dict(zip(table, np.stack(columns, 1)))
            expected = np.stack([aligned.get(row, guess) for row, guess in zip(index, weak)])
            np.testing.assert_allclose(pseudo_label, expected, atol=1e-5)
            weight = .7*(min(number/30/ramp, 1) if ramp else 1)
            assert losses[number] == pytest.approx(weight*((weak - expected)**2).mean(), rel=1e-3, abs=1e-9)
        assert len(steps) == 30 and (max(losses) > .01) is (every != 100)

    @pytest.mark.parametrize("arguments, expected", [({}, [False]*10 + [True]*20), ({"align_every": 4}, [False]*4 + [True]*26),
                                                     ({"alignment_weight": 0}, [False]*30)], ids=str)
    def test_three_forward_passes(self, arguments, expected):
        "The weak one first, with a gradient only where something has been aligned."
        method, modes = RankUp(**arguments).build(mlp(3, (4,))), []
        method.regressor.body.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()) if method.training else None)
        fit(method, vectors(), SETTINGS, progress=False)
        assert modes == [mode for weak in expected for mode in (weak, True, True)]

    def test_gradient_of_alignment(self):
        "That of the distance of the weak predictions to constants; nothing reaches the ranker, and pairs reach no weak view."
        method, batch = prepared(step=20)
        rows = batch["unlabelled"]["index"]
        method.stage[rows], method.aligned[rows] = 2, torch.randn(12, 1, dtype=torch.float64)
        losses = method.training_step(batch)
        parameters = [*method.regressor.parameters()]
        assert torch.autograd.grad(losses["alignment"], method.ranker.weight, allow_unused=True, retain_graph=True)[0] is None
        expected = ((method.regressor(batch["unlabelled"]["weak"]) - method.aligned[rows])**2).mean()
        torch.testing.assert_close(losses["alignment"], expected)
        for got, correct in zip(*(torch.autograd.grad(x, parameters, retain_graph=True) for x in (losses["alignment"], expected))):
            torch.testing.assert_close(got, correct)
        for name in ("ranking", "unlabelled"):
            assert torch.autograd.grad(losses[name], method.regressor.head.weight, allow_unused=True, retain_graph=True)[0] is None

    def test_labelled_error(self):
        for kind, distance in (("squared", F.mse_loss), ("absolute", F.l1_loss)):
            method, batch = prepared(2, labelled_error=kind)
            expected = distance(method.regressor(batch["labelled"]["weak"]), batch["labelled"]["y"])
            torch.testing.assert_close(method.training_step(batch)["labelled"], expected)

    def test_every_argument_matters(self):
        def weights(**changes):
            seed_everything(0)
            method = RankUp(**{"threshold": .6, **changes}).build(mlp(3, (16,)))
            fit(method, vectors(), SETTINGS, progress=False)
            return dict(method.regressor.named_parameters())
        usual = weights()
        for change in ({"ranking_weight": .5}, {"unlabelled_weight": .5}, {"threshold": .8}, {"alignment_weight": .5}, {"ramp": .9},
                       {"align_every": 4}, {"labelled_error": "absolute"}):
            assert differences(usual, weights(**change)), change
        assert not differences(usual, weights(decay=None)) # it decides what predicts, not what is trained

    def test_alone(self):
        "ARC keeps no table; RDA moves no ranker."
        method = RankUp.arc().build(mlp(3, (16,)))
        run = fit(method, vectors(), SETTINGS, progress=False)
        assert {name for name, _ in method.named_buffers()} == set() and "loss/alignment" not in run.log
        method = RankUp(ranking_weight=0).build(mlp(3, (16,)))
        before = method.ranker.weight.detach().clone()
        fit(method, vectors(), SETTINGS, progress=False)
        assert torch.equal(method.ranker.weight, before)


class TestPrediction:
    @pytest.mark.parametrize("decay", [0., .5, .9])
    def test_average(self, decay):
        "After ten steps, by the recursion in numpy: the decay is constant."
        seed_everything(0)
        method, seen = RankUp(decay=decay).build(mlp(3, (16,))), []
        after = method.after_step
        def after_step():
            after()
            seen.append(method.regressor.head.weight.detach().double().numpy().copy())
        method.after_step = after_step
        expected = method.average.head.weight.double().numpy().copy()
        fit(method, vectors(), replace(SETTINGS, epochs=1), progress=False)
        for weight in seen: expected = decay*expected + (1 - decay)*weight
        np.testing.assert_allclose(method.average.head.weight, expected, atol=1e-6)
        assert not any(p.requires_grad for p in method.average.parameters())

    @pytest.mark.parametrize("decay", [None, .9])
    def test_predict(self, decay):
        "By the average or the network itself; deterministic, and it changes nothing."
        method, x = RankUp(decay=decay).build(mlp(3, (16,), dropout=.5)), torch.randn(7, 3)
        fit(method, vectors(), SETTINGS, progress=False)
        state = {name: value.clone() for name, value in method.eval().state_dict().items()}
        with torch.no_grad(): first, second, own = method.predict(x), method.predict(x), method.regressor(x)
        assert torch.equal(first, second) and torch.equal(first, own) is (decay is None)
        assert not differences(state, dict(method.state_dict()))

    def test_inspect(self):
        "Before the first alignment the network's own prediction; then its quantile of the labels."
        method, batch = prepared(2)
        weak, strong = (batch["unlabelled"][view] for view in ("weak", "strong"))
        with torch.no_grad():
            method.training_step(batch)
            own = method.regressor(weak)
            assert torch.equal(method.inspect(weak, strong)["pseudo_label"], own)
            method.clock = method.clock._replace(step=10)
            method.training_step(batch)
            views = method.inspect(weak, strong)
        expected = [np.quantile(method.labels[:, k], (rankdata(own[:, k]) - 1)/11) for k in range(2)]
        np.testing.assert_allclose(views["pseudo_label"], np.stack(expected, 1), atol=1e-6)
        torch.testing.assert_close(method.aligned[batch["unlabelled"]["index"]], views["pseudo_label"])
        assert torch.equal(views["strong_prediction"], method.regressor(strong))


@pytest.mark.parametrize("name, value", [
    ("ranking_weight", -1.), ("unlabelled_weight", float("nan")), ("threshold", -.1), ("alignment_weight", -1.), ("ramp", -.4),
    ("align_every", 0), ("labelled_error", "l1"), ("decay", 1.5), ("decay", -.1)])
def test_bad_arguments(name, value):
    with pytest.raises(HplError, match=f"{name} is"): RankUp(**{name: value})


def test_presets():
    "ARC alone has its own name, label and candidates; other settings can be changed with it."
    arc = RankUp.presets()["rankup_arc"]
    assert arc == RankUp(alignment_weight=0) and arc.title == "RankUp (arc)" and RankUp.arc(decay=None).decay is None
    assert [c.alignment_weight for c in arc.candidates()] == [0]*4 and RankUp().candidates()[2] == RankUp(.7, alignment_weight=.3)


@pytest.mark.parametrize("settings", [RankUp(), RankUp.arc(decay=None)], ids=["full", "arc"])
def test_state_is_whole(settings):
    "A copy that loads the state makes the same step."
    def steps(method, batches):
        method.optimizers = method.optimizers or method.make_optimizers(OptimizerSettings(1e-2, 1e-2))
        for step, batch in batches:
            method.clock = Clock(step, 30, 2)
            sum(method.training_step(batch).values()).backward()
            for optimizer in method.optimizers.values(): optimizer.step()
            for optimizer in method.optimizers.values(): optimizer.zero_grad()
            method.after_step()
    data, (first, second) = vectors(), (settings.build(mlp(3, (16,))), settings.build(mlp(3, (16,))))
    batches = [*enumerate(Streams(data, first.needs, StreamSettings(8, 16), 6, seed=0)[step] for step in range(6))]
    for method in (first, second): method.prepare(data)
    steps(first, batches[:3])
    second.optimizers = second.make_optimizers(OptimizerSettings(1e-2, 1e-2))
    second.load_state_dict(first.state_dict())
    second.optimizers["regressor"].load_state_dict(deepcopy(first.optimizers["regressor"].state_dict()))
    for method in (first, second): steps(method, batches[3:])
    assert not differences(dict(first.state_dict()), dict(second.state_dict()))
