"SimRegMatch against loops in numpy: target, mask, threshold, loss and gradient of each step; its limits and its state."
import io
import threading
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics.pairwise import cosine_similarity
from small_runs import differences, on_cpu, vectors  # noqa: F401

import hpl_nb.methods.simregmatch as module
from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.core import PseudoLabel
from hpl_nb.methods.simregmatch import SimRegMatch, passing, similarity_labels
from hpl_nb.models import mlp
from hpl_nb.settings import change
from hpl_nb.training.loop import fit
from hpl_nb.training.predict import evaluating
from hpl_nb.training.state import OptimizerSettings, Train

SETTINGS = Train(epochs=2, iterations_per_epoch=10, streams=StreamSettings(8, 16), optimizer=OptimizerSettings(1e-2, 1e-2))


def in_float64(batch):
    return {s: {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()} for s, tensors in batch.items()}


def prepared(outputs=1, dropout=.3, **arguments):
    "A method in float64, and three batches."
    seed_everything(0)
    method = SimRegMatch(**arguments).build(mlp(3, (16,), outputs, dropout=dropout)).double()
    streams = Streams(vectors(outputs), method.needs, StreamSettings(8, 12), 10, seed=0)
    return method, [in_float64(streams[step]) for step in range(3)]


def hooked(method):
    "Features of every pass of the body, and whether it had a gradient, in order."
    seen = []
    method.regressor.body.register_forward_hook(lambda _, __, out: seen.append((torch.is_grad_enabled(), out.detach().numpy())))
    return seen


def loops(weak, labelled, strong, y, head, settings, threshold):
    "Pseudo-label, u, mask, loss and its gradient in the head's weight; one sample, output and labelled row after the other."
    w, b = (p.detach().numpy() for p in (head.weight, head.bias))
    passes, m, outputs, beta = len(weak), len(strong), len(b), settings.prediction_share
    label, u, mask = (np.zeros((m, outputs)) for _ in range(3))
    loss, gradient = 0., np.zeros_like(w)
    for j in range(m):
        feature = sum(weak[t][j] for t in range(passes))/passes
        cosines = [feature @ other/np.sqrt((feature @ feature)*(other @ other)) for other in labelled]
        weights = [np.exp(cosine/settings.temperature) for cosine in cosines]
        for k in range(outputs):
            predictions = [w[k] @ weak[t][j] + b[k] for t in range(passes)]
            similar = sum(weight*row[k] for weight, row in zip(weights, y))/sum(weights)
            label[j, k] = beta*np.mean(predictions) + (1 - beta)*similar
            u[j, k] = np.mean([(p - np.mean(predictions))**2 for p in predictions])
            mask[j, k] = float(u[j, k] < threshold[k])
            error = w[k] @ strong[j] + b[k] - label[j, k]
            loss += mask[j, k]*error**2
            gradient[k] += mask[j, k]*2*error*strong[j]
    return label, u, mask, settings.unlabelled_weight*loss/max(mask.sum(), 1), settings.unlabelled_weight*gradient/max(mask.sum(), 1)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("arguments", [
    {}, {"temperature": 1., "prediction_share": .2, "unlabelled_weight": .7}, {"percentile": 50., "passes": 3}, {"percentile": .95},
    {"percentile": None, "first_threshold": 1/32}, {"first_threshold": 0.}], ids=str)
def test_three_steps_in_loops(arguments, outputs):
    "What is recorded, lost, and remembered; the gradient of the unlabelled loss comes by the strong view alone."
    method, batches = prepared(outputs, **arguments)
    seen, s, threshold = hooked(method), method.settings, np.full(outputs, method.settings.first_threshold)
    for batch in batches:
        seen.clear()
        losses = method.training_step(batch)
        assert [gradient for gradient, _ in seen] == [False]*s.passes + [True]*2
        *weak, labelled, strong = (features for _, features in seen)
        y, head = batch["labelled"]["y"].numpy(), method.regressor.head
        label, u, mask, loss, gradient = loops(weak, labelled, strong, y, head, s, threshold)
        if s.percentile is not None: threshold = np.percentile(u, s.percentile, axis=0)
        np.testing.assert_allclose(method.record["pseudo_label"], label, rtol=1e-10)
        np.testing.assert_allclose(method.record["log_variance"], np.log(np.maximum(u, 1e-12)), rtol=1e-8)
        np.testing.assert_array_equal(method.record["weight"], mask)
        np.testing.assert_allclose(method.threshold, threshold, rtol=1e-10)
        np.testing.assert_allclose(losses["unlabelled"].item(), loss, rtol=1e-10)
        prediction = labelled @ head.weight.detach().numpy().T + head.bias.detach().numpy()
        np.testing.assert_allclose(losses["labelled"].item(), ((prediction - y)**2).mean(), rtol=1e-10)
        actual, = torch.autograd.grad(losses["unlabelled"], head.weight)
        np.testing.assert_allclose(actual, gradient, rtol=1e-9, atol=1e-14)


def test_similarity_is_scikit_learn_s():
    "Cosines by scikit-learn and the softmax by scipy; in float32 also where the rest runs in bfloat16."
    seed_everything(0)
    features, labelled, y = torch.randn(20, 8), torch.randn(7, 8), torch.randn(7, 2)
    for temperature in (.02, .1, 1., 30.):
        actual = similarity_labels(features, labelled, y, temperature)
        expected = softmax(cosine_similarity(features, labelled)/temperature, axis=1) @ y.numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16): assert torch.equal(actual, similarity_labels(features, labelled, y, temperature))


def test_similarity_of_a_dead_sample_is_the_batch_mean():
    "All features zero: no direction, no neighbours, no NaN."
    y = torch.randn(7, 1)
    torch.testing.assert_close(similarity_labels(torch.zeros(2, 8), torch.rand(7, 8), y, .1), y.mean().expand(2, 1))


@pytest.mark.parametrize("q", [0., .95, 33., 95., 100.])
def test_threshold_is_numpy_s_percentile_per_output(q):
    method, u = SimRegMatch(percentile=q).build(mlp(3, (4,), 2)), torch.rand(32, 2)
    mask, share = passing(method, u)
    assert mask.all() and share == 1 # by the first threshold, 10
    np.testing.assert_allclose(method.threshold, np.percentile(u.numpy(), q, axis=0), rtol=1e-6)
    mask, share = passing(method, u) # of the same batch: those strictly below its percentile
    assert torch.equal(mask, (u < torch.from_numpy(np.percentile(u.numpy(), q, axis=0))).float()) and share == max(mask.mean(), 1e-9)


def test_none_passes():
    "The unlabelled loss is 0 and so is its gradient, also under the large factor of a half-precision scaler."
    method, batches = prepared(percentile=None, first_threshold=0.)
    loss = method.training_step(batches[0])["unlabelled"]
    gradients = torch.autograd.grad(loss*2.**24, list(method.regressor.parameters()))
    assert loss.item() == 0 and all((gradient == 0).all() for gradient in gradients)


def trained(chosen, dropout=0.):
    seed_everything(0)
    method = chosen.build(mlp(3, (16,), dropout=dropout))
    fit(method, vectors(), SETTINGS, progress=False)
    return dict(method.regressor.state_dict())


def test_without_dropout_and_filter_it_is_pseudo_label(monkeypatch):
    "To the bit: equal passes have no variance and are their own mean, and all count."
    monkeypatch.setattr(module, "require_dropout", lambda *networks: None)
    limit = SimRegMatch(unlabelled_weight=1., passes=5, prediction_share=1., percentile=None)
    expected = trained(PseudoLabel())
    assert not differences(expected, trained(limit))
    for values in ({"prediction_share": .9}, {"first_threshold": 0.}, {"unlabelled_weight": .5}):
        assert differences(expected, trained(change(limit, **values)))


@pytest.mark.parametrize("name, value", [
    ("unlabelled_weight", .5), ("passes", 3), ("prediction_share", .1), ("temperature", 1.), ("percentile", 20.), ("percentile", None),
    ("first_threshold", 0.)])
def test_every_argument_changes_the_numbers(name, value):
    assert differences(trained(SimRegMatch(), .2), trained(SimRegMatch(**{name: value}), .2))


@pytest.mark.parametrize("name, value", [
    ("unlabelled_weight", -1.), ("unlabelled_weight", float("nan")), ("first_threshold", -1.), ("passes", 0), ("passes", 1),
    ("prediction_share", 1.1), ("prediction_share", -.1), ("prediction_share", float("nan")), ("temperature", 0.), ("temperature", -1.),
    ("temperature", float("nan")), ("percentile", 101.), ("percentile", -1.), ("percentile", float("nan"))])
def test_out_of_range(name, value):
    with pytest.raises(HplError, match=f"^{name} is .*give"): SimRegMatch(**{name: value})


def test_needs_dropout():
    with pytest.raises(HplError, match="has none"): trained(SimRegMatch())


def test_state_and_inspection():
    "Two steps are in the state dict; predictions and inspection repeat, and change neither state nor random numbers."
    method, batches = prepared(2)
    weak, strong = batches[2]["unlabelled"]["weak"], batches[2]["unlabelled"]["strong"]
    with evaluating(method): assert torch.equal(method.inspect(weak, strong)["pseudo_label"], method.predict(weak)) # no step yet
    for batch in batches[:2]: method.training_step(batch)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = SimRegMatch().build(mlp(3, (16,), 2, dropout=.3)).double()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.threshold < 10).all() and not differences(dict(method.state_dict()), dict(other.state_dict()))
    before, random = deepcopy(dict(method.state_dict())), torch.get_rng_state()
    with evaluating(method), evaluating(other):
        views = [each.inspect(weak, strong) | {"prediction": each.predict(weak)} for each in (method, method, other)]
    assert not differences(views[0], views[1]) and not differences(views[0], views[2])
    assert not differences(before, dict(method.state_dict())) and torch.equal(random, torch.get_rng_state())
    similar = similarity_labels(method.regressor.eval().features(weak), method.reference.features, batches[1]["labelled"]["y"], .1)
    torch.testing.assert_close(views[0]["pseudo_label"], .6*views[0]["prediction"] + .4*similar)


def test_two_processes_are_one_on_the_joined_batch(monkeypatch):
    "Two threads with half a batch each: the same pseudo-labels, mask, threshold, mean loss and mean gradient."
    def passes(regressor, x, count): return torch.stack([regressor.features(x + .1*t*x.sin()) for t in range(count)]) # no dropout's luck
    monkeypatch.setattr(module, "dropout_features", passes)
    whole, batches = prepared(2, dropout=0., percentile=60., unlabelled_weight=.7)
    methods, barrier, board = [deepcopy(whole) for _ in range(2)], threading.Barrier(2, timeout=20), [None, None]

    def joined(rank, tensor):
        board[rank] = tensor.detach()
        barrier.wait()
        parts = list(board)
        barrier.wait()
        return parts

    def work(rank):
        method = methods[rank]
        method.gather = lambda tensor: torch.cat(joined(rank, tensor))
        method.reduce = lambda tensor: sum(joined(rank, tensor))/2
        for batch in batches:
            half = {stream: {name: value.chunk(2)[rank] for name, value in tensors.items()} for stream, tensors in batch.items()}
            sum(method.training_step(half).values()).backward()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    for batch in batches: sum(whole.training_step(batch).values()).backward()
    for name, value in whole.record.items(): torch.testing.assert_close(torch.cat([method.record[name] for method in methods]), value)
    assert 0 < whole.record["weight"].mean() < 1
    for method in methods: torch.testing.assert_close(method.threshold, whole.threshold)
    for p, *others in zip(whole.parameters(), *(method.parameters() for method in methods)):
        torch.testing.assert_close(sum(q.grad for q in others)/2, p.grad, rtol=1e-9, atol=1e-14)


def test_the_log_and_the_table():
    "The share that passes and the variance are logged; the table has the calibrated pseudo-label."
    seed_everything(0)
    run = fit(SimRegMatch(percentile=50.).build(mlp(3, (16,), dropout=.2)), vectors(), replace(SETTINGS, epochs=1), progress=False)
    assert .3 < run.log["weight_mean"].item() < .8 and run.log["log_variance_mean"].notna().all()
    rows = run.predictions.query("split == 'unlabelled'")
    assert (rows["pseudo_label"] != rows["y_pred"]).all()
