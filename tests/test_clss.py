"CLSS against loops, scipy and the literal rule of blackbox differentiation; orders, signs, ties and processes."
from functools import partial

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from small_runs import differences, on_cpu, vectors  # noqa: F401
from torch.nn.functional import normalize

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.clss import CLSS, fiedler_vector, order_losses, order_ranks, ordinal_entropy, rank_loss, ranks
from hpl_nb.methods.core import Supervised
from hpl_nb.models import mlp
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train

SETTINGS = Train(epochs=1, iterations_per_epoch=10, streams=StreamSettings(8, 12), optimizer=OptimizerSettings(1e-2, 1e-2))
OFF = dict(contrast_weight=0., unlabelled_weight=0., prediction_weight=0.)


def trained(settings, outputs=1):
    seed_everything(0)
    method = settings.build(mlp(3, (16,), outputs))
    run = fit(method, vectors(outputs), SETTINGS, progress=False)
    return method, run


def prepared(outputs=1, seed=0, **kwargs):
    "A method in float64 and a batch."
    seed_everything(seed)
    method = CLSS(**kwargs).build(mlp(3, (16,), outputs)).double()
    batch = Streams(vectors(outputs), method.needs, StreamSettings(8, 12), 10, seed=seed)[0]
    return method, {s: {k: v.double() if v.is_floating_point() else v for k, v in part.items()} for s, part in batch.items()}


class TestOrdinalEntropy:
    def by_loops(self, features, y):
        "Centres in a dictionary, pairs in a loop."
        values = sorted(set(map(tuple, y.tolist())))
        rows = {v: [f for f, label in zip(features, y.tolist()) if tuple(label) == v] for v in values}
        centres = {v: np.mean(f, 0)/np.linalg.norm(np.mean(f, 0)) for v, f in rows.items()}
        tight = [np.sum((f/np.linalg.norm(f) - centres[v])**2) for v, members in rows.items() if len(members) > 1 for f in members]
        pairs = [(v, w) for i, v in enumerate(values) for w in values[i + 1:]]
        gaps = [np.linalg.norm(np.subtract(v, w)) for v, w in pairs]
        far = [np.linalg.norm(centres[v] - centres[w])*(gap - min(gaps))/max(gaps) for (v, w), gap in zip(pairs, gaps)]
        return (np.mean(tight) if tight else 0.) - (np.mean(far) if far else 0.)

    @pytest.mark.parametrize("outputs", [1, 2])
    @pytest.mark.parametrize("values", [1, 2, 3, 7, None], ids="{} values".format)
    def test_agrees_with_loops(self, outputs, values):
        random = np.random.default_rng(0)
        features = random.normal(size=(20, 5))
        y = random.normal(size=(20, outputs)) if values is None else random.integers(0, values, (20, outputs)).astype(float)
        actual = ordinal_entropy(torch.from_numpy(features), torch.from_numpy(y)).item()
        assert actual == pytest.approx(self.by_loops(features, y), rel=1e-12, abs=1e-12)

    def test_label_width_groups_close_labels(self):
        features, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
        assert torch.equal(ordinal_entropy(features, y, .5), ordinal_entropy(features, (2*y).round()/2))
        assert ordinal_entropy(features, y, .5) != ordinal_entropy(features, y)
        assert ordinal_entropy(features, y, 1e-6).item() == pytest.approx(ordinal_entropy(features, y).item(), abs=1e-5)

    @pytest.mark.parametrize("y", [[0, 0, 0, 1, 2, 4], [0, 1, 2, 3, 4, 6], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]], ids=str)
    def test_gradient(self, y):
        "By finite differences; finite also where features coincide."
        features, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)[:, None]
        assert torch.autograd.gradcheck(partial(ordinal_entropy, y=y), features.requires_grad_())
        same = torch.ones(6, 4, requires_grad=True)
        ordinal_entropy(same, y.float()).backward()
        assert same.grad.isfinite().all()


class TestRanks:
    @pytest.mark.parametrize("average", [True, False])
    def test_agrees_with_scipy(self, average):
        "Ties included: their mean rank, or by position, the last one first."
        x = np.random.default_rng(0).integers(0, 6, (50, 9)).astype(float)
        if average: expected = stats.rankdata(-x, axis=1)
        else: expected = stats.rankdata(-x[:, ::-1], "ordinal", axis=1)[:, ::-1]
        np.testing.assert_allclose(ranks(torch.from_numpy(x), average).numpy(), expected/9, rtol=1e-15)

    def test_order_ranks_by_loops(self):
        vector = torch.randn(9, dtype=torch.float64)
        place = stats.rankdata(vector.numpy())
        expected = [stats.rankdata(abs(place - place[i]))/9 for i in range(9)]
        np.testing.assert_allclose(order_ranks(vector).numpy(), expected)

    @pytest.mark.parametrize("average", [True, False])
    def test_either_sign(self, average):
        for _ in range(20):
            vector = torch.randn(12, dtype=torch.float64)
            assert torch.equal(order_ranks(vector, average), order_ranks(-vector, average))


class TestSeriation:
    @pytest.mark.parametrize("m", [3, 8, 33])
    def test_agrees_with_scipy_in_the_subspace(self, m):
        "Of the Laplacian restricted to vectors orthogonal to 1; similarities of both signs."
        for seed in range(5):
            s = np.random.default_rng(seed).normal(size=(m, m))
            s = s + s.T
            basis = linalg.null_space(np.ones((1, m)))
            expected = basis @ linalg.eigh(basis.T @ (np.diag(s.sum(1)) - s) @ basis)[1][:, 0]
            actual = fiedler_vector(torch.from_numpy(s)).numpy()
            np.testing.assert_allclose(actual*np.sign(actual @ expected), expected, atol=1e-9)
            assert abs(actual.sum()) < 1e-9

    @pytest.mark.parametrize("fall", [lambda d: np.exp(-d), lambda d: 1/(1 + d**2), lambda d: np.cos(d/2)], ids=["exp", "Cauchy", "cosine"])
    def test_recovers_orders(self, fall):
        "Similarities that fall with the distance on a line (the cosine: to below zero)."
        for seed in range(10):
            t = np.random.default_rng(seed).uniform(0, 6, 20)
            order = fiedler_vector(torch.from_numpy(fall(abs(t[:, None] - t)))).argsort().numpy()
            assert (np.diff(t[order]) > 0).all() or (np.diff(t[order]) < 0).all()

    def test_precision_gradient_and_failure(self):
        "float32 similarities are solved in float64; nothing flows back; not even NaN stops the solver."
        unit = normalize(torch.randn(16, 8, dtype=torch.float64, requires_grad=True))
        vector, rounded = fiedler_vector(unit @ unit.T), fiedler_vector((unit @ unit.T).float())
        assert rounded.dtype == torch.float64 and not vector.requires_grad
        assert abs(vector @ rounded).item() == pytest.approx(1, abs=1e-6)
        assert fiedler_vector(torch.full((4, 4), float("nan"))).isfinite().all()


class Blackbox(torch.autograd.Function):
    "The rule as Vlastelica et al. state it: descending ranks, whatever gradient arrives."
    @staticmethod
    def forward(ctx, x, interpolation):
        ctx.x, ctx.interpolation = x.detach(), interpolation
        return ranks(x, False)

    @staticmethod
    def backward(ctx, gradient):
        return -(ranks(ctx.x, False) - ranks(ctx.x + ctx.interpolation*gradient, False))/ctx.interpolation, None


class TestRankLoss:
    def literal(self, scores, place, weight, interpolation=2.):
        "A loop over rows; the weight is applied to the result."
        loss = 0.
        for i, row in enumerate(scores):
            target = torch.tensor(stats.rankdata(abs(place - place[i])[::-1], "ordinal")[::-1]/len(row))
            loss = loss + ((Blackbox.apply(row, interpolation) - target)**2).mean()
        return weight*loss

    @pytest.mark.parametrize("weight", [.01, .05, 1., 30.])
    @pytest.mark.parametrize("m", [8, 20])
    def test_agrees_with_the_original_formula(self, weight, m):
        "Value and gradient in the features; at m = 8 with the default normalisation, at others with plain sums."
        features = torch.randn(m, 4, dtype=torch.float64, requires_grad=True)
        gradients, values, heard = [], [], 0
        for ours in (False, True):
            unit = normalize(features)
            similarity = unit @ unit.T
            vector = fiedler_vector(similarity)
            if ours: loss = rank_loss(similarity[None], order_ranks(vector, False), weight, 2., 8 if m == 8 else None, False)
            else: loss = self.literal(similarity, stats.rankdata(vector.numpy()), weight)
            gradients.append(torch.autograd.grad(loss, features)[0])
            values.append(loss.item())
            heard += gradients[-1].abs().sum().item()
        assert values[0] == pytest.approx(values[1], rel=1e-12)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
        assert heard > 0 or weight < 1

    def test_is_linear_in_what_comes_back(self):
        "Half the loss has half the gradient, at any scale (fp16); with the literal rule it has another one."
        scores, vector = .1*torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
        scores.requires_grad_()
        def gradient(loss): return torch.autograd.grad(loss, scores)[0]
        whole = gradient(rank_loss(scores[None], order_ranks(vector), 1.))
        for factor in (.5, 2.**16): assert torch.equal(gradient(factor*rank_loss(scores[None], order_ranks(vector), 1.)), factor*whole)
        place = stats.rankdata(vector.numpy())
        assert not torch.allclose(gradient(.5*self.literal(scores, place, 1.)), .5*gradient(self.literal(scores, place, 1.)))

    def test_limits(self):
        "A tiny weight moves no rank; a huge one leaves only the ranks of the error; weight 0 is a loss of 0."
        scores, target = torch.randn(1, 8, 8, dtype=torch.float64, requires_grad=True), order_ranks(torch.randn(8, dtype=torch.float64))
        def gradient(weight): return torch.autograd.grad(rank_loss(scores, target, weight), scores)[0]
        assert not gradient(0.).any() and not gradient(1e-9).any() and rank_loss(scores, target, 0.) == 0
        rank = ranks(scores.detach())
        error = rank - target + 1e-9*scores.detach() # where the error is equal, the scores decide
        torch.testing.assert_close(gradient(1e9), (ranks(error) - rank)/2)

    def test_points_uphill(self):
        "Finite differences of the loss, smoothed by noise, along its gradient."
        generator = torch.Generator().manual_seed(0)
        def draw(*shape): return torch.randn(*shape, generator=generator, dtype=torch.float64)
        for _ in range(20):
            target, scores = order_ranks(draw(8)), draw(1, 8, 8).requires_grad_()
            direction = torch.autograd.grad(rank_loss(scores, target, 1.), scores)[0]
            noise, step = .2*draw(500, 8, 8), .05*direction/direction.norm()*8
            up, down = (((ranks(scores.detach() + sign*step + noise) - target)**2).mean() for sign in (1, -1))
            assert up > down

    def test_a_perfect_order_is_left_alone(self):
        "The two neighbours at each distance tie in the target; their scores differ by more than a step reaches."
        t = torch.arange(8, dtype=torch.float64)
        scores = (-(t[:, None] - t - .1).abs())[None].requires_grad_()
        assert not torch.autograd.grad(rank_loss(scores, order_ranks(t), .05), scores)[0].any()

    def test_outputs_and_batches(self):
        scores, target = torch.randn(2, 12, 12), order_ranks(torch.randn(12))
        apart = [rank_loss(s[None], target, .3) for s in scores]
        assert rank_loss(scores, target, .3).item() == pytest.approx(sum(apart).item()/2, rel=1e-6)
        assert rank_loss(scores, target, .3, reference_batch=None).item() == pytest.approx(12/8*sum(apart).item()/2, rel=1e-6)


class TestMethod:
    def test_step(self):
        "Each loss from its parts, for two outputs."
        method, batch = prepared(2, contrast_weight=.3, unlabelled_weight=.2, prediction_weight=.4, label_width=.5)
        losses, regressor = method.training_step(batch), method.regressor
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]["weak"]
        assert set(losses) == {"labelled", "contrast", "unlabelled", "prediction"} and set(batch["unlabelled"]) == {"index", "weak"}
        assert losses["labelled"].item() == pytest.approx(((regressor(labelled["weak"]) - labelled["y"])**2).mean().item())
        contrast = ordinal_entropy(regressor.features(labelled["weak"]), labelled["y"], .5)
        assert losses["contrast"].item() == pytest.approx(.3*contrast.item())
        unit, p = normalize(regressor.features(unlabelled)), regressor(unlabelled)
        target = order_ranks(fiedler_vector(unit @ unit.T))
        assert losses["unlabelled"].item() == pytest.approx(rank_loss((unit @ unit.T)[None], target, .2).item())
        apart = [rank_loss(-(p[:, [k]] - p[:, k]).abs()[None], target, .4).item() for k in range(2)]
        assert losses["prediction"].item() == pytest.approx(np.mean(apart))

    @pytest.mark.parametrize("outputs", [1, 2])
    def test_without_weights_it_is_supervised(self, outputs):
        expected, actual = (trained(settings, outputs)[0] for settings in (Supervised(), CLSS(**OFF)))
        assert not differences(dict(expected.state_dict()), dict(actual.state_dict()))

    @pytest.mark.parametrize("change", [
        {"contrast_weight": .5}, {"unlabelled_weight": .5}, {"prediction_weight": 3.}, {"interpolation": 9.}, {"reference_batch": None},
        {"unlabelled_batch": 16}, {"label_width": .5}, {"average_ties": False}], ids=str)
    def test_every_setting_matters(self, change):
        before, after = trained(CLSS())[0], trained(CLSS(**change))[0]
        assert differences(dict(before.state_dict()), dict(after.state_dict()))
        assert after.config() == before.config() | change

    def test_two_processes_are_one(self):
        "Each with half the rows, and the other's through `gather`: mean gradient and every loss are those of the joined batch."
        method, batch = prepared(2, unlabelled_weight=1., prediction_weight=1., label_width=.5)
        def step(part, gather, processes):
            method.gather, method.processes = gather, processes
            method.zero_grad()
            losses = method.training_step(part)
            sum(losses.values()).backward()
            return {name: loss.item() for name, loss in losses.items()}, [p.grad.clone() for p in method.parameters()]
        halves = [{s: {k: v[i*len(v)//2:(i + 1)*len(v)//2] for k, v in part.items()} for s, part in batch.items()} for i in range(2)]
        losses, gradients = step(batch, lambda rows: rows, 1)
        sent = [[], []] # what each of them gives to `gather`, in this order
        for half, mine in zip(halves, sent): step(half, lambda rows, mine=mine: mine.append(rows) or torch.cat([rows, rows]), 2)
        assert not any(rows.requires_grad for mine in sent for rows in mine)
        results = []
        for half in halves:
            pairs = zip(*sent)
            results.append(step(half, lambda rows, pairs=pairs: torch.cat(next(pairs)), 2))
        for name in ("contrast", "unlabelled", "prediction"):
            for other, _ in results: assert other[name] == pytest.approx(losses[name], rel=1e-12)
        for one, *two in zip(gradients, *(g for _, g in results)): torch.testing.assert_close(sum(two)/2, one, rtol=1e-9, atol=1e-12)

    def test_equal_features(self):
        "A collapsed network: any order is as good; losses and gradients stay finite."
        method, _ = prepared()
        features = torch.ones(12, 16, dtype=torch.float64, requires_grad=True)
        sum(order_losses(method, features).values()).backward()
        assert features.grad.isfinite().all()

    def test_predict_and_inspect_change_nothing(self):
        method, _ = trained(CLSS())
        before, x = {k: v.clone() for k, v in method.state_dict().items()}, torch.randn(5, 3)
        method.eval()
        with torch.no_grad():
            views = method.inspect(x, -x)
            for values, view in ((method.predict(x), x), (views["pseudo_label"], x), (views["strong_prediction"], -x)):
                assert torch.equal(values, method.regressor(view))
        assert not differences(before, dict(method.state_dict())) and all(name.startswith("regressor.") for name in before)

    def test_streams(self):
        settings = StreamSettings(16, 32)
        assert CLSS().build(mlp(3)).stream_settings(settings) == settings
        assert CLSS(unlabelled_batch=8).build(mlp(3)).stream_settings(settings) == StreamSettings(16, 8)
        with pytest.raises(HplError, match="unlabelled_batch is 2"): CLSS().build(mlp(3)).stream_settings(StreamSettings(16, 2))

    @pytest.mark.parametrize("name, value", [
        ("contrast_weight", -1.), ("unlabelled_weight", float("nan")), ("prediction_weight", -.1), ("interpolation", 0.),
        ("interpolation", float("nan")), ("reference_batch", 0), ("label_width", 0.), ("label_width", -1.), ("unlabelled_batch", 2),
        ("unlabelled_batch", 0)])
    def test_out_of_range(self, name, value):
        with pytest.raises(HplError, match=f"{name} is"): CLSS(**{name: value})
