"Pairs and loops against every pair and triple written out, what a linear pair head makes of them, and predictions by anchors."
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from small_runs import differences, digits, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.tnnr import TNNR, PairHead, anchor_estimates, evenly_spaced, loop_loss, pair_loss
from hpl_nb.models import mlp, small_cnn
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train

SETTINGS = Train(epochs=2, iterations_per_epoch=10, streams=StreamSettings(8, 8),
                         optimizer=OptimizerSettings(1e-2, 1e-2, 1e-3, 1e-3))


def prepared(outputs=1, widths=(16,), **kwargs):
    "A method in float64 with its anchors, and a batch of 8 labelled and 12 unlabelled rows."
    seed_everything(0)
    method, data = TNNR(**kwargs).build(mlp(3, widths, outputs)), vectors(outputs)
    method.prepare(data)
    batch = Streams(data, method.needs, StreamSettings(8, 12), 10, seed=0)[0]
    batch = {s: {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()} for s, tensors in batch.items()}
    return method.double(), data, batch


def written_out(method, a, b):
    "F of two rows: the layers on their concatenated features."
    pair = torch.cat([method.regressor.features(row[None])[0] for row in (a, b)])
    return method.pair_head.rest(method.pair_head.pair(pair))


class TestAgainstLoops:
    @pytest.mark.parametrize("hidden", [0, 5])
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_training_step(self, hidden, outputs):
        "Mean over all triples of what the original computes for a few: the edges of labelled ones, the squared mean edge of the others."
        method, _, batch = prepared(outputs, hidden=hidden, unlabelled_weight=.3)
        labelled, y, unlabelled = batch["labelled"]["weak"], batch["labelled"]["y"], batch["unlabelled"]["weak"]
        every = torch.cat([labelled, unlabelled])
        F = {(i, j): written_out(method, every[i], every[j]).detach().numpy() for i, j in product(range(20), repeat=2)}
        y, losses = y.numpy(), method.training_step(batch)
        edges = [np.stack([F[i, j] - (y[i] - y[j]) for i, j in ((a, b), (b, c), (c, a))]) for a, b, c in product(range(8), repeat=3)]
        assert losses["labelled"].item() == pytest.approx(np.mean([(edge**2).mean() for edge in edges]), rel=1e-10)
        loops = [(F[a, b] + F[b, c] + F[c, a])/3 for a, b, c in product(range(20), range(20), range(8, 20))]
        assert losses["unlabelled"].item() == pytest.approx(.3*np.mean([(loop**2).mean() for loop in loops]), rel=1e-10)

    @pytest.mark.parametrize("p, q, r", [(1, 1, 1), (4, 3, 2), (2, 5, 1)])
    def test_loop_loss_of_any_three_sets(self, p, q, r):
        seed_everything(0)
        ab, bc, ca = (torch.randn(*shape, 2).double() for shape in ((p, q), (q, r), (r, p)))
        loops = [(ab[a, b] + bc[b, c] + ca[c, a])/3 for a, b, c in product(range(p), range(q), range(r))]
        torch.testing.assert_close(loop_loss(ab, bc, ca), (torch.stack(loops)**2).mean())

    def test_gradients(self):
        "Of both losses, and of the pair head, by finite differences; and of the loop loss by the sum over triples."
        seed_everything(0)
        D, y, a, b = (torch.randn(*shape).double().requires_grad_() for shape in ((5, 5, 2), (5, 2), (5, 3), (2, 3)))
        assert torch.autograd.gradcheck(pair_loss, (D, y))
        assert torch.autograd.gradcheck(lambda D: loop_loss(D, D[:, 3:], D[3:]), (D,))
        assert torch.autograd.gradcheck(PairHead(3, 2, 4).double(), (a, b))
        loops = (D[:, :, None] + D[None, :, 3:] + D[3:].transpose(0, 1)[:, None])/3
        expected, = torch.autograd.grad((loops**2).mean(), D)
        torch.testing.assert_close(torch.autograd.grad(loop_loss(D, D[:, 3:], D[3:]), D)[0], expected)

    @pytest.mark.parametrize("hidden", [0, 5])
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_predictions(self, hidden, outputs):
        "Anchor by anchor."
        method, data, _ = prepared(outputs, hidden=hidden, anchors=7)
        x = data.inputs[data.test].double()
        pairs = zip(method.anchor_inputs, method.anchor_labels)
        said = [torch.stack([.5*written_out(method, row, a) - .5*written_out(method, a, row) + y for row in x]) for a, y in pairs]
        torch.testing.assert_close(anchor_estimates(method, x), torch.stack(said, dim=1))
        torch.testing.assert_close(method.predict(x), torch.stack(said).mean(0))
        views = method.inspect(x, x + 1)
        assert torch.equal(views["pseudo_label"], method.predict(x)) and torch.equal(views["strong_prediction"], method.predict(x + 1))
        assert views.keys() == {"pseudo_label", "strong_prediction"} # the spread over anchors is no variance of the error


class TestClosedLoops:
    def test_differences_close_and_others_do_not(self):
        "Zero for f(a) - f(b), and for nothing near it."
        seed_everything(0)
        f = torch.randn(9, 2).double()
        D = f[:, None] - f
        assert loop_loss(D, D[:, 4:], D[4:]).item() < 1e-30
        for i, j in ((0, 5), (5, 5), (6, 0)):
            E = D.clone()
            E[i, j] += 1e-3
            assert loop_loss(E, E[:, 4:], E[4:]) > 1e-9

    def test_only_labels_differences_matter(self):
        method, _, batch = prepared(hidden=4)
        losses = method.training_step(batch)
        shifted = {**batch, "labelled": {**batch["labelled"], "y": batch["labelled"]["y"] + 7}}
        torch.testing.assert_close(method.training_step(shifted), losses)


class TestLinear:
    def test_predictions_do_not_feel_the_loop_loss(self):
        "Gradient descent on it, on fixed features: F(x, x) goes to zero, and no prediction moves."
        method, data, batch = prepared(widths=())
        x, head = data.inputs[data.test].double(), method.pair_head.pair
        before, values = method.predict(x).detach(), []
        for _ in range(500):
            values.append(method.training_step(batch)["unlabelled"])
            for parameter, gradient in zip(head.parameters(), torch.autograd.grad(values[-1], [*head.parameters()])):
                parameter.data -= 2*gradient
        assert values[-1] < 1e-2*values[0]
        torch.testing.assert_close(method.predict(x), before, rtol=0, atol=1e-12)

    def test_hidden_layer_does_feel_it(self):
        method, data, batch = prepared(widths=(), hidden=8)
        x, parameters = data.inputs[data.test].double(), [*method.pair_head.parameters()]
        before = method.predict(x).detach()
        for parameter, gradient in zip(parameters, torch.autograd.grad(method.training_step(batch)["unlabelled"], parameters)):
            parameter.data -= gradient
        assert (method.predict(x) - before).abs().max() > 1e-4

    def test_antisymmetric_start_is_supervised_regression(self):
        "v = -u and c = 0: no loop loss, and the body's gradient is that of twice the variance of the residuals."
        method, _, batch = prepared()
        head, (features, y) = method.pair_head.pair, (batch["labelled"]["weak"], batch["labelled"]["y"])
        with torch.no_grad():
            head.bias.zero_()
            head.weight[:, 16:] = -head.weight[:, :16]
        losses, parameters = method.training_step(batch), [*method.regressor.body.parameters(), *head.parameters()]
        gradients = torch.autograd.grad(sum(losses.values()), parameters)
        assert losses["unlabelled"].item() < 1e-30 and gradients[-1].abs().max() < 1e-12
        torch.testing.assert_close(gradients[-2][:, :16], -gradients[-2][:, 16:]) # so it stays antisymmetric
        residual = method.regressor.features(features) @ head.weight[:, :16].T - y
        expected = torch.autograd.grad(2*residual.var(correction=0), parameters[:-2])
        torch.testing.assert_close(gradients[:-2], expected)

    def test_all_anchors_of_a_row_differ_alike(self):
        method, data, _ = prepared(anchors=None)
        spread = anchor_estimates(method, data.inputs[data.test].double()).std(1)
        torch.testing.assert_close(spread, spread[:1].expand_as(spread))


class TestAnchors:
    def test_evenly_spaced(self):
        values = np.random.default_rng(0).normal(size=23)
        for count in range(1, 24):
            chosen = evenly_spaced(values, count)
            ranks = values.argsort().argsort()[chosen]
            assert len(set(chosen.tolist())) == count and (np.diff(ranks) >= 23//count).all()
            assert abs(ranks.mean() - 11) <= .5 # as many below as above
        assert set(evenly_spaced(np.zeros(4), 4)) == {0, 1, 2, 3} and len(evenly_spaced(values, 99)) == 23

    @pytest.mark.parametrize("anchors, expected", [(1, 1), (7, 7), (40, 40), (1000, 40), (None, 40)])
    def test_are_labelled_rows_with_their_labels(self, anchors, expected):
        "The plain view, whatever the other views are."
        data = replace(vectors(2), weak=None, strong=None)
        method = TNNR(anchors=anchors).build(mlp(3, (4,), 2))
        assert method.prepare(data) is data
        rows = [np.flatnonzero((data.inputs == row).all(1).numpy()).item() for row in method.anchor_inputs]
        assert len(set(rows)) == expected and set(rows) <= set(data.labelled)
        np.testing.assert_allclose(method.anchor_labels.numpy(), data.normalizer.normalize(data.targets[rows]), atol=1e-6)

    def test_are_in_the_checkpoint(self):
        "A method that was prepared for other rows predicts as the one whose state it loads; and preparing twice changes nothing."
        method, data, _ = prepared(hidden=4, anchors=5)
        fresh = TNNR(hidden=4, anchors=5).build(mlp(3, (16,)))
        fresh.prepare(vectors(seed=1))
        fresh.double().load_state_dict(method.state_dict())
        x, state = data.inputs[data.test].double(), {name: value.float() for name, value in method.state_dict().items()}
        assert torch.equal(fresh.predict(x), method.predict(x))
        method.float().prepare(data)
        assert not differences(dict(method.state_dict()), state)


@pytest.mark.parametrize("hidden", [0, 6])
def test_own_head_is_never_read(hidden):
    "Not trained, not decayed, in no optimiser, and of no influence."
    states = []
    for scale in (1., 100.):
        seed_everything(0)
        method = TNNR(hidden=hidden).build(mlp(3, (16,)))
        method.regressor.head.weight.data *= scale
        before = method.regressor.head.weight.clone()
        run = fit(method, vectors(), SETTINGS, progress=False)
        assert torch.equal(method.regressor.head.weight, before)
        groups = method.optimizers["regressor"].param_groups
        assert [len(group["params"]) for group in groups] == [2, 4 if hidden else 2]
        states.append(({name: value for name, value in method.state_dict().items() if "regressor.head" not in name},
                       run.predictions["y_pred"].to_numpy().tolist()))
    assert not differences(*states)


def test_two_passes_and_no_strong_view():
    "One of each batch, with gradients, in training mode; views that are not needed are not made."
    seed_everything(0)
    method, passes = TNNR().build(mlp(3, (16,))), []
    method.regressor.body.register_forward_hook(lambda module, x, _: passes.append((module.training, torch.is_grad_enabled(), len(x[0]))))
    method.prepare(vectors())
    method.training_step(Streams(vectors(), method.needs, StreamSettings(8, 12), 10, seed=0)[0])
    assert passes == [(True, True, 8), (True, True, 12)]
    fit(TNNR().build(mlp(3, (4,))), vectors(), replace(SETTINGS, epochs=1), progress=False)


def test_predicting_changes_nothing():
    "With batch norm and dropout: the same twice, for one row or for many, and no state has moved."
    seed_everything(0)
    method, data = TNNR(hidden=4).build(small_cnn(width=4, dropout=.5)), digits()
    fit(method, data, replace(SETTINGS, epochs=1, iterations_per_epoch=3), progress=False)
    method.eval()
    before, x = {name: value.clone() for name, value in method.state_dict().items()}, data.inputs[data.test]
    with torch.no_grad(): first, again, alone = method.predict(x), method.predict(x), method.predict(x[:1])
    assert torch.equal(first, again) and not differences(before, dict(method.state_dict()))
    torch.testing.assert_close(alone, first[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 6])
def test_float32_under_autocast(hidden):
    "The body may be low precision; features, differences and losses are not."
    method, data, _ = prepared(hidden=hidden)
    method.float()
    batch = Streams(data, method.needs, StreamSettings(8, 12), 10, seed=0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        losses, predicted = method.training_step(batch), method.predict(data.inputs[data.test])
        features = method.regressor.features(data.inputs[:4])
        inside = method.pair_head(features, features)
    assert {value.dtype for value in (*losses.values(), predicted, inside)} == {torch.float32}
    assert torch.equal(inside, method.pair_head(features, features))


@pytest.mark.parametrize("arguments, message", [
    ({"unlabelled_weight": -1.}, "unlabelled_weight is -1"), ({"unlabelled_weight": float("nan")}, "unlabelled_weight is nan"),
    ({"hidden": -1}, "hidden is -1"), ({"anchors": 0}, "anchors is 0"), ({"anchors": -3}, "anchors is -3")])
def test_out_of_range(arguments, message):
    with pytest.raises(HplError, match=message): TNNR(**arguments)


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("outputs", [1, 2])
def test_learns(hidden, outputs):
    "Two linear functions of three inputs, from 40 labels."
    seed_everything(0)
    settings = replace(SETTINGS, epochs=2, iterations_per_epoch=60)
    run = fit(TNNR(hidden=hidden).build(mlp(3, (32,), outputs)), vectors(outputs), settings, progress=False)
    assert run.metrics["test_r2"] > .9
