"CADR's weights, thresholds and losses against scikit-learn, NumPy and autograd; its limits are PseudoLabel and its parts."
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from small_runs import SETTINGS, differences, digits, noisy_cnn, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.cadr import CADR, bin_of, bin_thresholds, bin_weights
from hpl_nb.methods.core import PseudoLabel
from hpl_nb.models import mlp
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train


def prepared(outputs=1, dtype=torch.float64, **kwargs):
    "A method that knows its bins, in float64 without dropout, and a batch."
    seed_everything(0)
    data = vectors(outputs)
    method = CADR(**kwargs).build(mlp(3, (16,), outputs)).to(dtype)
    method.prepare(data)
    batch = Streams(data, method.needs, StreamSettings(8, 12), 1, seed=0)[0]
    return method, {s: {k: v.to(dtype) if v.is_floating_point() else v for k, v in part.items()} for s, part in batch.items()}


def trained(settings, data=None):
    "Weights of the regressor after 20 steps on a network with dropout."
    seed_everything(0)
    method = settings.build(mlp(3, (16,), data.outputs if data else 1, dropout=.2))
    fit(method, data or vectors(), Train(epochs=2, iterations_per_epoch=10, streams=StreamSettings(8, 8),
                                                 optimizer=OptimizerSettings(1e-2, 1e-2)), progress=False)
    return dict(method.regressor.state_dict())


def labels(outputs=1):
    data = vectors(outputs)
    return data.normalizer.normalize(data.targets[data.labelled])


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_bins_by_numpy(bins):
    "Also beyond the limits, and for each output."
    random = np.random.default_rng(0)
    y, low, high = 2*random.normal(size=(200, 2)), np.array([-1., -.5]), np.array([2., .7])
    found = bin_of(torch.from_numpy(y), torch.from_numpy(np.stack([low, high])), bins).numpy()
    for k in range(2):
        edges = np.linspace(low[k], high[k], bins + 1)
        np.testing.assert_array_equal(found[:, k], np.clip(np.searchsorted(edges, y[:, k], side="right") - 1, 0, bins - 1))


@pytest.mark.parametrize("outputs", [1, 2])
def test_labelled_prior_gives_balanced_weights(outputs):
    "Those of scikit-learn, for each output; their mean over the labelled rows is one."
    method, _ = prepared(outputs, bins=6)
    target = method.classes.target(torch.from_numpy(labels(outputs)))
    weights = bin_weights(method.classes.share, method.classes.share, float("inf"))
    for k in range(outputs):
        classes = np.unique(target[:, k])
        balanced = compute_class_weight("balanced", classes=classes, y=target[:, k].numpy())
        np.testing.assert_allclose(weights[classes, k], balanced, rtol=1e-9)
    torch.testing.assert_close(weights.gather(0, target).mean(0), torch.ones(outputs, dtype=torch.float64))


def test_weights_of_other_probabilities():
    "Mean one over the labelled rows before the cut; uniform probabilities weigh nothing; an empty bin has a finite weight."
    share, p = torch.tensor([[.7], [.3], [0.]], dtype=torch.float64), torch.tensor([[.5], [.1], [.4]], dtype=torch.float64)
    weights = bin_weights(p, share, float("inf"))
    assert (share*weights).sum().item() == pytest.approx(1) and (weights[1]/weights[0]).item() == pytest.approx(5)
    torch.testing.assert_close(bin_weights(torch.ones_like(share), share, 5.), torch.ones_like(share))
    assert bin_weights(share, share, 5.)[2].item() == 5 and bin_weights(p, share, 1.2).max() == 1.2


def test_thresholds_by_hand():
    marginal = torch.tensor([[.6, .2], [.3, .8], [.1, 0.]], dtype=torch.float64)
    expected = .9*np.sqrt([[1, .25], [.5, 1], [1/6, 0]])
    np.testing.assert_allclose(bin_thresholds(marginal, .9, .5).numpy(), expected)
    assert (bin_thresholds(marginal, .9, 0.) == .9).all()


@pytest.mark.parametrize("prior", ["labelled", "predicted", "uniform"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_step_one_by_one(prior, outputs):
    "Losses, selection and moving average, sample by sample in NumPy; the weights' gradients are those of the same losses."
    method, batch = prepared(outputs, bins=4, prior=prior, max_weight=1.5, decay=.9, unlabelled_weight=.7)
    r, share, y = method.regressor, method.classes.share.numpy().copy(), batch["labelled"]["y"]
    with torch.no_grad(): logits = method.classes.classifier(r.features(batch["unlabelled"]["weak"])).view(12, 4, outputs).numpy()
    probability = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    marginal = .9*np.full((4, outputs), .25) + .1*probability.mean(0)
    threshold = float(np.median((probability/np.sqrt(marginal/marginal.max(0))).max(1)))
    method.settings = replace(method.settings, threshold=threshold)
    losses = method.training_step(batch)
    sum(losses.values()).backward()
    np.testing.assert_allclose(method.marginal.numpy(), marginal, rtol=1e-10)
    p = {"labelled": share, "predicted": np.empty_like(share), "uniform": np.ones_like(share)}[prior]
    target, selected, weight = method.classes.target(y).numpy(), np.zeros((12, outputs)), np.zeros((8, outputs))
    for k in range(outputs):
        if prior == "predicted":
            rows = probability[:, :, k]
            p[:, k] = np.clip(np.full(4, .25) @ np.linalg.pinv(rows), 0, 5) @ rows # of the average before the step
            share[:, k] = np.bincount(target[:, k], minlength=4)/8 # in the batch
        seen = share[:, k] > 0
        scale = (share[seen, k]/p[seen, k]).sum()
        for i in range(8): weight[i, k] = min(1/p[target[i, k], k]/scale, 1.5)
        for j in range(12):
            c = probability[j, :, k].argmax()
            selected[j, k] = probability[j, c, k] >= threshold*(marginal[c, k]/marginal[:, k].max())**.5
    np.testing.assert_array_equal(method.record["weight"].numpy(), selected)
    assert 0 < selected.mean() < 1
    actual = [q.grad.clone() for q in method.parameters()]
    method.zero_grad()
    w, mask = torch.from_numpy(weight), torch.from_numpy(selected)
    with torch.no_grad(): pseudo_label = r(batch["unlabelled"]["weak"])
    log_p = method.classes.classifier(r.features(batch["labelled"]["weak"])).view(8, 4, outputs).log_softmax(1)
    expected = {"labelled": (w*(r(batch["labelled"]["weak"]) - y)**2).mean(),
                "classifier": -(w*log_p.gather(1, torch.from_numpy(target)[:, None])[:, 0]).mean(),
                "unlabelled": .7*(mask*(r(batch["unlabelled"]["strong"]) - pseudo_label)**2).mean()}
    for name, loss in expected.items(): torch.testing.assert_close(losses[name], loss, rtol=1e-9, atol=1e-12)
    sum(expected.values()).backward()
    for gradient, q in zip(actual, method.parameters(), strict=True): torch.testing.assert_close(gradient, q.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("data", [None, vectors(2)], ids=["one output", "two outputs"])
def test_one_bin_is_pseudo_label(data):
    assert not differences(trained(CADR(bins=1), data), trained(PseudoLabel(), data))


def test_nothing_passes_an_impossible_threshold():
    states = [trained(settings, vectors(2)) for settings in (CADR(threshold=1., power=0.), CADR(unlabelled_weight=0.))]
    assert not differences(*states)


def test_every_argument_changes_training():
    base = {"threshold": .3, "bins": 5, "max_weight": 2., "decay": .5}
    changes = [{}, {"bins": 8}, {"prior": "predicted"}, {"prior": "predicted", "upper": .01},
               {"prior": "uniform"}, {"max_weight": 1.2}, {"threshold": .4}, {"power": 2.},
               {"decay": 0.}, {"unlabelled_weight": .3}]
    states = [trained(CADR(**base | change)) for change in changes]
    for i, state in enumerate(states): assert all(differences(state, other) for other in states[:i]), changes[i]


def test_two_processes_agree_with_one():
    "Thresholds and moving average come from the joined batch, whatever share of it a process has."
    random = torch.Generator().manual_seed(0)
    guesses = torch.cat([torch.randn(1, 12, 1, generator=random), torch.rand(10, 12, 1, generator=random).softmax(0)]).double()
    whole, _ = prepared(threshold=.15, decay=.5)
    _, expected = whole.weigh(type("Joined", (), {"pseudo_label": guesses}))
    halves = guesses.chunk(2, 1)
    mean = sum(half[1:].mean(1) for half in halves)/2
    for half, weight in zip(halves, expected.chunk(2)):
        method, _ = prepared(threshold=.15, decay=.5)
        method.reduce = lambda _: mean
        assert torch.equal(method.weigh(type("Share", (), {"pseudo_label": half}))[1], weight)
        torch.testing.assert_close(method.marginal, whole.marginal)
    assert 0 < expected.mean() < 1


def test_classifier_learns_at_the_head_s_rate():
    method, _ = prepared()
    groups = method.make_optimizers(OptimizerSettings(1e-4, 1e-3))["regressor"].param_groups
    classifier = {id(p) for p in method.classes.parameters()}
    assert classifier <= {id(p) for p in groups[1]["params"]} and groups[1]["lr"] == 1e-3
    assert sum(len(group["params"]) for group in groups) == len([*method.parameters()])


@pytest.mark.parametrize("change", [{"bins": 0}, {"prior": "true"}, {"max_weight": .5}, {"max_weight": float("nan")}, {"upper": 0.},
                                    {"threshold": -.1},
                                    {"power": -1.}, {"decay": 1.}, {"decay": -.1}, {"unlabelled_weight": -1.}])
def test_bad_arguments_are_refused(change):
    with pytest.raises(HplError, match=f"{next(iter(change))} is "): CADR(**change)


def test_equal_labels_are_refused():
    data = vectors(2)
    data.targets[data.labelled, 1] = 4.
    with pytest.raises(HplError, match="the same label; use PseudoLabel"): fit(CADR().build(mlp(3, (4,), 2)), data, progress=False)


def test_predict_and_inspect_change_no_state():
    method, batch = prepared(2, dtype=torch.float32)
    method.eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    weak, strong = batch["unlabelled"]["weak"], batch["unlabelled"]["strong"]
    with torch.no_grad(): views = method.inspect(weak, strong)
    assert torch.equal(views["pseudo_label"], method.predict(weak)) and views["strong_prediction"].shape == (12, 2)
    assert not differences(before, dict(method.state_dict()))


def test_state_is_saved():
    "Bins and moving average are in the state dict, and `prepare` sets the bins of the data at hand."
    seed_everything(0)
    method = CADR(bins=5).build(noisy_cnn())
    run = fit(method, digits(), replace(SETTINGS, epochs=1, record_every=0), progress=False)
    state, y = method.state_dict(), digits().normalizer.normalize(digits().targets[digits().labelled])
    np.testing.assert_allclose(state["classes.share"][:, 0], np.histogram(y, 5)[0]/len(y), atol=1e-6)
    np.testing.assert_allclose(state["classes.limits"][:, 0], [y.min(), y.max()], rtol=1e-6)
    assert state["marginal"].sum().item() == pytest.approx(1) and state["marginal"].std() > 0
    assert run.config["settings"]["prior"] == "labelled" and {"loss/labelled", "loss/classifier", "loss/unlabelled"} <= {*run.log}
