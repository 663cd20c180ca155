"Every setting does what it says, and phi's and theta's gradients are those of the formulas, by autograd."
import json
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from small_runs import METHODS, differences, make, on_cpu, vectors  # noqa: F401
from torch import nn

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.hypergrad import Labelled, PseudoLabelled, hypergradient_autograd, sgd_step
from hpl_nb.loss import labelled_loss, pseudo_label_weight, unlabelled_loss
from hpl_nb.methods.core import FullySupervised, PseudoLabel, Released, Supervised, forward_batches
from hpl_nb.methods.hpl import (
    HPL,
    JointUncertainty,
    LearnerInputs,
    batch_weights,
    log_variance_for_theta,
    outer_features,
    step_passes,
    teach,
    unlabelled_slope,
)
from hpl_nb.models import Body, Regressor, mlp, small_cnn
from hpl_nb.settings import as_json, change, digest, from_json, setting_names
from hpl_nb.settings import differences as setting_differences
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train
from hpl_nb.uncertainty import disagreement, learner_input, scaled_features

PAPER, RELEASE = HPL.presets().values()
FAST = change(PAPER, learner_lr=1e-2, unlabelled_weight=1.)
SETTINGS = Train(epochs=3, iterations_per_epoch=10, streams=StreamSettings(8, 8), optimizer=OptimizerSettings(1e-2, 1e-2))


def trained(chosen, data=None, settings=SETTINGS):
    "State after 30 steps."
    seed_everything(0)
    method = chosen.build(mlp(3, (16,), data.outputs if data else 1, dropout=.2))
    run = fit(method, data or vectors(), settings, progress=False)
    return dict(method.state_dict()), run


def weights(settings):
    "Trained weights of theta, and of phi."
    state, _ = trained(settings)
    return ([value for name, value in state.items() if name.startswith(part)] for part in ("regressor", "learner"))


def prepared(settings=FAST, outputs=1):
    "A method in float64 with its optimisers, and a batch: nothing random but the weights."
    seed_everything(0)
    method = settings.build(mlp(3, (16,), outputs)).double()
    method.optimizers = method.make_optimizers(OptimizerSettings())
    return method, in_float64(Streams(vectors(outputs), method.needs, StreamSettings(8, 12), 10, seed=0)[0])


def in_float64(batch):
    return {s: {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()} for s, tensors in batch.items()}


def grads(module): return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


class Own(nn.Module):
    "g of one's own; K is half of what it reads."
    def __init__(self, inputs):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, inputs//2))
        self.spare = nn.Linear(2, 2) # gets no gradient
    def forward(self, pair): return self.layers(pair)

def normed(inputs): return nn.Sequential(nn.Linear(inputs, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, inputs//2))
def flat(inputs): return nn.Sequential(nn.Linear(inputs, 1), nn.Flatten(0))
def still(inputs): return nn.AvgPool1d(inputs)
def changed(changes): return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in changes.items())


CHANGES = {"unlabelled_weight": .3, "learner_lr": 3e-2, "learner_weight_decay": .3, "log_variance_bound": .1, "outer": "previous",
           "outer_overlap": True, "outer_every": 2, "outer_regularizer": .5, "virtual_step": "optimizer", "virtual_lr": .3,
           "learner_first": True, "separate_forward": True, "half_weight": True, "reduction": "sum", "residual_input": True,
           "detach_input": False, "normalize_weights": True, "learner_inputs": "pair+features", "outer_batch": 12, "teacher_decay": .9,
           "learner": Own}


class TestEverySetting:
    "Thirty steps with one setting changed."

    def test_all_are_covered(self):
        assert {*CHANGES, "label", "log_term", "passes", "evaluate", "virtual_eps"} == {*setting_names(PAPER)}

    @pytest.mark.parametrize("name", CHANGES)
    def test_changes_theta_and_phi(self, name):
        for before, after in zip(weights(FAST), weights(change(FAST, **{name: CHANGES[name]}))): assert differences(before, after)

    @pytest.mark.parametrize("detach", [True, False])
    def test_log_term(self, detach):
        "D6: without a gradient through g's input the log term changes nothing, to the bit; with one it does."
        settings = change(FAST, detach_input=detach)
        for before, after in zip(weights(settings), weights(change(settings, log_term=False))):
            assert bool(differences(before, after)) is not detach

    def test_virtual_eps(self):
        "F3: with SGD's virtual step it changes nothing, to the bit; with Adam's it does."
        for step in ("sgd", "optimizer"):
            settings = change(FAST, virtual_step=step, outer_regularizer=0.)
            for before, after in zip(weights(settings), weights(change(settings, virtual_eps="torch"))):
                assert bool(differences(before, after)) is (step == "optimizer")

    def test_label_is_only_a_name(self):
        assert change(FAST, label="mine") == FAST

    def test_log_term_is_logged(self):
        "It is part of the loss that is reported."
        logs = [trained(change(FAST, log_term=on))[1].log for on in (True, False)]
        difference = logs[0]["loss/unlabelled"] - logs[1]["loss/unlabelled"]
        np.testing.assert_allclose(difference, logs[0]["log_variance_mean"], atol=1e-5)

    @pytest.mark.parametrize("name, value", [
        ("outer", "newest"), ("virtual_step", "adam"), ("virtual_eps", "before"), ("reduction", "none"), ("unlabelled_weight", -1.),
        ("unlabelled_weight", float("nan")), ("outer_every", 0), ("log_variance_bound", 0.), ("log_variance_bound", -1.),
        ("normalize_weights", "mean"), ("learner_inputs", "features"), ("outer_batch", 0), ("outer_batch", 2.5), ("passes", 0),
        ("passes", 2), ("teacher_decay", -.1), ("teacher_decay", 1.1), ("teacher_decay", float("nan")), ("evaluate", "teacher"),
        ("learner", lambda inputs: nn.Linear(inputs, 1)), ("learner", partial(Own)), ("learner", Own(2)), ("learner", 3)])
    def test_out_of_range(self, name, value):
        with pytest.raises(HplError, match=f"^{name} is"): change(PAPER, **{name: value})


class TestPhi:
    "phi follows the outer loss after one step of the head: against autograd, in float64."

    @pytest.mark.parametrize("outputs", [1, 2])
    @pytest.mark.parametrize("changes", [
        {}, {"half_weight": True}, {"residual_input": True}, {"reduction": "sum"}, {"unlabelled_weight": .3},
        {"log_variance_bound": None}, {"log_variance_bound": .5}, {"normalize_weights": True}, {"learner": normed},
        {"normalize_weights": True, "half_weight": True, "reduction": "sum"}], ids=changed)
    def test_detached_input(self, changes, outputs):
        "The weights' hypergradient, carried on to phi."
        method, batch = prepared(change(FAST, virtual_lr=.05, **changes), outputs)
        passes, outer = forward_batches(method.regressor, batch), outer_features(method, batch)
        teach(method, passes, outer)
        taught, s = grads(method.learner), method.settings
        z = method.learner(learner_input(passes.prediction, passes.pseudo_label, s.learner.residual_input))
        omega = pseudo_label_weight(z, s.weights.half_weight)/(torch.exp(-z).mean() if s.weights.normalize_weights else 1)
        result = hypergradient_autograd(
            method.regressor.head, partial(sgd_step, learning_rate=.05), Labelled(passes.labelled_features.detach(), passes.y),
            PseudoLabelled(passes.unlabelled_features.detach(), passes.pseudo_label, omega.detach()), outer, s.unlabelled_weight,
            s.reduction)
        expected = torch.autograd.grad(omega, list(method.learner.parameters()), result.weights)
        for actual, correct in zip(taught, expected): torch.testing.assert_close(actual, correct, rtol=1e-9, atol=1e-15)

    @pytest.mark.parametrize("changes", [{}, {"half_weight": True, "residual_input": True}, {"normalize_weights": True}], ids=changed)
    def test_closed_slope_is_autograds_to_the_bit(self, changes):
        "The slope of a detached learner and phi's gradient from it, against a double backward pass; theta's z, against functional_call."
        method, batch = prepared(change(FAST, **changes), 2)
        passes, (s, phi) = forward_batches(method.regressor, batch), (method.settings, [*method.learner.parameters()])
        r, verdict = passes.prediction.detach().requires_grad_(), torch.randn_like(passes.prediction)
        z = method.learner(learner_input(r, passes.pseudo_label, s.learner.residual_input))
        loss = unlabelled_loss(r, passes.pseudo_label, batch_weights(method, z), z, "sum")
        expected = torch.autograd.grad(loss, r, create_graph=True)[0]
        slope = unlabelled_slope(method, passes)
        assert torch.equal(slope, expected)
        assert all(map(torch.equal, torch.autograd.grad(slope, phi, verdict), torch.autograd.grad(expected, phi, verdict)))
        assert torch.equal(log_variance_for_theta(method, passes), z) and not log_variance_for_theta(method, passes).requires_grad

    @pytest.mark.parametrize("outputs", [1, 2])
    @pytest.mark.parametrize("detach", [True, False])
    @pytest.mark.parametrize("changes", [{}, {"log_term": False, "half_weight": True, "residual_input": True, "reduction": "sum"},
                                        {"outer_regularizer": .1}, {"normalize_weights": True},
                                        {"learner": normed, "outer_regularizer": .1},
                                        {"outer_regularizer": .1, "learner_inputs": "pair+features+disagreement"}], ids=changed)
    def test_whole_step_written_down_once_more(self, changes, detach, outputs):
        "Eq. 5, 7, 6 and D1 with one graph from phi to the outer loss, also where the gradient goes through g's input."
        method, batch = prepared(change(FAST, virtual_lr=.05, detach_input=detach, **changes), outputs)
        (passes, further), outer_batch = step_passes(method, batch), outer_features(method, batch)
        teach(method, passes, outer_batch, further)
        (features, y), s = outer_batch, method.settings
        taught, head, learner = grads(method.learner), method.regressor.head, method.learner
        weight, bias = (p.detach().clone().requires_grad_() for p in (head.weight, head.bias))
        r = passes.unlabelled_features.detach() @ weight.T + bias
        z = learner(learner_input(r, passes.pseudo_label, s.learner.residual_input, detach, further))
        omega, kind = pseudo_label_weight(z, s.weights.half_weight), s.reduction
        if s.weights.normalize_weights: omega = omega/torch.exp(-z).mean()
        inner = labelled_loss(passes.labelled_features.detach() @ weight.T + bias, passes.y, kind) + unlabelled_loss(
            r, passes.pseudo_label, omega, z if s.weights.log_term else None, kind)
        steps = torch.autograd.grad(inner, (weight, bias), create_graph=True)
        prediction = features @ (weight - .05*steps[0]).T + bias - .05*steps[1]
        outer = labelled_loss(prediction, y, kind)
        seen = None if further is None else torch.cat([scaled_features(features), disagreement(torch.stack([prediction, y]))], 1)
        outer = outer - s.look_ahead.outer_regularizer*learner(learner_input(prediction, y, s.learner.residual_input, further=seen)).mean()
        expected = torch.autograd.grad(outer, list(learner.parameters()))
        for actual, correct in zip(taught, expected): torch.testing.assert_close(actual, correct, rtol=1e-9, atol=1e-14)

    @pytest.mark.parametrize("settings", [
        PAPER, RELEASE, change(PAPER, detach_input=False), change(PAPER, detach_input=False, reduction="sum")],
        ids=["paper", "release", "attached", "attached, sum"])
    def test_theta_s_loss_gives_phi_nothing(self, settings):
        "And the teaching gives theta nothing."
        method, batch = prepared(settings)
        losses = method.training_step(batch)
        assert all(gradient is None for gradient in grads(method.regressor))
        before = grads(method.learner)
        sum(losses.values()).backward()
        assert not differences(before, grads(method.learner)) and all(gradient is not None for gradient in grads(method.regressor))
        if not settings.look_ahead.learner_first: assert any(gradient.abs().max() > 0 for gradient in before)

    @pytest.mark.parametrize("first", [True, False])
    def test_learner_first(self, first):
        "D4: the weights of theta's own step are those of the new phi, or of the old one."
        method, batch = prepared(change(FAST, learner_first=first))
        old = [p.detach().clone() for p in method.learner.parameters()]
        losses = method.training_step(batch)
        assert bool(differences(old, list(method.learner.parameters()))) is first
        passes = forward_batches(method.regressor, batch)
        z = method.learner(learner_input(passes.prediction, passes.pseudo_label)) # by phi as it is now
        assert torch.equal(method.record["log_variance"], z) and torch.equal(method.record["weight"], torch.exp(-z))
        torch.testing.assert_close(losses["unlabelled"], unlabelled_loss(passes.prediction, passes.pseudo_label, torch.exp(-z), z))

    def test_nothing_is_learned_without_unlabelled_loss(self):
        method, batch = prepared(change(FAST, unlabelled_weight=0.))
        method.training_step(batch)
        assert all((gradient == 0).all() for gradient in grads(method.learner))


class TestBeyondThePaper:
    "Choices that neither the text nor the release has."

    @pytest.mark.parametrize("settings, error, spread", [(PAPER, 12.172258, .786459), (RELEASE, 10.80422, .346831)], ids=["paper", "code"])
    def test_presets_are_as_before(self, settings, error, spread):
        "What thirty steps of the presets gave before there was any of them; the release since its masks have its order, at lambda 2."
        _, run = trained(change(settings, learner_lr=1e-2))
        assert run.log["val_mse"].iloc[-1] == pytest.approx(error, rel=1e-4)
        assert run.log["log_variance_sd"].iloc[-1] == pytest.approx(spread, rel=1e-3)

    @pytest.mark.parametrize("half", [True, False])
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_normalised_weights_have_mean_one(self, outputs, half):
        "Or one half; they stand in the relation of exp(-z), and it does not matter what is added to z."
        method, batch = prepared(change(FAST, normalize_weights=True, half_weight=half, log_variance_bound=None), outputs)
        method.training_step(batch)
        weight, z = method.record["weight"], method.record["log_variance"]
        torch.testing.assert_close(weight.mean(), torch.tensor(.5 if half else 1., dtype=torch.float64))
        torch.testing.assert_close(weight/weight[0], torch.exp(z[0] - z))
        with torch.no_grad(): method.learner.layers[2].bias += 3.
        method.training_step(batch)
        torch.testing.assert_close(method.record["weight"], weight)

    def test_normalised_weights_leave_lambda_alone(self):
        "The gradient in a common shift of all z is zero: g cannot turn the unlabelled loss up or down."
        method, batch = prepared(change(FAST, normalize_weights=True, log_variance_bound=None))
        method.training_step(batch)
        shift, others = method.learner.layers[2].bias.grad, method.learner.layers[2].weight.grad
        assert shift.abs().max() < 1e-12*others.abs().max()

    def test_teacher_without_memory_is_the_student(self):
        "Decay 0, to the bit (no batch norm); a decay of its own is another training."
        for before, after, slow in zip(*(weights(change(FAST, teacher_decay=decay)) for decay in (None, 0., .9))):
            assert not differences(before, after) and differences(before, slow)

    @pytest.mark.parametrize("measured", ["student", "teacher"])
    def test_teacher_labels_and_is_measured(self, measured):
        seed_everything(0)
        method = change(FAST, teacher_decay=.9, evaluate=measured).build(mlp(3, (16,)))
        fit(method, vectors(), SETTINGS, progress=False)
        x = torch.randn(5, 3)
        with torch.no_grad():
            student, teacher, views, predicted = method.regressor(x), method.teacher(x), method.inspect(x, -x), method.predict(x)
            assert torch.equal(views["pseudo_label"], teacher) and torch.equal(views["strong_prediction"], method.regressor(-x))
        assert torch.equal(predicted, teacher if measured == "teacher" else student) and not torch.equal(student, teacher)
        assert not any(parameter.requires_grad for parameter in method.teacher.parameters())

    def test_outer_batch(self):
        "As large as the inner one is the default, to the bit; larger ones come as large as they are wanted."
        for before, after in zip(weights(FAST), weights(change(FAST, outer_batch=8))): assert not differences(before, after)
        method = change(FAST, outer_batch=20).build(mlp(3))
        batch = Streams(vectors(), method.needs, method.stream_settings(StreamSettings(8, 12)), 10, seed=0)[0]
        assert {stream: len(tensors["index"]) for stream, tensors in batch.items()} == {"labelled": 8, "unlabelled": 12, "outer": 20}
        with pytest.raises(HplError, match="previous"): change(FAST, outer_batch=20, outer="previous")

    @pytest.mark.parametrize("teacher", [None, .9])
    @pytest.mark.parametrize("inputs", get_args(LearnerInputs))
    def test_inspect_sees_what_training_saw(self, inputs, teacher):
        method, batch = prepared(change(FAST, learner_inputs=inputs, teacher_decay=teacher), outputs=2)
        method.training_step(batch)
        with torch.no_grad(): views = method.inspect(batch["unlabelled"]["weak"], batch["unlabelled"]["strong"])
        for name, values in views.items(): torch.testing.assert_close(values, method.record[name])

    def test_disagreement_of_two_networks(self):
        "Of both views; more passes need dropout."
        method, batch = prepared(change(FAST, learner_inputs="pair+disagreement", teacher_decay=.9), outputs=2)
        with torch.no_grad():
            for parameter in method.teacher.parameters(): parameter += .1
            views = [batch["unlabelled"][view] for view in ("weak", "strong")]
            predictions = torch.stack([network(view) for network in (method.regressor, method.teacher) for view in views])
        torch.testing.assert_close(step_passes(method, batch)[1], torch.log10(predictions.std(0, correction=0) + 1e-3))
        several = change(FAST, learner_inputs="pair+disagreement", passes=3)
        with pytest.raises(HplError, match="dropout"): fit(several.build(mlp(3)), vectors(), SETTINGS, progress=False)
        for one, more in zip(weights(change(several, passes=1)), weights(several)): assert differences(one, more)

    def test_features_are_another_input(self):
        "g without the pair's help: two samples of the same pair and other features get another z, and phi learns from them."
        method, batch = prepared(change(FAST, learner_inputs="pair+features"))
        passes, further = step_passes(method, batch)
        torch.testing.assert_close(further, scaled_features(passes.unlabelled_features))
        assert not further.requires_grad and method.learner.layers[0].in_features == 2 + 16
        method.training_step(batch)
        assert (method.learner.layers[0].weight.grad.abs().sum(0) > 0).all()

    def test_named_constructor_sets_them(self):
        given = dict(normalize_weights=True, learner_inputs="pair+features", outer_batch=64, teacher_decay=.97, evaluate="teacher")
        assert HPL.paper(**given) == change(PAPER, **given) and HPL.paper() == HPL() and HPL.paper(label="mine").label == "mine"
        assert HPL.paper(outer_every=5, log_term=False, log_variance_bound=None).label == (
            "paper, outer_every=5, log_term=false, log_variance_bound=none")


class TestSuited:
    "What the release chose by dataset."
    stsb = Released(unlabelled_weight=.5, outer_regularizer=1., learner_weight_decay=1e-5)

    def test_paper_takes_the_weight_alone(self):
        assert PAPER.suited_to(self.stsb) == change(PAPER, unlabelled_weight=.5)
        assert JointUncertainty().suited_to(self.stsb) == JointUncertainty(.5)

    def test_release_takes_all_and_doubles_the_weight(self):
        assert RELEASE.suited_to(self.stsb) == change(RELEASE, unlabelled_weight=1., outer_regularizer=1., learner_weight_decay=1e-5)
        assert HPL.release(half_weight=False).suited_to(self.stsb).unlabelled_weight == .5

    def test_what_is_given_stays(self):
        given = HPL.release(unlabelled_weight=3., outer_regularizer=.2, learner_weight_decay=0.)
        assert given.suited_to(self.stsb) == given and given.suited_to(self.stsb).title == (
            "HPL (release, unlabelled_weight=3.0, outer_regularizer=0.2, learner_weight_decay=0.0)")

    def test_alone(self):
        s = RELEASE.build(mlp(3)).settings
        assert (s.unlabelled_weight, s.look_ahead.outer_regularizer, s.learner.learner_weight_decay) == (2., .1, 0.)

    def test_candidates_of_the_search(self):
        assert [c.unlabelled_weight for c in PAPER.candidates()] == [.3, .6, 1., 2.]
        assert [c.unlabelled_weight for c in RELEASE.candidates()] == [.6, 1.2, 2., 4.]
        assert {c.learner.learner_lr for c in RELEASE.candidates()} == {c.learner_lr for c in JointUncertainty().candidates()} == {1e-3}

    def test_json(self):
        for value in (RELEASE, FAST, JointUncertainty(2.)): assert from_json(as_json(value), HPL, JointUncertainty) == value


class TestOwnLearner:
    "learner= takes a class or function; its name stands in label, JSON and hash."
    NAME = f"{__name__}.Own"

    def test_name(self):
        mine = HPL.paper(learner=Own)
        assert mine.title == f"HPL (paper, learner={self.NAME})" and as_json(mine)["learner"]["learner"] == self.NAME
        assert len({digest(each) for each in (mine, PAPER, HPL.paper(learner=normed), change(JointUncertainty(), learner=Own))}) == 4
        assert change(RELEASE, learner=Own).learner == change(RELEASE.learner, learner=Own) # the preset's other choices stay

    def test_hashes_of_stored_runs(self):
        "As they were before there was such a setting."
        assert [digest(each) for each in (PAPER, RELEASE, JointUncertainty())] == ["f3b02123", "bcdc13c5", "413be4d8"]

    def test_json(self):
        "A file has the name; the class must be given again."
        for mine in (HPL.paper(learner=Own), JointUncertainty(learner=Own)):
            read = from_json(json.loads(json.dumps(as_json(mine))), HPL, JointUncertainty)
            assert not setting_differences(read, mine) and digest(read) == digest(mine) and change(read, learner=Own) == mine
            with pytest.raises(HplError, match=f"learner is '{self.NAME}', the name of a class .* load"): read.build(mlp(3))

    def test_bound_and_start(self):
        method = HPL.paper(learner=Own, log_variance_bound=.1).build(mlp(3))
        assert isinstance(method.learner.layers, Own) and (method.learner(100*torch.randn(50, 2)).abs() <= .1).all()
        assert method.learner.training and method.learner(torch.zeros(2, 2, dtype=torch.bfloat16)).dtype == torch.float32

    @pytest.mark.parametrize("chosen", [HPL.paper(learner=normed), HPL.release(learner=Own), JointUncertainty(learner=Own),
                                        HPL.paper(learner=Own, outer="previous", normalize_weights=True)], ids=lambda each: each.title)
    def test_learns_and_resumes(self, chosen, tmp_path):
        def run(folder, stop=None):
            seed_everything(0)
            method = change(chosen, learner_lr=1e-2).build(mlp(3, (16,)))
            start = method.state_dict()[first].clone()
            fit(method, vectors(), SETTINGS, folder=tmp_path/folder, stop_after=stop, progress=False)
            return start, dict(method.state_dict())
        first = "learner.layers.0.weight" if "normed" in chosen.title else "learner.layers.layers.0.weight"
        start, whole = run("whole")
        assert not whole[first].equal(start)
        assert differences(run("parts", 13)[1], whole) and not differences(run("parts")[1], whole)

    @pytest.mark.parametrize("make, message", [
        (flat, r"flat called with 2 gives shape \(2,\) for two rows of 2 inputs; it must be \(2, 1\)"),
        (still, "has no parameters that could"),
        (int, r"learner=builtins.int called with 2 fails \(.*\); give a class or function that builds an nn.Module")])
    def test_refused_before_training(self, make, message):
        with pytest.raises(HplError, match=message): HPL.paper(learner=make).build(mlp(3))


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("outputs", [1, 2])
def test_theta_s_gradient_is_that_of_eq_5(detach, outputs):
    "With phi fixed; an attached input adds the way through g (D9)."
    method, batch = prepared(change(FAST, detach_input=detach, unlabelled_weight=.7), outputs)
    sum(method.training_step(batch).values()).backward()
    actual, passes = grads(method.regressor), forward_batches(method.regressor, batch)
    pair = torch.cat([passes.prediction.detach() if detach else passes.prediction, passes.pseudo_label], 1)
    z = method.learner(pair)
    loss = ((passes.labelled_prediction - passes.y)**2).mean() + .7*((-z).exp()*(passes.prediction - passes.pseudo_label)**2 + z).mean()
    expected = torch.autograd.grad(loss, list(method.regressor.parameters()))
    for gradient, correct in zip(actual, expected): torch.testing.assert_close(gradient, correct, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("outputs", [1, 2])
def test_joint_uncertainty_follows_eq_3(outputs):
    "Theta and phi with the gradient of one loss, written down once more."
    method, batch = prepared(JointUncertainty(), outputs)
    sum(method.training_step(batch).values()).backward()
    actual, passes = grads(method), forward_batches(method.regressor, batch)
    z = method.learner(torch.cat([passes.prediction, passes.pseudo_label], 1).detach())
    loss = ((passes.labelled_prediction - passes.y)**2).mean() + ((-z).exp()*(passes.prediction - passes.pseudo_label)**2 + z).mean()
    expected = torch.autograd.grad(loss, list(method.parameters()))
    for gradient, correct in zip(actual, expected): torch.testing.assert_close(gradient, correct, rtol=1e-9, atol=1e-15)
    assert [group["lr"] for group in method.optimizers["regressor"].param_groups] == [1e-4, 1e-3, 1e-4]


def test_without_unlabelled_loss_all_are_supervised():
    "Lambda = 0: the same weights to the bit, although the other rows went through the network (it has no batch norm and no dropout)."
    def weights(chosen):
        seed_everything(0)
        fit(method := chosen.build(mlp(3, (16,))), vectors(), SETTINGS, progress=False)
        return dict(method.regressor.state_dict())
    expected = weights(Supervised())
    for other in (PseudoLabel, JointUncertainty, HPL): assert not differences(expected, weights(other(unlabelled_weight=0.)))


class TestCost:
    "Forward passes of the body, counted."

    @pytest.mark.parametrize("chosen, expected", [
        (Supervised(), [1]*6), (PseudoLabel(), [3]*6), (JointUncertainty(), [3]*6), (PAPER, [4]*6),
        (change(PAPER, outer="previous"), [3]*6), (RELEASE, [7, 3, 3, 3, 3, 7]*2), (change(PAPER, outer_every=4), [4, 3, 3, 3, 4, 3]*2)],
        ids=["Supervised", "PseudoLabel", "JointUncertainty", "fresh", "previous", "release", "fresh, each fourth"])
    def test_forward_passes(self, chosen, expected):
        "Of one or two epochs of six steps: each teaches phi at its first step (F2)."
        seed_everything(0)
        method = chosen.build(mlp(3, (4,)))
        calls, counts = [], []
        method.regressor.body.register_forward_hook(lambda module, *_: calls.append(module.training))
        after = method.after_step
        def after_step():
            counts.append(sum(calls)) # those in training mode
            calls.clear()
            after()
        method.after_step = after_step
        fit(method, vectors(), replace(SETTINGS, epochs=len(expected)//6, iterations_per_epoch=6), progress=False)
        assert counts == expected

    def test_no_graph_through_views_that_need_none(self):
        "The weak view and the outer batch run without gradients."
        method, batch = prepared()
        modes = []
        method.regressor.body.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
        method.training_step(batch)
        assert sorted(modes) == [False, False, True, True]


class TestOuterBatch:
    def rows(self, settings):
        "Rows of the inner and the outer batch at each step."
        method, seen = settings.build(mlp(3, (4,))), []
        step = method.training_step
        def training_step(batch):
            seen.append((set(batch["labelled"]["index"].tolist()), set(batch["outer"]["index"].tolist())))
            return step(batch)
        method.training_step = training_step
        fit(method, vectors(), SETTINGS, progress=False)
        return seen

    def test_fresh_never_overlaps(self):
        assert all(not inner & outer for inner, outer in self.rows(PAPER)) and len(self.rows(PAPER)) == 30

    def test_release_may_overlap(self):
        assert any(inner & outer for inner, outer in self.rows(RELEASE))

    def test_previous_remembers_the_step_before(self):
        "The features that judge a step are those that the step before has computed; at the first step nothing is learned."
        method, _ = prepared(change(FAST, outer="previous"))
        batches, memories = Streams(vectors(), method.needs, StreamSettings(8, 8), 10, seed=0), []
        for step in range(3):
            batch = in_float64(batches[step])
            features = method.regressor.features(batch["labelled"]["weak"]).detach()
            if step: assert all(torch.equal(*pair) for pair in zip(outer_features(method, batch), memories[-1]))
            else: assert outer_features(method, batch) is None
            sum(method.training_step(batch).values()).backward()
            assert (method.learner.layers[0].weight.grad is not None) is (step > 0)
            for optimizer in method.optimizers.values(): optimizer.step()
            for optimizer in method.optimizers.values(): optimizer.zero_grad()
            method.after_step()
            memories.append((features, batch["labelled"]["y"]))


@pytest.mark.parametrize("bound", [.5, 8., None])
def test_log_variance_bound(bound):
    "However hard it is pushed, z stays within the bound, in training and in the predictions table."
    settings = change(FAST, learner_lr=.5, outer_regularizer=100., log_variance_bound=bound)
    method = settings.build(mlp(3, (16,)))
    data = replace(vectors(), normalizer=None)
    run = fit(method, data, SETTINGS, progress=False)
    predicted = run.predictions["log_variance"] - 2*np.log(data.normalizer.scale[0]) # of the table, in normalised units
    largest = max(predicted.abs().max(), method.record["log_variance"].abs().max().item())
    assert largest > .99*(bound or 8) and (bound is None or largest <= bound*(1 + 1e-6))


LOG = {"epoch", "step", "val_mae", "val_mse", "val_r2", "seconds", "loss/labelled"}
SPREAD = {"log_variance_mean", "log_variance_sd", "weight_mean", "spearman_residual", "spearman_error"}


@pytest.mark.parametrize("name", METHODS)
def test_log_columns(name):
    "Losses and validation of all; mean and spread of z, mean weight and both rank correlations where there is a learner."
    run = fit(make(name, regressor=partial(mlp, 3, (16,), dropout=.1)), vectors(), SETTINGS, progress=False)
    expected = LOG | (set() if name == "Supervised" else {"loss/unlabelled"})
    if "HPL" in name or name == "JointUncertainty": expected |= SPREAD
    assert expected <= set(run.log), expected - set(run.log)
    assert len(run.log) == 3 and run.log[sorted(expected)].notna().all(axis=None) and np.isfinite(run.log.to_numpy(float)).all()
    assert list(run.log["step"]) == [10, 20, 30]


def test_log_agrees_with_what_training_used():
    "The epoch's mean log-variance, weight and rank correlations, from the values of every step."
    seen, method = [], make("HPL paper", regressor=partial(mlp, 3, (16,)))
    after = method.after_step
    def after_step():
        seen.append({name: value.clone() for name, value in method.record.items()})
        after()
    method.after_step, data = after_step, vectors()
    run = fit(method, data, replace(SETTINGS, epochs=1), progress=False)
    values = {name: torch.cat([record[name] for record in seen]) for name in seen[0]}
    assert {name: tuple(value.shape) for name, value in values.items()} == {"index": (80,)} | dict.fromkeys(
        ("pseudo_label", "strong_prediction", "log_variance", "weight"), (80, 1))
    row, y = run.log.iloc[0], torch.from_numpy(data.normalizer.normalize(data.targets[values["index"]]))
    assert row["log_variance_mean"] == pytest.approx(values["log_variance"].mean().item(), rel=1e-5)
    assert row["weight_mean"] == pytest.approx(values["weight"].mean().item(), rel=1e-5)
    for column, other in (("spearman_residual", values["strong_prediction"]), ("spearman_error", y)):
        ranks = [value.flatten().argsort().argsort().double() for value in (values["log_variance"], (other - values["pseudo_label"]).abs())]
        assert row[column] == pytest.approx(torch.corrcoef(torch.stack(ranks))[0, 1].item(), abs=1e-3)


def test_fully_supervised_uses_all_training_rows():
    "As `Supervised` on data where all rows are labelled."
    data = vectors()
    every = replace(data, labelled=np.concatenate([data.labelled, data.unlabelled]), unlabelled=data.unlabelled[:0])
    expected, run = trained(Supervised(), every)
    actual, _ = trained(FullySupervised(), data)
    assert not differences(expected, actual) and set(run.predictions["split"]) == {"labelled", "val", "test"}
    targets = data.targets.copy()
    targets[data.unlabelled[5]] = float("nan")
    with pytest.raises(HplError, match="needs the true labels"): trained(FullySupervised(), replace(data, targets=targets))


def test_inspecting_asks_no_other_row_and_no_other_process():
    "Also with weights of mean one: processes inspect different numbers of batches, and would wait for each other for ever."
    def never(tensor): raise AssertionError("a process would wait for the others")
    method = HPL.paper(normalize_weights=True).build(small_cnn(width=4)).eval()
    method.reduce = never
    x = torch.randn(6, 1, 16, 16)
    with torch.no_grad(): together, alone = method.inspect(x, x), method.inspect(x[:2], x[:2])
    for name, values in together.items(): torch.testing.assert_close(values[:2], alone[name])


def own(head, *layers):
    "A network of one's own whose head is replaced after it was built."
    network = Regressor(Body(nn.Sequential(nn.Linear(3, 5), *layers), 5), nn.Linear(5, 1))
    network.head = head
    return network


@pytest.mark.parametrize("chosen", [PAPER, RELEASE, JointUncertainty()], ids=["paper", "release", "JointUncertainty"])
@pytest.mark.parametrize("network, what", [(lambda: nn.Linear(3, 1), "no head"), (lambda: own(None), "no head"),
                                           (lambda: own(nn.Sequential(nn.Linear(5, 1))), "a head of type Sequential"),
                                           (lambda: own(nn.Linear(5, 1, bias=False)), "a head of type Linear")],
                         ids=["network alone", "none", "not linear", "no bias"])
def test_head_of_ones_own(chosen, network, what):
    "Refused when the method is built, with what to write instead."
    with pytest.raises(HplError, match=f"the network has {what}, and this method needs an nn.Linear with a bias. Build it with as_reg"):
        chosen.build(network())


@pytest.mark.parametrize("chosen", [PAPER, RELEASE, change(PAPER, outer="previous"), change(PAPER, normalize_weights=True)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (4, 1)], ids=str)
def test_batches_of_one_row(chosen, sizes):
    "They train; batch norm, which cannot, is named with the settings that help."
    settings = replace(SETTINGS, epochs=1, streams=StreamSettings(*sizes))
    assert np.isfinite(fit(chosen.build(mlp(3, (4,))), vectors(), settings, progress=False).metrics["test_mae"])
    with pytest.raises(HplError, match="batch norm needs two. Raise labelled_batch, unlabelled_batch or outer_batch"):
        fit(chosen.build(own(nn.Linear(5, 1), nn.BatchNorm1d(5))), vectors(), settings, progress=False)


@pytest.mark.parametrize("overlap, rows", [(True, 41), (True, 1000), (False, 33), (False, 41)])
def test_outer_batch_of_more_rows_than_there_are(overlap, rows):
    "The largest outer batch trains: all 40 labelled rows, or those that the inner batch of 8 leaves."
    chosen = change(PAPER, outer_batch=rows, outer_overlap=overlap)
    with pytest.raises(HplError, match="40 labelled rows are fewer than .* lower (outer_batch|labelled_batch)"):
        fit(chosen.build(mlp(3)), vectors(), SETTINGS, progress=False)
    largest = change(chosen, outer_batch=40 if overlap else 32)
    assert fit(largest.build(mlp(3)), vectors(), replace(SETTINGS, epochs=1), progress=False).finished
