"UPSReg's pseudo-labels and weights are those of NumPy, and its limits are methods without selection."
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import SETTINGS, differences, digits, inspected, noisy_cnn, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.core import PseudoLabelMethod, dropout_features
from hpl_nb.methods.ups import UPSReg, agreement
from hpl_nb.models import mlp
from hpl_nb.settings import as_json
from hpl_nb.training.loop import fit
from hpl_nb.training.state import Train


class MeanOfPasses(PseudoLabelMethod):
    "Ten passes, no selection."
    def guess(self, weak): return self.regressor.head(dropout_features(self.regressor, weak, 10)).mean(0)


def first_batch(outputs=1):
    return Streams(vectors(outputs), PseudoLabelMethod.needs, StreamSettings(8, 12), 1, seed=0)[0]


def small(outputs=1, **kwargs):
    seed_everything(0)
    return UPSReg(**kwargs).build(mlp(3, (16,), outputs, dropout=.3))


def trained(build, data=None):
    "State after 20 steps on a network with dropout."
    seed_everything(0)
    method = build(mlp(3, (16,), data.outputs if data else 1, dropout=.2))
    fit(method, data or vectors(), Train(epochs=2, iterations_per_epoch=10, streams=StreamSettings(8, 8)), progress=False)
    return dict(method.state_dict())


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_step_by_numpy(outputs):
    "Mean, sample standard deviation and loss, on the same dropout masks; each output is selected for itself."
    method, batch = small(outputs, unlabelled_weight=.7, passes=6), first_batch(outputs)
    seed_everything(1)
    guesses = torch.stack([method.regressor(batch["unlabelled"]["weak"]) for _ in range(6)]).detach().numpy()
    method.settings = replace(method.settings, threshold=float(np.median(guesses.std(0, ddof=1))))
    seed_everything(1)
    loss = method.training_step(batch)["unlabelled"].item()
    record = {name: values.numpy() for name, values in method.record.items()}
    np.testing.assert_allclose(record["pseudo_label"], guesses.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(record["weight"], guesses.std(0, ddof=1) < method.settings.threshold)
    assert 0 < record["weight"].mean() < 1
    squared = (record["strong_prediction"] - guesses.mean(0))**2
    assert loss == pytest.approx(.7*(record["weight"]*squared).sum()/(12*outputs), rel=1e-4)


def test_left_out_rows_have_no_gradient():
    "Nor have the passes: only strong views of selected rows and labelled rows reach the weights."
    method, batch = small(), first_batch()
    seed_everything(1)
    method.settings = replace(method.settings, threshold=method.guess(batch["unlabelled"]["weak"]).std(0).median().item())
    batch["unlabelled"]["strong"].requires_grad_()
    seed_everything(1)
    method.training_step(batch)["unlabelled"].backward()
    reached = (batch["unlabelled"]["strong"].grad != 0).any(1, keepdim=True)
    assert torch.equal(reached, method.record["weight"] > 0) and not method.record["pseudo_label"].requires_grad


def test_agreement_is_of_floats_and_strict():
    same = torch.ones(3, 2, 1)
    assert agreement(same, 0.).tolist() == [[0.], [0.]] and agreement(same, 1e-9).dtype == torch.float32


@pytest.mark.parametrize("data", [None, vectors(2)], ids=["one output", "two outputs"])
def test_infinite_threshold(data):
    assert not differences(trained(UPSReg(threshold=float("inf")).build, data), trained(MeanOfPasses, data))


def test_zero_threshold_is_zero_weight():
    assert not differences(trained(UPSReg(threshold=0.).build), trained(UPSReg(unlabelled_weight=0.).build))


def test_every_argument_changes_training():
    states = [trained(UPSReg(**change).build) for change in ({}, {"passes": 3}, {"threshold": .05}, {"unlabelled_weight": .3})]
    for i, state in enumerate(states): assert all(differences(state, other) for other in states[:i])


@pytest.mark.parametrize("p", [.1, .4])
def test_spread_before_a_linear_head(p):
    "With dropout before the head alone the passes' variance is known: p/(1 - p) sum of (w_i h_i)^2, for each output."
    seed_everything(0)
    regressor = mlp(3, (64,), 2, dropout=p).eval()
    x = torch.randn(5, 3)
    with torch.no_grad():
        measured = regressor.head(dropout_features(regressor, x, 4000)).var(0)
        formula = p/(1 - p)*(regressor.features(x)[:, None]*regressor.head.weight).square().sum(-1)
    torch.testing.assert_close(measured, formula, rtol=.12, atol=0.)


@pytest.mark.parametrize("change", [{"passes": 1}, {"threshold": -.1}, {"threshold": float("nan")}, {"unlabelled_weight": -1.}])
def test_bad_arguments_are_refused(change):
    with pytest.raises(HplError, match=f"{next(iter(change))} is "): UPSReg(**change)


def test_a_network_without_dropout_is_refused():
    with pytest.raises(HplError, match="UPSReg compares several passes"): fit(UPSReg().build(mlp(3, (4,))), vectors(), progress=False)


def test_predict_and_inspect_change_no_state():
    "With batch norm; `predict` has no dropout, `inspect` the mean of the passes."
    seed_everything(0)
    method, x = UPSReg(passes=4).build(noisy_cnn()).eval(), digits().inputs[:5]
    views = inspected(method, x)
    with torch.no_grad():
        seed_everything(3)
        guesses = torch.stack([method.guess(x)]).squeeze(0)
    assert torch.equal(views["pseudo_label"], guesses.mean(0)) and torch.equal(views["strong_prediction"], method.predict(x))
    assert guesses.shape == (4, 5, 1)


def test_log_has_the_share_selected():
    "The mean weight of an epoch is the share of its pseudo-labels that passed."
    seed_everything(0)
    method, weights = UPSReg(threshold=.12).build(noisy_cnn()), []
    def step(batch, training_step=method.training_step):
        losses = training_step(batch)
        weights.append(method.record["weight"].mean().item())
        return losses
    method.training_step = step
    run = fit(method, digits(), replace(SETTINGS, epochs=1, record_every=0), progress=False)
    assert run.log["weight_mean"].iloc[0] == pytest.approx(np.mean(weights)) and 0 < np.mean(weights) < 1
    assert run.config["settings"] == as_json(UPSReg(threshold=.12))
