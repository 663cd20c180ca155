"PIM's step is that of the loss over all candidates, and its limits are the methods it generalises."
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import SETTINGS, differences, digits, inspected, noisy_cnn, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.core import PseudoLabel, PseudoLabelMethod, Supervised
from hpl_nb.methods.pim import PIM, candidate_weights, weighted_candidate
from hpl_nb.models import mlp
from hpl_nb.settings import as_json
from hpl_nb.training.loop import fit
from hpl_nb.training.state import Train


def first_batch(outputs=1):
    return Streams(vectors(outputs), PseudoLabelMethod.needs, StreamSettings(8, 12), 1, seed=0)[0]


def small(outputs=1, **kwargs):
    seed_everything(0)
    return PIM(**kwargs).build(mlp(3, (16,), outputs, dropout=.3))


def trained(settings, data=None, iterations=10):
    "State after some steps on a network with dropout."
    seed_everything(0)
    method = settings.build(mlp(3, (16,), data.outputs if data else 1, dropout=.2))
    fit(method, data or vectors(), Train(epochs=2, iterations_per_epoch=iterations, streams=StreamSettings(8, 8)), progress=False)
    return dict(method.state_dict())


@pytest.mark.parametrize("temperature", [.003, .1, 3., float("inf")])
def test_weights_one_by_one(temperature):
    "C.3, written down for each sample and output in NumPy."
    random = np.random.default_rng(0)
    candidates, r = random.normal(size=(4, 6, 2)), random.normal(size=(6, 2))
    weights = candidate_weights(*map(torch.from_numpy, (candidates, r)), temperature).numpy()
    mean = weighted_candidate(*map(torch.from_numpy, (candidates, r)), temperature).numpy()
    for j in range(6):
        for k in range(2):
            loss = (r[j, k] - candidates[:, j, k])**2
            w = np.exp(-(loss - loss.min())/temperature)
            np.testing.assert_allclose(weights[:, j, k], w/w.sum(), rtol=1e-10)
            np.testing.assert_allclose(mean[j, k], (w/w.sum()*candidates[:, j, k]).sum(), rtol=1e-10)


@pytest.mark.parametrize("outputs", [1, 2])
def test_step_has_the_gradient_of_all_candidates(outputs):
    "Of every parameter: against the sum over candidates with constant weights, on the same dropout masks."
    method, batch = small(outputs, unlabelled_weight=.7, temperature=.1), first_batch(outputs)
    seed_everything(1)
    losses = method.training_step(batch)
    sum(losses.values()).backward()
    actual = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    seed_everything(1)
    with torch.no_grad(): candidates = torch.stack([method.regressor(batch["unlabelled"]["weak"]) for _ in range(5)])
    labelled, r = method.regressor(batch["labelled"]["weak"]), method.regressor(batch["unlabelled"]["strong"])
    w = torch.softmax(-(r.detach() - candidates)**2/.1, 0)
    unlabelled = .7*(w*(r - candidates)**2).sum(0).mean()
    (((labelled - batch["labelled"]["y"])**2).mean() + unlabelled).backward()
    for gradient, p in zip(actual, method.parameters(), strict=True): torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-7)
    mean = (w*candidates).sum(0)
    torch.testing.assert_close(unlabelled - losses["unlabelled"], .7*(w*(candidates - mean)**2).sum(0).mean(), rtol=1e-4, atol=1e-7)


def test_limits_of_the_temperature():
    random = torch.Generator().manual_seed(0)
    candidates, r = torch.randn(7, 50, 2, generator=random), torch.randn(50, 2, generator=random)
    torch.testing.assert_close(weighted_candidate(candidates, r, float("inf")), candidates.mean(0))
    closest = (r - candidates).abs().argmin(0, keepdim=True)
    torch.testing.assert_close(weighted_candidate(candidates, r, 1e-9), candidates.gather(0, closest)[0])


def test_weights_prefer_what_is_predicted():
    "The weighted mean loss never exceeds the plain one, and falls with the temperature."
    random = torch.Generator().manual_seed(0)
    candidates, r = torch.randn(5, 200, 1, generator=random), torch.randn(200, 1, generator=random)
    losses = torch.stack([(candidate_weights(candidates, r, t)*(r - candidates)**2).sum(0) for t in (float("inf"), 1., .1, .01, 1e-4)])
    assert (losses.diff(dim=0) <= 1e-6).all()


def test_no_gradient_through_pseudo_labels():
    method, batch = small(), first_batch()
    method.training_step(batch)
    assert not any(values.requires_grad for values in method.record.values())
    assert (method.record["weight"] == 1).all() and method.record["pseudo_label"].shape == (12, 1)


@pytest.mark.parametrize("data", [None, vectors(2)], ids=["one output", "two outputs"])
def test_one_candidate_is_pseudo_label(data):
    assert not differences(trained(PIM(passes=1), data), trained(PseudoLabel(), data))


def test_zero_weight_trains_on_the_labels_alone():
    "The gradient of the unlabelled rows is exactly zero."
    method, batch = small(unlabelled_weight=0.), first_batch()
    seed_everything(1)
    sum(method.training_step(batch).values()).backward()
    supervised, actual = Supervised().build(method.regressor), [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    seed_everything(1)
    for _ in range(5): method.regressor(batch["unlabelled"]["weak"]) # the dropout masks of the passes
    sum(supervised.training_step(batch).values()).backward()
    for gradient, p in zip(actual, method.parameters(), strict=True): torch.testing.assert_close(gradient, p.grad)


def test_every_argument_changes_training():
    states = [trained(PIM(**change)) for change in ({}, {"passes": 2}, {"temperature": 1.}, {"unlabelled_weight": .3})]
    for i, state in enumerate(states): assert all(differences(state, other) for other in states[:i])


@pytest.mark.parametrize("change", [{"passes": 0}, {"temperature": 0.}, {"temperature": -1.}, {"temperature": float("nan")},
                                    {"unlabelled_weight": -1.}])
def test_bad_arguments_are_refused(change):
    with pytest.raises(HplError, match=f"{next(iter(change))} is "): PIM(**change)


def test_a_network_without_dropout_is_refused():
    with pytest.raises(HplError, match="PIM compares several passes"): fit(PIM().build(mlp(3, (4,))), vectors(), progress=False)


def test_predict_and_inspect_change_no_state():
    "With batch norm; `predict` has no dropout, `inspect` the method's own pseudo-label."
    seed_everything(0)
    method, x = PIM(passes=3).build(noisy_cnn()).eval(), digits().inputs[:5]
    views = inspected(method, x)
    with torch.no_grad():
        seed_everything(3)
        candidates, r = method.guess(x), method.predict(x)
    assert torch.equal(views["strong_prediction"], r) and candidates.shape == (3, 5, 1) and (candidates.std(0) > 0).all()
    assert torch.equal(views["pseudo_label"], weighted_candidate(candidates, r, method.settings.temperature))


def test_predictions_table_has_its_pseudo_labels():
    seed_everything(0)
    run = fit(PIM().build(noisy_cnn()), digits(), replace(SETTINGS, epochs=1, record_every=0), progress=False)
    rows = run.predictions[run.predictions["split"] == "unlabelled"]
    assert rows["pseudo_label"].notna().all() and (rows["pseudo_label"] != rows["y_pred"]).any()
    assert run.config["settings"] == as_json(PIM())
