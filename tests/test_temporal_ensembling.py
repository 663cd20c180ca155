"Targets, losses and gradients are those of loops over rows and epochs; what is noted in an unfinished epoch survives a stop."
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from small_runs import SETTINGS, differences, on_cpu, vectors  # noqa: F401

from hpl_nb.core import HplError, seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.core import Supervised
from hpl_nb.methods.temporal_ensembling import TemporalEnsembling
from hpl_nb.models import mlp
from hpl_nb.settings import change
from hpl_nb.training.loop import fit
from hpl_nb.training.state import Clock, Train

DEFAULT = TemporalEnsembling()
FEW = Train(epochs=5, iterations_per_epoch=6, streams=StreamSettings(16, 16, labelled_copies=2), optimizer=SETTINGS.optimizer)


def trained(chosen=DEFAULT, settings=FEW, outputs=1, watch=lambda method: None, dropout=0., **kwargs):
    "The method after a run; `watch` sees it before."
    seed_everything(0)
    method = chosen.build(mlp(3, (8,), outputs, dropout=dropout))
    watch(method)
    fit(method, vectors(outputs), settings, progress=False, **kwargs)
    return method


def averages(epochs, decay):
    "Bias-corrected target of one row from the lists of its predictions, one list for each epoch: loops, in float64."
    average, count = 0., 0
    for predictions in epochs:
        if not predictions: continue
        average, count = decay*average + (1 - decay)*np.mean(predictions, axis=0), count + 1
    return average/(1 - decay**count) if count else None


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("decay, ramp_share", [(0., 0.), (.6, .5), (.9, 2.)])
def test_every_step_of_a_run(decay, ramp_share, outputs):
    "Targets, weights and loss, where rows come twice in a batch, several times in an epoch, or not at all."
    steps, made = [], []
    def watch(method):
        method.regressor.head.register_forward_hook(lambda head, x, y: made.append(y.detach().double().numpy()) if head.training else None)
        step = method.training_step
        def training_step(batch):
            made.clear()
            losses = step(batch)
            index = np.concatenate([batch[stream]["index"].numpy() for stream in ("labelled", "unlabelled")])
            steps.append((method.clock, index, np.concatenate(made), losses["unlabelled"].item(), method.record))
            return losses
        method.training_step = training_step
    trained(TemporalEnsembling(decay=decay, ramp_share=ramp_share, unlabelled_weight=.7), outputs=outputs, watch=watch)
    history, idle, twice = {row: [] for row in range(200)}, 0, 0
    for clock, index, predictions, loss, record in steps:
        if clock.step % 6 == 0:
            for epochs in history.values(): epochs.append([])
        ramp = math.exp(-5*(1 - min(clock.epoch/5/ramp_share, 1))**2) if ramp_share else 1.
        targets = [averages(history[row][:-1], decay) for row in index]
        total = sum(((z - target)**2).sum() for z, target in zip(predictions, targets) if target is not None)
        assert loss == pytest.approx(.7*ramp*total/(32*outputs), rel=1e-4, abs=1e-9)
        for i, target in enumerate(targets[16:]):
            assert record["index"][i] == index[16 + i] and record["strong_prediction"][i].numpy() == pytest.approx(predictions[16 + i])
            assert record["weight"][i].tolist() == pytest.approx([0. if target is None else ramp]*outputs)
            if target is not None: assert record["pseudo_label"][i].numpy() == pytest.approx(target, rel=1e-4, abs=1e-6)
        idle, twice = idle + (clock.epoch > 0)*sum(target is None for target in targets), twice + len(index) - len(set(index))
        for row, z in zip(index, predictions): history[row][-1].append(z)
    assert len(steps) == 30 and idle > 10 and twice > 10


class TestStep:
    def prepared(self, view="weak", outputs=2):
        "A method in float64 with a table in which every third row is missing, and a batch."
        seed_everything(0)
        data, method = vectors(outputs), TemporalEnsembling(.7, 0., view=view).build(mlp(3, (8,), outputs))
        method.prepare(data)
        rows = torch.arange(200)[torch.arange(200) % 3 > 0]
        method.double().table.note(rows, torch.randn(len(rows), outputs, dtype=torch.float64))
        method.table.update()
        batch = Streams(data, method.needs, StreamSettings(8, 12), 10, seed=0)[0]
        return method, {s: {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()} for s, tensors in batch.items()}

    @pytest.mark.parametrize("view", ["weak", "strong"])
    def test_gradient(self, view):
        "Of the formula with constant targets, on labelled and on unlabelled rows."
        method, batch = self.prepared(view)
        assert set(batch["unlabelled"]) == {"index", view}
        sum(method.training_step(batch).values()).backward()
        network, labelled, unlabelled = method.regressor, batch["labelled"], batch["unlabelled"]
        z = torch.cat([network(labelled["weak"]), network(unlabelled[view])])
        index = torch.cat([labelled["index"], unlabelled["index"]])
        known = (index % 3 > 0)[:, None]
        expected = ((z[:8] - labelled["y"])**2).mean() + .7*(known*(z - method.table.ensemble[index]/.4)**2).sum()/(20*2)
        for p, gradient in zip(network.parameters(), torch.autograd.grad(expected, list(network.parameters()))):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-14)
        assert not any(buffer.requires_grad for buffer in method.buffers())

    def test_forward_passes(self):
        method, batch = self.prepared()
        modes = []
        method.regressor.body.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
        method.training_step(batch)
        assert modes == [True, True]

    def test_a_step_does_not_change_its_own_targets(self):
        "What is noted waits for the end of the epoch."
        method, batch = self.prepared()
        first = method.training_step(batch)
        assert torch.equal(first["unlabelled"], method.training_step(batch)["unlabelled"])
        method.after_epoch()
        assert not torch.equal(first["unlabelled"], method.training_step(batch)["unlabelled"])

    def test_two_processes_note_what_one_does(self):
        "Each with half of the batch: with the other's rows gathered, all tables are that of one process; losses are averaged."
        (one, batch), halves = self.prepared(), [self.prepared()[0] for _ in range(2)]
        parts = [{s: {k: v[rank*len(v)//2:(rank + 1)*len(v)//2] for k, v in t.items()} for s, t in batch.items()} for rank in range(2)]
        expected, losses = one.training_step(batch), []
        for rank, method in enumerate(halves):
            other = parts[1 - rank]
            index = torch.cat([other["labelled"]["index"], other["unlabelled"]["index"]])
            z = torch.cat([method.regressor(other["labelled"]["weak"]), method.regressor(other["unlabelled"]["weak"])]).detach()
            method.gather = lambda tensor, index=index, z=z: torch.cat([tensor, z if tensor.is_floating_point() else index])
            losses.append(method.training_step(parts[rank]))
        for name in expected: torch.testing.assert_close((losses[0][name] + losses[1][name])/2, expected[name])
        for method in (one, *halves): method.after_epoch()
        for method in halves:
            for actual, expected in zip(method.table.buffers(), one.table.buffers()): torch.testing.assert_close(actual, expected)

    def test_predictions_change_nothing(self):
        method, batch = self.prepared()
        method.eval()
        x, before = batch["unlabelled"]["weak"], {name: buffer.clone() for name, buffer in method.named_buffers()}
        with torch.no_grad():
            assert torch.equal(method.predict(x), method.predict(x)) and torch.equal(method.predict(x), method.regressor(x))
            assert torch.equal(method.inspect(x, x)["pseudo_label"], method.regressor(x))
        assert not differences(before, dict(method.named_buffers()))


def test_stopped_in_the_middle_of_an_epoch(tmp_path):
    "The pending predictions are in the checkpoint, and the table goes on to the bit."
    run = partial(trained, dropout=.2, checkpoint_seconds=0)
    expected = run(folder=tmp_path/"whole")
    stopped = run(folder=tmp_path/"stopped", stop_after=9)
    assert stopped.table.visits.sum() == 3*32 and stopped.table.total.abs().max() > 0
    assert not differences(dict(expected.state_dict()), dict(run(folder=tmp_path/"stopped").state_dict()))


def test_micro_batches_note_the_same():
    whole, cut = (trained(settings=replace(FEW, accumulate=parts)) for parts in (1, 4))
    for one, other in zip(whole.table.buffers(), cut.table.buffers()): torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_nothing_is_remembered_from_another_run():
    "Trained a second time, with other rows, the table begins anew."
    method = trained()
    method.prepare(vectors(rows=120))
    assert method.table.ensemble.shape == (120, 1) and not any(buffer.any() for buffer in method.table.buffers())


def test_without_unlabelled_loss_it_is_supervised():
    "To the bit; and without a ramp it is, for the first epoch."
    def network(chosen, settings=FEW): return dict(trained(chosen, settings).regressor.state_dict())
    assert not differences(network(Supervised()), network(TemporalEnsembling(unlabelled_weight=0.)))
    for epochs, same in ((1, True), (2, False)):
        settings = replace(FEW, epochs=epochs)
        found = differences(network(Supervised(), settings), network(TemporalEnsembling(ramp_share=0.), settings))
        assert bool(found) is not same


@pytest.mark.parametrize("share, epoch, expected", [
    (.5, 0, math.exp(-5)), (.5, 2, math.exp(-5*.6**2)), (.5, 5, 1.), (.5, 9, 1.), (0., 0, 1.)])
def test_ramp_goes_by_epochs(share, epoch, expected):
    "All steps of an epoch have one weight."
    method, batch = TestStep().prepared()
    method.settings = change(method.settings, ramp_share=share)
    for step in (0, 4):
        method.clock = Clock(5*epoch + step, 50, 5)
        method.training_step(batch)
        known = (batch["unlabelled"]["index"] % 3 > 0)[:, None].double()
        torch.testing.assert_close(method.record["weight"], expected*known.expand(-1, 2))


@pytest.mark.parametrize("argument, value", [
    ("decay", -.1), ("decay", 1.), ("decay", float("nan")), ("ramp_share", -1.), ("unlabelled_weight", -1.), ("view", "plain")])
def test_bad_arguments_are_refused(argument, value):
    with pytest.raises(HplError, match=argument): TemporalEnsembling(**{argument: value})
