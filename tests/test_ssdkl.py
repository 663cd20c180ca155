"The sparse process against scikit-learn and the original's loss, where gradients go, and that nothing is remembered."
import subprocess
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import differences, digits, noisy_cnn, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.ssdkl import SSDKL, SparseGP, gp_posterior, label_posterior, negative_elbo
from hpl_nb.models import mlp
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train

pytest.importorskip("gpytorch")
gaussian_process = pytest.importorskip("sklearn.gaussian_process")
kernels = gaussian_process.kernels
SETTINGS = Train(epochs=1, iterations_per_epoch=4, streams=StreamSettings(8, 8), optimizer=OptimizerSettings(1e-2, 1e-2))
KERNELS = [(1.5, .8, .1), (.4, 2., .5)] # sigma_f^2, l, sigma_n^2 of two outputs


def made(outputs=1, seed=0, data=None, **settings):
    "A prepared method on a small network without dropout."
    seed_everything(seed)
    method = SSDKL(**{"inducing_points": 6} | settings).build(mlp(3, (16,), outputs))
    method.prepare(data or vectors(outputs))
    method.optimizers = method.make_optimizers(OptimizerSettings(1e-2, 1e-2))
    return method


def batch_of(method, step=0, sizes=(8, 12)):
    return Streams(vectors(method.regressor.head.out_features), method.needs, StreamSettings(*sizes), 10, seed=0)[step]


def take_step(method, step=0):
    sum(method.training_step(batch_of(method, step)).values()).backward()
    method.optimizers["regressor"].step()
    method.optimizers["regressor"].zero_grad()


def exact_process(gp, h, y):
    "Kernels of `KERNELS`, Z at the rows, and q(u) the exact posterior there; float64."
    gp.double()
    identity = torch.eye(len(h)).double()
    with torch.no_grad():
        gp.strategy.inducing_points.copy_(h)
        for output, (scale, length, noise) in enumerate(KERNELS[:y.shape[1]]):
            K = scale*torch.exp(-(h[:, None] - h).square().sum(2)/(2*length**2))
            L = torch.linalg.cholesky(K + gp.strategy.jitter_val*identity)
            A, q = torch.linalg.inv(L) @ K, gp.strategy._variational_distribution
            S = torch.linalg.inv(identity + A @ A.T/noise)
            q.variational_mean[output] = S @ A @ y[:, output]/noise
            q.chol_variational_covar[output] = torch.linalg.cholesky((S + S.T)/2)
        values = torch.tensor(KERNELS[:y.shape[1]]).double()
        gp.kernel.outputscale, gp.kernel.base_kernel.lengthscale = values[:, 0], values[:, 1, None, None]
        gp.likelihood.noise = values[:, 2:]
    return gp


def toy(outputs, rows=20):
    generator = torch.Generator().manual_seed(outputs)
    h, new, noise = (torch.randn(rows, size, generator=generator).double() for size in (2, 2, outputs))
    y = torch.cat([torch.sin(2*h[:, :1]), h[:, 1:]], 1)[:, :outputs] + .2*noise
    return h, new, y


def judges(h, y):
    return [gaussian_process.GaussianProcessRegressor(kernels.ConstantKernel(scale)*kernels.RBF(length), alpha=noise, optimizer=None)
            .fit(h.numpy(), y[:, output].numpy()) for output, (scale, length, noise) in enumerate(KERNELS[:y.shape[1]])]


@pytest.mark.parametrize("outputs", [1, 2])
class TestExactProcess:
    "Z at all labelled rows, q(u) at its best: scikit-learn's process, one per output."

    def test_mean_and_variance(self, outputs):
        h, new, y = toy(outputs)
        gp = exact_process(SparseGP(2, outputs, len(h), 1e-9), h, y)
        for mode in (gp.train, gp.eval):
            mode()
            mean, variance = gp_posterior(gp, new)
            for output, judge in enumerate(judges(h, y)):
                expected, sd = judge.predict(new.numpy(), return_std=True)
                np.testing.assert_allclose(mean[:, output].detach(), expected, atol=1e-6)
                np.testing.assert_allclose(variance[:, output].detach(), sd**2, atol=1e-6)

    def test_bound_is_the_likelihood(self, outputs):
        "And no other q(u) has a better one."
        h, _, y = toy(outputs)
        gp = exact_process(SparseGP(2, outputs, len(h), 1e-9), h, y)
        loss = lambda: negative_elbo(gp, gp_posterior(gp, h), y, torch.tensor(len(h))).item()
        best = loss()
        assert best == pytest.approx(-np.mean([judge.log_marginal_likelihood_value_ for judge in judges(h, y)])/len(h), abs=1e-6)
        for parameter in gp.strategy._variational_distribution.parameters():
            before = parameter.detach().clone()
            parameter.data += .03*torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            assert loss() > best + 1e-5
            parameter.data = before

    def test_gradient_in_the_kernel(self, outputs):
        "The bound touches the likelihood for every kernel: at the best q(u) both have the same slope."
        h, _, y = toy(outputs)
        gp = exact_process(SparseGP(2, outputs, len(h), 1e-9), h, y)
        raw = [gp.kernel.raw_outputscale, gp.kernel.base_kernel.raw_lengthscale, gp.likelihood.noise_covar.raw_noise]
        actual = torch.autograd.grad(negative_elbo(gp, gp_posterior(gp, h), y, torch.tensor(len(h))), raw)
        K = gp.kernel(h).to_dense() + gp.noise[:, None, None]*torch.eye(len(h))
        law = torch.distributions.MultivariateNormal(torch.zeros(len(h)).double(), K)
        expected = torch.autograd.grad(-law.log_prob(y.T).mean()/len(h), raw)
        for a, e in zip(actual, expected): torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-7)

    def test_the_originals_loss(self, outputs):
        "A whole training step, by numpy."
        h, u, y = toy(outputs)
        method = SSDKL(unlabelled_weight=.7, inducing_points=len(h), jitter=1e-9).build(mlp(2, (), outputs)).double()
        method.projection.weight.data, method.projection.bias.data = torch.eye(2).double(), torch.zeros(2).double()
        exact_process(method.gp, h, y)
        method.labelled_rows.fill_(len(h))
        losses = method.training_step({"labelled": {"weak": h, "y": y}, "unlabelled": {"weak": u}})
        likelihoods, variances = [], []
        for output, (scale, length, noise) in enumerate(KERNELS[:outputs]):
            k = lambda a, b: np.array([[scale*np.exp(-((p - q)**2).sum()/(2*length**2)) for q in b] for p in a])
            K, t = k(h.numpy(), h.numpy()) + noise*np.eye(len(h)), y[:, output].numpy()
            likelihoods.append(-.5*t @ np.linalg.solve(K, t) - .5*np.linalg.slogdet(K)[1] - len(h)/2*np.log(2*np.pi))
            cross = k(u.numpy(), h.numpy())
            variances.append(np.mean([scale - row @ np.linalg.solve(K, row) for row in cross]))
        assert losses["labelled"].item() == pytest.approx(-np.mean(likelihoods)/len(h), abs=1e-6)
        assert losses["unlabelled"].item() == pytest.approx(.7*np.mean(variances), abs=1e-6)


class TestBatches:
    def test_batches_average_to_the_whole(self):
        "The KL counts once, not once for each batch."
        method = made().eval()
        take_step(method)
        batch = batch_of(method, sizes=(8, 8))
        halves = [{stream: {key: value[part] for key, value in tensors.items()} for stream, tensors in batch.items()}
                  for part in (slice(0, 4), slice(4, 8))]
        whole, parts = method.training_step(batch), [method.training_step(half) for half in halves]
        for name in whole: torch.testing.assert_close(whole[name], (parts[0][name] + parts[1][name])/2)

    def test_rows_weigh_the_divergence(self):
        "-ELBO/n: with twice the rows the divergence counts half."
        method = made()
        for step in range(5): take_step(method, step)
        batch = batch_of(method)
        first = method.training_step(batch)["labelled"]
        method.labelled_rows *= 2
        divergence = method.gp.strategy.kl_divergence()
        torch.testing.assert_close(first - method.training_step(batch)["labelled"], divergence.squeeze()/80, rtol=1e-3, atol=1e-6)
        assert divergence > .001

    def test_outputs_are_independent_processes(self):
        h, new, y = toy(2)
        both = exact_process(SparseGP(2, 2, len(h), 1e-6), h, y)
        first = exact_process(SparseGP(2, 1, len(h), 1e-6), h, y[:, :1])
        for a, b in zip(gp_posterior(both, new), gp_posterior(first, new)): torch.testing.assert_close(a[:, :1], b)

    def test_two_passes_with_gradient(self):
        method, modes = made(), []
        method.regressor.body.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
        take_step(method)
        assert modes == [True, True]


class TestGradients:
    def unlabelled(self, **settings):
        "Which parameters the unlabelled term moves, after a step that has moved all."
        method = made(**settings)
        take_step(method)
        method.training_step(batch_of(method))["unlabelled"].backward()
        return {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    @pytest.mark.parametrize("fixed", [True, False])
    def test_unlabelled_term(self, fixed):
        moved = self.unlabelled(inducing_fixed=fixed)
        inducing = {name for name, _ in made().named_parameters() if name.startswith("gp.strategy")}
        assert len(inducing) == 3 and "gp.strategy._variational_distribution.variational_mean" in inducing
        assert moved & inducing == (set() if fixed else inducing - {"gp.strategy._variational_distribution.variational_mean"})
        assert {"gp.kernel.raw_outputscale", "gp.kernel.base_kernel.raw_lengthscale", "projection.weight"} <= moved
        assert not {"gp.likelihood.noise_covar.raw_noise", "regressor.head.weight"} & moved
        assert any(name.startswith("regressor.body") for name in moved)

    @pytest.mark.parametrize("linear", [False, True])
    def test_head(self, linear):
        "Without gradient, or the mean: before q(u) has learned, predictions are 0, or the head's."
        method, x = made(outputs=2, linear_mean=linear), torch.randn(5, 3)
        expected = method.regressor(x) if linear else torch.zeros(5, 2)
        assert torch.equal(method.predict(x), expected)
        sum(method.training_step(batch_of(method)).values()).backward()
        assert (method.regressor.head.weight.grad is not None) is linear

    def test_rates(self):
        method = made(gp_lr=.03)
        groups = method.make_optimizers(OptimizerSettings(.1, .2, .3, .4))["regressor"].param_groups
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(.1, .3), (.2, .4), (.03, 0.)]
        assert sum(len(group["params"]) for group in groups) == len([*method.parameters()])

    def test_without_weight_unlabelled_rows_do_not_matter(self):
        "To the bit; with it they do."
        data = vectors()
        inputs = data.inputs.clone()
        inputs[data.unlabelled] *= -2
        for weight, same in ((0., True), (1., False)):
            states = []
            for some in (data, replace(data, inputs=inputs)):
                seed_everything(0)
                fit(method := SSDKL(weight, inducing_points=6).build(mlp(3, (16,))), some, SETTINGS, progress=False)
                states.append(dict(method.state_dict()))
            assert (not differences(*states)) is same


class TestMemory:
    "Nothing but parameters and buffers decides what comes next."

    def test_predict_changes_nothing(self):
        method, x = made(), torch.randn(5, 3)
        take_step(method)
        method.eval()
        state, random = deepcopy(dict(method.state_dict())), torch.get_rng_state()
        first, again = method.predict(x), method.predict(x)
        assert torch.equal(first, again) and not differences(state, dict(method.state_dict()))
        assert torch.equal(random, torch.get_rng_state())

    @pytest.mark.parametrize("mode", [True, False])
    def test_a_fresh_copy_agrees(self, mode):
        "GPyTorch's own memory of a step or a prediction must not outlive it."
        method, other, x = made().train(mode), made(seed=1).train(mode), torch.randn(5, 3)
        for step in range(3):
            method.predict(x), other.predict(x)
            take_step(method, step)
            other.load_state_dict(method.state_dict())
            assert torch.equal(method.predict(x), other.predict(x))

    def test_deepcopy_after_a_step(self):
        method, x = made(), torch.randn(5, 3)
        losses = method.training_step(batch_of(method)) # its graph is alive
        copied = deepcopy(method)
        assert torch.equal(copied.predict(x), method.predict(x)) and losses["labelled"].requires_grad
        take_step(method)
        assert not torch.equal(copied.predict(x), method.predict(x))

    def test_no_random_numbers(self):
        "Also where GPyTorch would begin to estimate determinants, beyond 800 points."
        method, random = made(inducing_points=801), torch.get_rng_state()
        sum(method.training_step(batch_of(method)).values()).backward()
        assert torch.equal(random, torch.get_rng_state())

    def test_state_dict(self, tmp_path):
        method, other = made(), made(seed=1)
        take_step(method)
        torch.save(method.state_dict(), tmp_path/"state.pt")
        other.load_state_dict(torch.load(tmp_path/"state.pt", weights_only=True))
        assert not differences(dict(method.state_dict()), dict(other.state_dict()))


class TestInducingPoints:
    def test_from_labelled_rows_whatever_was_drawn(self):
        "The network of a picture method has batch norm and dropout: neither is touched, and Z does not depend on the generator."
        points = []
        for drawn in (0, 3):
            seed_everything(0)
            method = SSDKL(inducing_points=80).build(noisy_cnn()) # more than the 69 labelled rows
            before = deepcopy(dict(method.regressor.state_dict()))
            torch.rand(drawn)
            random = torch.get_rng_state()
            method.prepare(digits())
            assert torch.equal(random, torch.get_rng_state()) and not differences(before, dict(method.regressor.state_dict()))
            points.append(method.gp.strategy.inducing_points.detach().clone())
        assert torch.equal(*points) and len(points[0].unique(dim=0)) == 80
        assert method.labelled_rows == len(digits().labelled)

    def test_a_trained_method_keeps_its_own(self):
        "And learns the number of rows anew."
        method = made()
        take_step(method)
        before = method.gp.strategy.inducing_points.detach().clone()
        method.prepare(replace(vectors(), labelled=vectors().labelled[:20]))
        assert torch.equal(before, method.gp.strategy.inducing_points) and method.labelled_rows == 20


class TestNumbers:
    def test_points_that_coincide(self):
        "GPyTorch's own jitter helps, and says nothing."
        method = made(jitter=0.)
        with torch.no_grad(): method.gp.strategy.inducing_points.zero_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses = method.training_step(batch_of(method))
            sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)

    def test_divergence_is_explained(self):
        method = made()
        with torch.no_grad(): method.gp.strategy.inducing_points[0, 0] = float("nan")
        with pytest.raises(HplError, match="training diverged, or jitter is too small"): method.training_step(batch_of(method))

    def test_autocast_leaves_the_process_alone(self):
        method, h = made(), torch.randn(7, 2)
        with torch.autocast("cpu", torch.bfloat16): low = gp_posterior(method.gp, h)
        assert all(torch.equal(*pair) for pair in zip(low, gp_posterior(method.gp, h)))

    @pytest.mark.parametrize("outputs", [1, 2])
    def test_inspect(self, outputs):
        "The variance is that of a label; both views are the mean."
        method = made(outputs=outputs).eval()
        take_step(method)
        weak, strong = torch.randn(2, 6, 3)
        views, posterior = method.inspect(weak, strong), label_posterior(method, weak)
        assert {value.shape for value in views.values()} == {(6, outputs)}
        assert torch.equal(views["pseudo_label"], method.predict(weak)) and torch.equal(views["strong_prediction"], method.predict(strong))
        noise = method.gp.likelihood.noise.flatten()
        torch.testing.assert_close(views["log_variance"].exp(), posterior.variance + noise)
        assert (posterior.variance > 0).all()

    @pytest.mark.parametrize("name, value", [("unlabelled_weight", -1.), ("latent_size", 0), ("inducing_points", 0), ("gp_lr", -1e-3),
                                             ("jitter", -1.), ("gp_lr", float("nan"))])
    def test_bad_arguments(self, name, value):
        with pytest.raises(HplError, match=f"{name} is "): SSDKL(**{name: value})


def test_without_gpytorch():
    "The module is imported, the method refused; with GPyTorch it is made without a warning, and only then is it imported."
    code = """
import sys
from unittest.mock import patch
from hpl_nb.core import HplError
from hpl_nb.methods.ssdkl import SSDKL
from hpl_nb.models import mlp
assert "gpytorch" not in sys.modules
with patch.dict(sys.modules, gpytorch=None):
    try: SSDKL().build(mlp(2))
    except HplError as error: assert "pip install 'hpl_nb[gp]'" in str(error), error
    else: raise AssertionError("made without GPyTorch")
SSDKL().build(mlp(2))
assert "gpytorch" in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
