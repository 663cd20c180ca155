"UCVME's terms and gradients against loops in NumPy, what must have no gradient, its cases with known results, and its predictions."
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from small_runs import differences, noisy_cnn, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.core import PseudoLabel, PseudoLabelMethod
from hpl_nb.methods.ucvme import UCVME, labelled_terms, unlabelled_terms
from hpl_nb.models import mlp
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train

SETTINGS = Train(epochs=2, iterations_per_epoch=5, streams=StreamSettings(8, 12), optimizer=OptimizerSettings(1e-2, 1e-2))
TERMS = ["labelled", "labelled_consistency", "unlabelled", "unlabelled_consistency"]


def built(outputs=1, dropout=.2, partner=True, **kwargs):
    "A method on small networks in float64, and a batch with both views."
    seed_everything(0)
    make = partial(mlp, 3, (16,), outputs, dropout=dropout)
    method = UCVME(**kwargs).build(make(), make() if partner is True else partner).double()
    batch = Streams(vectors(outputs), PseudoLabelMethod.needs, StreamSettings(8, 12), 10, seed=0)[0]
    return method, {s: {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()} for s, tensors in batch.items()}


def forward(method, x):
    "Values and log-variances of both networks, from their layers; each (2, b, K)."
    networks, heads = (method.regressor, method.partner), method.variance_heads
    features = [network.body(x) for network in networks]
    pairs = [(network.head(h), head(h)) for network, head, h in zip(networks, heads, features)]
    return tuple(torch.stack(part) for part in zip(*pairs))


def oracle(y, labelled, students, draws, weight, joint):
    "All four terms, in loops over networks, rows, outputs and passes."
    (values, z), (student, student_z), (drawn, drawn_z) = ([t.detach().numpy() for t in pair] for pair in (labelled, students, draws))
    n, m, outputs, passes = len(y), student.shape[1], y.shape[1], len(drawn)
    terms = dict.fromkeys(TERMS, 0.)
    for k in range(outputs):
        for i in range(n):
            mean_z = (z[0, i, k] + z[1, i, k])/2
            for net in (0, 1):
                used = mean_z if joint else z[net, i, k]
                terms["labelled"] += .5*(np.exp(-used)*(values[net, i, k] - y[i, k])**2 + used)/(n*outputs)
            terms["labelled_consistency"] += (z[0, i, k] - z[1, i, k])**2/(n*outputs)
        for j in range(m):
            target = sum((drawn[t, 0, j, k] + drawn[t, 1, j, k])/2 for t in range(passes))/passes
            noise = sum((drawn_z[t, 0, j, k] + drawn_z[t, 1, j, k])/2 for t in range(passes))/passes
            for net in (0, 1):
                loss = .5*(np.exp(-noise)*(student[net, j, k] - target)**2 + noise)
                terms["unlabelled"] += weight*loss/(m*outputs)
                terms["unlabelled_consistency"] += weight*(student_z[net, j, k] - noise)**2/(m*outputs)
    return terms


class TestLoss:
    "The step's four terms and their gradients."

    @pytest.mark.parametrize("outputs", [1, 2])
    @pytest.mark.parametrize("joint", [True, False])
    @pytest.mark.parametrize("view", ["weak", "strong"])
    def test_terms(self, outputs, joint, view):
        "Against loops; the networks here have no dropout, so that all passes are known."
        method, batch = built(outputs, dropout=0., passes=3, unlabelled_weight=.7, joint_variance=joint, student_view=view)
        losses, unlabelled = method.training_step(batch), batch["unlabelled"]
        draws = [torch.stack([t]*3) for t in forward(method, unlabelled["weak"])]
        expected = oracle(batch["labelled"]["y"].numpy(), forward(method, batch["labelled"]["weak"]), forward(method, unlabelled[view]),
                          draws, .7, joint)
        assert list(losses) == TERMS
        for name, loss in losses.items(): np.testing.assert_allclose(loss.item(), expected[name], rtol=1e-12)

    @pytest.mark.parametrize("passes", [1, 4])
    def test_terms_with_dropout(self, passes, monkeypatch):
        "The pseudo-labels are the mean of the passes that were drawn: T for each network, in training mode."
        method, batch = built(passes=passes, unlabelled_weight=2.)
        drawn = []
        for network in method.networks:
            features = network.features
            monkeypatch.setattr(network, "features", lambda x, f=features: drawn.append(f(x)) or drawn[-1])
        losses = method.train().training_step(batch)
        assert len(drawn) == 2*passes + 4 and [h.requires_grad for h in drawn] == [False]*2*passes + [True]*4
        heads = [(net.head, head) for net, head in zip(method.networks, method.variance_heads)]
        read = lambda pair: [torch.stack([heads[net][which](pair[net]) for net in (0, 1)]) for which in (0, 1)]
        draws = [torch.stack(part) for part in zip(*(read((drawn[t], drawn[passes + t])) for t in range(passes)))]
        expected = oracle(batch["labelled"]["y"].numpy(), read(drawn[-4:-2]), read(drawn[-2:]), draws, 2., True)
        for name, loss in losses.items(): np.testing.assert_allclose(loss.item(), expected[name], rtol=1e-12)
        if passes > 1: assert not torch.equal(drawn[0], drawn[1])
        np.testing.assert_allclose(method.record["pseudo_label"].numpy(), draws[0].detach().mean((0, 1)).numpy(), rtol=1e-12)
        np.testing.assert_allclose(method.record["weight"].numpy(), np.exp(-draws[1].detach().mean((0, 1)).numpy()), rtol=1e-12)

    @pytest.mark.parametrize("joint", [True, False])
    @pytest.mark.parametrize("outputs", [1, 3])
    def test_gradients_by_hand(self, joint, outputs):
        "Of all terms, in values and log-variances, in closed form."
        torch.manual_seed(0)
        values, z = (torch.randn(2, 5, outputs, dtype=torch.float64, requires_grad=True) for _ in range(2))
        y, noise = torch.randn(2, 5, outputs, dtype=torch.float64)
        error, size = (values - y).detach(), 5*outputs
        known = z.detach()
        used = known.mean(0, keepdim=True).expand_as(known) if joint else known
        slope = .5*(1 - torch.exp(-used)*error**2)
        in_z = (slope.mean(0, keepdim=True).expand_as(slope) if joint else slope) + 2*(known - known.flip(0))
        actual = torch.autograd.grad(sum(labelled_terms(values, z, y, joint).values()), (values, z))
        for gradient, correct in zip(actual, (torch.exp(-used)*error/size, in_z/size)): torch.testing.assert_close(gradient, correct)
        actual = torch.autograd.grad(sum(unlabelled_terms(values, z, y, noise).values()), (values, z))
        by_hand = torch.exp(-noise)*error/size, 2*(known - noise)/size
        for gradient, correct in zip(actual, by_hand): torch.testing.assert_close(gradient, correct)

    def test_whole_gradient(self):
        "Every layer's, with pseudo-labels that are constants."
        method, batch = built(2, dropout=0., unlabelled_weight=3.)
        sum(method.training_step(batch).values()).backward()
        with torch.no_grad(): target, noise = (t.mean(0) for t in forward(method, batch["unlabelled"]["weak"]))
        (values, z), (student, student_z) = (forward(method, batch[stream]["weak"]) for stream in ("labelled", "unlabelled"))
        mean_z, loss = z.mean(0), ((z[0] - z[1])**2).mean()
        for net in (0, 1):
            loss = loss + .5*(torch.exp(-mean_z)*(values[net] - batch["labelled"]["y"])**2 + mean_z).mean()
            loss = loss + 3*(.5*torch.exp(-noise)*(student[net] - target)**2 + (student_z[net] - noise)**2).mean()
        parameters = list(method.parameters())
        for p, correct in zip(parameters, torch.autograd.grad(loss, parameters)):
            torch.testing.assert_close(p.grad, correct, rtol=1e-9, atol=1e-14)


class TestKnownResults:
    "Cases whose result is another method's, or nothing."

    def test_equal_networks_agree(self):
        "Without dropout two equal networks have no consistency loss, and nothing to learn from unlabelled rows."
        method, batch = built(dropout=0., passes=4)
        method.partner = deepcopy(method.regressor)
        method.variance_heads[1].load_state_dict(method.variance_heads[0].state_dict())
        losses = method.training_step(batch)
        assert losses["labelled_consistency"] == 0 and losses["unlabelled_consistency"] < 1e-25
        (losses["unlabelled"] + losses["unlabelled_consistency"]).backward()
        assert all(p.grad.abs().max() < 1e-13 for p in method.parameters() if p.grad is not None)

    def test_half_the_gradient_of_pseudo_label(self):
        "Equal networks, z = 0, one pass, no dropout, the strong view: to the bit."
        method, batch = built(2, dropout=0., passes=1, unlabelled_weight=3., student_view="strong")
        method.partner = deepcopy(method.regressor)
        for p in method.variance_heads.parameters(): torch.nn.init.zeros_(p)
        sum(method.training_step(batch).values()).backward()
        baseline = PseudoLabel(unlabelled_weight=3.).build(deepcopy(method.regressor))
        for p in baseline.parameters(): p.grad = None
        sum(baseline.training_step(batch).values()).backward()
        for p, q, whole in zip(method.regressor.parameters(), method.partner.parameters(), baseline.parameters()):
            assert torch.equal(2*p.grad, whole.grad) and torch.equal(2*q.grad, whole.grad)

    @pytest.mark.parametrize("weight, same", [(0., True), (1., False)])
    def test_zero_weight(self, weight, same):
        "Trained weights do not depend on the unlabelled rows, to the bit."
        data = vectors()
        other = replace(data, unlabelled=data.unlabelled[::-1][:60].copy())
        states = []
        for one in (data, other):
            seed_everything(0)
            fit(method := UCVME(unlabelled_weight=weight).build(mlp(3, (16,), dropout=.2)), one, SETTINGS, progress=False)
            states.append([p.detach().clone() for p in method.parameters()])
        assert bool(differences(*states)) is not same


def test_halves_of_a_batch():
    "All terms are means over rows, so the average of two processes' gradients is that of the joined batch (no batch norm, no dropout)."
    method, batch = built(2, dropout=0.)
    def gradient(part):
        method.zero_grad()
        sum(method.training_step(part).values()).backward()
        return [p.grad.clone() for p in method.parameters()]
    halves = [gradient({s: {k: v.chunk(2)[i] for k, v in t.items()} for s, t in batch.items()}) for i in (0, 1)]
    for whole, a, b in zip(gradient(batch), *halves): torch.testing.assert_close(whole, (a + b)/2)


class TestNetworks:
    "Which layers there are, and that all of them learn."

    def test_every_layer_is_trained_once(self):
        "By one optimiser of two groups, the heads at the head's rate."
        method, batch = built(2)
        groups = method.make_optimizers(OptimizerSettings(1e-3, 1e-2))["regressor"].param_groups
        ids = [{id(p) for p in group["params"]} for group in groups]
        bodies = {id(p) for network in method.networks for p in network.body.parameters()}
        assert ids[0] == bodies and ids[1] == {id(p) for p in method.parameters()} - bodies and [g["lr"] for g in groups] == [1e-3, 1e-2]
        sum(method.train().training_step(batch).values()).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())

    def test_partner(self):
        "A copy with a new head that shares no memory, or the caller's network as it is."
        method, _ = built(partner=None)
        a, b = method.networks
        for p, q in zip(a.parameters(), b.parameters()): assert p is not q and p.data_ptr() != q.data_ptr()
        assert not differences(dict(a.body.state_dict()), dict(b.body.state_dict())) and not torch.equal(a.head.weight, b.head.weight)
        own = mlp(3, (8,), dropout=.1) # of another width
        method, batch = built(partner=own)
        assert method.partner is own and method.variance_heads[1].in_features == 8
        assert all(loss.isfinite() for loss in method.training_step(batch).values())

    def test_config(self):
        "The settings without the networks."
        settings = {"passes": 5, "unlabelled_weight": 10., "joint_variance": True, "student_view": "weak", "test_passes": 0}
        assert built()[0].config() == {"kind": "UCVME", "label": ""} | settings

    def test_views(self):
        "Only what is used is made."
        assert built()[0].needs == {"labelled": ("weak",), "unlabelled": ("weak",)}
        assert built(student_view="strong")[0].needs == {"labelled": ("weak",), "unlabelled": ("weak", "strong")}

    @pytest.mark.parametrize("kwargs", [{"passes": 0}, {"test_passes": -1}, {"unlabelled_weight": -1.}, {"unlabelled_weight": float("nan")},
                                        {"student_view": "plain"}], ids=str)
    def test_out_of_range(self, kwargs):
        with pytest.raises(HplError, match=f"{next(iter(kwargs))} is"): UCVME(**kwargs)

    def test_refuses(self):
        "The same network twice, one with other outputs, and networks without dropout."
        regressor = mlp(3, (4,))
        with pytest.raises(HplError, match="the regressor itself"): UCVME().build(regressor, regressor)
        with pytest.raises(HplError, match="partner has 2 outputs"): UCVME().build(regressor, mlp(3, (4,), 2))
        with pytest.raises(HplError, match="build it with dropout"): UCVME().build(regressor).prepare(vectors())


class TestPrediction:
    "A pure function of the batch."

    @pytest.mark.parametrize("passes", [0, 5])
    def test_changes_nothing(self, passes):
        "Neither weights and buffers nor the global generator; and gives the same numbers again."
        seed_everything(0)
        method = UCVME(test_passes=passes).build(noisy_cnn()).eval()
        x, state, generator = torch.randn(6, 1, 8, 8), deepcopy(method.state_dict()), torch.get_rng_state()
        with torch.no_grad(): first, inspected, second = method.predict(x), method.inspect(x, x), method.predict(x)
        assert torch.equal(first, second) and torch.equal(inspected["pseudo_label"], first)
        assert torch.equal(inspected["strong_prediction"], first) and inspected["log_variance"].shape == first.shape
        assert not differences(dict(state), dict(method.state_dict())) and torch.equal(generator, torch.get_rng_state())
        assert not any(layer.training for layer in method.modules())

    @pytest.mark.parametrize("outputs", [1, 2])
    def test_is_the_mean_of_both(self, outputs):
        "With dropout off; and many passes come near it."
        method, batch = built(outputs)
        x = batch["unlabelled"]["weak"]
        with torch.no_grad():
            values, z = forward(method.eval(), x)
            torch.testing.assert_close(method.predict(x), values.mean(0))
            torch.testing.assert_close(method.inspect(x, x)["log_variance"], z.mean(0))
            method.settings = replace(method.settings, test_passes=2000)
            torch.testing.assert_close(method.predict(x), values.mean(0), rtol=0, atol=.02)

    def test_row_by_row(self):
        "Dropout off: a row's prediction does not depend on its batch."
        method, batch = built()
        x = batch["unlabelled"]["weak"]
        with torch.no_grad(): torch.testing.assert_close(method.eval().predict(x), torch.cat([method.predict(row[None]) for row in x]))
