"The teacher is the average that the formula says, has statistics of its own and no gradient, and the limiting cases hold to the bit."
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from small_runs import SETTINGS, differences, digits, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.core import PseudoLabel, Released, Supervised
from hpl_nb.methods.mean_teacher import MeanTeacher
from hpl_nb.models import mlp, small_cnn
from hpl_nb.training.loop import fit
from hpl_nb.training.state import Clock, OptimizerSettings


def dense(): return mlp(3, (16,))


def trained(make, regressor=dense, data=vectors, settings=SETTINGS, after_step=None):
    "A method after 15 steps; `after_step(method)` is called after each."
    seed_everything(0)
    method = make(regressor())
    if after_step:
        own = method.after_step
        method.after_step = lambda: (own(), after_step(method))
    fit(method, data(), replace(settings, record_every=0), progress=False)
    return method


def flat(module): return torch.cat([p.detach().flatten() for p in module.parameters()]).double()


def prepared(outputs=2, **kwargs):
    "A method in float64 whose teacher is not the student, and a batch."
    seed_everything(0)
    method = MeanTeacher(**kwargs).build(mlp(3, (16,), outputs)).double()
    for p in method.teacher.parameters(): p += .1*torch.randn_like(p)
    batch = Streams(vectors(outputs), method.needs, StreamSettings(8, 12), 10, seed=0)[0]
    return method, {s: {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()} for s, tensors in batch.items()}


class TestTeacher:
    @pytest.mark.parametrize("decay", [0., .3, .9, .99, 1.])
    def test_is_the_average_of_the_student(self, decay):
        "The recursion as the original counts it, from the weights at the start; with alpha = 1 it is the mean of all."
        students, teachers = [], []
        def keep(method):
            students.append(flat(method.regressor))
            teachers.append(flat(method.teacher))
        trained(MeanTeacher(decay=decay).build, after_step=keep)
        seed_everything(0)
        average = start = flat(dense())
        for step, student in enumerate(students, 1):
            alpha = min(1 - 1/(step + 1), decay)
            average = alpha*average + (1 - alpha)*student
            torch.testing.assert_close(teachers[step - 1], average, rtol=1e-5, atol=1e-6)
        if decay == 1: torch.testing.assert_close(teachers[-1], torch.stack([start, *students]).mean(0), rtol=1e-5, atol=1e-6)

    def test_has_running_statistics_of_its_own(self):
        "Of the first batch norm: those of what its own convolution makes of the weak views, and not the student's."
        inputs, seen = [], []
        def make(regressor):
            method = MeanTeacher(decay=.5).build(regressor)
            first = method.teacher.body.network[2]
            first.register_forward_pre_hook(lambda layer, x: inputs.append(x[0].detach().clone()) if layer.training else None)
            return method
        method = trained(make, partial(small_cnn, width=4), digits, after_step=lambda method: seen.append(len(inputs)))
        assert seen == [*range(1, 16)]
        mean, variance = torch.zeros(4), torch.ones(4)
        for x in inputs[:method.teacher.body.network[2].num_batches_tracked]: # `fit` leaves the state of the selected epoch
            mean, variance = .9*mean + .1*x.mean((0, 2, 3)), .9*variance + .1*x.var((0, 2, 3))
        own, student = (network.body.network[2] for network in (method.teacher, method.regressor))
        torch.testing.assert_close(own.running_mean, mean)
        torch.testing.assert_close(own.running_var, variance)
        assert not torch.allclose(own.running_mean, student.running_mean)

    def test_is_in_no_optimizer(self):
        method = MeanTeacher().build(mlp(3, (4,)))
        trained_ones = {id(p) for o in method.make_optimizers(OptimizerSettings()).values() for g in o.param_groups for p in g["params"]}
        assert trained_ones == {id(p) for p in method.regressor.parameters()}
        assert {name.split(".")[0] for name in method.state_dict()} == {"regressor", "teacher"}

    def test_micro_batches_are_one_step(self):
        "The teacher moves once a step, however many parts the batch is cut into."
        whole, cut = (trained(MeanTeacher().build, settings=replace(SETTINGS, accumulate=parts)) for parts in (1, 2))
        torch.testing.assert_close(flat(cut.teacher), flat(whole.teacher), rtol=1e-4, atol=1e-6)


class TestStep:
    @pytest.mark.parametrize("outputs", [1, 2])
    @pytest.mark.parametrize("step, ramp_share, ramp", [
        (0, .5, math.exp(-5)), (10, .5, math.exp(-5*.8**2)), (50, .5, 1.), (90, .5, 1.), (0, 0., 1.), (50, 2., math.exp(-5*.75**2))])
    def test_losses_and_gradient(self, step, ramp_share, ramp, outputs):
        "As written: w(t) times the mean squared difference, whose gradient is in the student alone."
        method, batch = prepared(outputs, unlabelled_weight=.7, ramp_share=ramp_share)
        method.clock = Clock(step, 100, 10)
        losses = method.training_step(batch)
        student, labelled, unlabelled = method.regressor, batch["labelled"], batch["unlabelled"]
        target = method.teacher(unlabelled["weak"]).numpy()
        expected = {"labelled": ((student(labelled["weak"]) - labelled["y"])**2).sum()/(8*outputs),
                    "unlabelled": .7*ramp*((student(unlabelled["strong"]) - torch.from_numpy(target))**2).sum()/(12*outputs)}
        assert losses.keys() == expected.keys()
        for name in losses: torch.testing.assert_close(losses[name], expected[name], rtol=1e-12, atol=0)
        sum(losses.values()).backward()
        gradient = torch.autograd.grad(sum(expected.values()), list(student.parameters()))
        for p, correct in zip(student.parameters(), gradient): torch.testing.assert_close(p.grad, correct, rtol=1e-9, atol=1e-14)
        assert all(p.grad is None for p in method.teacher.parameters())
        assert torch.equal(method.record["weight"], torch.full((12, outputs), ramp, dtype=torch.float64))
        assert torch.equal(method.record["pseudo_label"], torch.from_numpy(target))

    def test_forward_passes(self):
        "Two of the student, with gradient; one of the teacher, first and without."
        method, batch = prepared()
        order = []
        for name in ("regressor", "teacher"):
            getattr(method, name).body.register_forward_hook(lambda *_, name=name: order.append((name, torch.is_grad_enabled())))
        method.training_step(batch)
        assert order == [("teacher", False), ("regressor", True), ("regressor", True)]


class TestLimits:
    def test_without_decay_it_is_pseudo_label(self):
        "With batch norm and dropout: the student's weights to the bit, at every step; the teacher is the student."
        weights, net = {PseudoLabel: [], MeanTeacher: []}, partial(small_cnn, width=4, dropout=.2)
        keep = lambda method: weights[type(method.settings)].append(flat(method.regressor)) # noqa: E731
        trained(PseudoLabel().build, net, digits, after_step=keep)
        method = trained(MeanTeacher(decay=0., ramp_share=0.).build, net, digits, after_step=keep)
        assert not differences(*weights.values()) and len(weights[PseudoLabel]) == 15
        assert torch.equal(flat(method.teacher), flat(method.regressor))

    def test_without_unlabelled_loss_it_is_supervised(self):
        student, supervised = trained(MeanTeacher(unlabelled_weight=0.).build), trained(Supervised().build)
        assert not differences(dict(student.regressor.state_dict()), dict(supervised.regressor.state_dict()))


class TestPredictions:
    @pytest.mark.parametrize("evaluate", ["teacher", "student"])
    def test_of_whom(self, evaluate):
        "And they change nothing, and a row's does not depend on the others."
        method = trained(MeanTeacher(evaluate=evaluate).build, partial(small_cnn, width=4, dropout=.5), digits).eval()
        before, (weak, strong) = tensors(method), torch.rand(2, 9, 1, 16, 16)
        with torch.no_grad():
            first, seen = method.predict(weak), method.inspect(weak, strong)
            teacher, student = method.teacher(weak), method.regressor(weak)
            torch.testing.assert_close(method.predict(weak[3:5]), first[3:5])
            assert torch.equal(first, {"teacher": teacher, "student": student}[evaluate]) and not torch.equal(teacher, student)
            assert torch.equal(seen["pseudo_label"], teacher) and torch.equal(seen["strong_prediction"], method.regressor(strong))
        assert not differences(before, tensors(method))

    def test_whose_are_measured_does_not_change_training(self):
        settings = replace(SETTINGS, epochs=1)
        teacher, student = (trained(MeanTeacher(evaluate=evaluate).build, settings=settings) for evaluate in ("teacher", "student"))
        assert torch.equal(flat(teacher), flat(student))


def tensors(method): return {name: value.clone() for name, value in method.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("argument, value", [
    ("decay", -.1), ("decay", 1.1), ("decay", float("nan")), ("ramp_share", -1.), ("unlabelled_weight", -1.), ("evaluate", "both")])
def test_bad_arguments_are_refused(argument, value):
    with pytest.raises(HplError, match=argument): MeanTeacher(**{argument: value})


def test_candidates_and_the_dataset_s_weight():
    "The search tries another decay and two weights; a weight that is given stays."
    assert MeanTeacher().suited_to(Released(unlabelled_weight=5.)) == MeanTeacher(5.)
    assert MeanTeacher().candidates() == [MeanTeacher(1.), MeanTeacher(1., decay=.97), MeanTeacher(.5), MeanTeacher(2.)]
    assert MeanTeacher(.3).suited_to(Released(unlabelled_weight=5.)) == MeanTeacher(.3)
