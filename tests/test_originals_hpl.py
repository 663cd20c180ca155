"""HPL beside its authors' loop, on the same tensors (rows F2, F3, F4 and F12 of the table in `61_methods.hpl`).

`Original` writes the arithmetic of one iteration of the released `main_ours.py` down once more: `higher` takes the virtual step, and no
function of `hpl_nb.loss`, `.uncertainty` or `.hypergrad` is used.
"""
import copy
from dataclasses import replace

import pytest
import torch
from small_runs import on_cpu, vectors  # noqa: F401
from torch import nn
from torch.nn.functional import mse_loss

from hpl_nb.core import seed_everything
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.methods.hpl import HPL, outer_features
from hpl_nb.models import Body, Regressor, mlp
from hpl_nb.settings import change
from hpl_nb.training.loop import fit
from hpl_nb.training.state import Clock, OptimizerSettings, Train

RATES = OptimizerSettings(lr_body=3e-3, lr_head=1e-2, weight_decay_body=1e-3, weight_decay_head=1e-3)
FAST = change(HPL.release(), learner_lr=1e-2, unlabelled_weight=10., outer_regularizer=.1)


def network(dropout=.2):
    "Batch norm, dropout and a linear head, in float64."
    seed_everything(0)
    body = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 8), nn.Tanh())
    return Regressor(Body(body, 8), nn.Linear(8, 1)).double()


def in_float64(batch):
    return {s: {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()} for s, tensors in batch.items()}


def batches(method, steps):
    "What both sides read."
    streams = Streams(vectors(), method.needs, method.stream_settings(StreamSettings(8, 16)), steps, seed=0)
    return [in_float64(streams[step]) for step in range(steps)]


class Original:
    "The released loop: three optimisers, and the head's virtual step by `higher`."
    def __init__(self, regressor, learner):
        self.regressor, self.learner, self.hidden = regressor, learner, .1
        self.body = torch.optim.Adam(regressor.body.parameters(), lr=RATES.lr_body, weight_decay=RATES.weight_decay_body)
        self.head = torch.optim.Adam(regressor.head.parameters(), lr=RATES.lr_head, weight_decay=RATES.weight_decay_head)
        self.phi = torch.optim.Adam(learner.parameters(), lr=1e-2)

    def loss(self, head, labelled, unlabelled, y):
        "Inner loss of features: MSE and 10 times the mean of exp(-z)/2 times the squared difference of the views."
        weak, strong = head(unlabelled[0]).detach(), head(unlabelled[1])
        z = self.learner(torch.cat([strong - weak, strong], 1).detach())
        return mse_loss(head(labelled), y) + 10*(torch.exp(-z)/2*(strong - weak)**2).mean()

    def features(self, batch):
        "Labelled, weak, strong: in this order."
        labelled = self.regressor.features(batch["labelled"]["weak"])
        with torch.no_grad(): weak = self.regressor.features(batch["unlabelled"]["weak"])
        return labelled, (weak, self.regressor.features(batch["unlabelled"]["strong"])), batch["labelled"]["y"]

    def teach(self, batch):
        "Phi's own step, through one step of the head."
        higher = pytest.importorskip("higher")
        with higher.innerloop_ctx(self.regressor.head, self.head) as (head, step):
            for states in step.state:
                for state in states.values(): state["step"] = float(state["step"]) # a float32 tensor would lose digits
            labelled, (weak, strong), y = self.features(batch)
            step.step(self.loss(head, labelled.detach(), (weak, strong.detach()), y))
            r, y = head(self.regressor.features(batch["outer"]["weak"]).detach()), batch["outer"]["y"]
            z = self.learner(torch.cat([r - y, r], 1).detach())
            self.phi.zero_grad()
            (mse_loss(r, y) - self.hidden*z.mean()).backward()
        self.phi.step()

    def step(self, number, batch): # number: within its epoch
        if number % 5 == 0: self.teach(batch)
        loss = self.loss(self.regressor.head, *self.features(batch))
        for optimizer in (self.body, self.head): optimizer.zero_grad()
        loss.backward()
        for optimizer in (self.body, self.head): optimizer.step()


def start(settings=FAST, dropout=.2):
    "Our method, and the original with the same weights."
    method = settings.build(network(dropout)).double()
    method.optimizers = method.make_optimizers(RATES)
    return method, Original(*copy.deepcopy((method.regressor, method.learner)))


def ours(method, batch, clock):
    "One step, as the trainer takes it."
    method.clock = clock
    sum(method.training_step(batch).values()).backward()
    for optimizer in method.optimizers.values(): optimizer.step()
    for optimizer in method.optimizers.values(): optimizer.zero_grad()
    method.after_step()


def gap(a, b):
    "Largest difference of two modules' parameters and running statistics."
    return max((p - q).abs().max().item() for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_release_is_the_original():
    "F2, F3 and F12 together: two epochs of 7 steps with dropout and batch norm; weights, phi and running statistics."
    method, original = start()
    for number, batch in enumerate(batches(method, 14)):
        random = torch.get_rng_state()
        ours(method, batch, Clock(number, 14, 7))
        torch.set_rng_state(random)
        original.step(number % 7, batch)
        assert gap(method.regressor, original.regressor) < 1e-9, number
        assert gap(method.learner, original.learner) < 1e-9, number


@pytest.mark.parametrize("per_epoch, updates", [(313, 1890), (297, 1800), (266, 1620)])
def test_counts_of_phi(per_epoch, updates):
    "F2: thirty epochs of UTKFace at 5, 10 and 20 % teach phi as often as the release's `train_iter % 5`."
    method = HPL.paper(outer_every=5, outer="previous").build(mlp(3, (4,)))
    method.memory, taught = {"features": torch.ones(1, 4), "y": torch.ones(1, 1)}, 0
    for step in range(30*per_epoch):
        method.clock = Clock(step, 30*per_epoch, per_epoch)
        taught += outer_features(method, {}) is not None
    assert taught == updates == 30*sum(number % 5 == 0 for number in range(per_epoch))


def first_gradient(settings):
    "Phi's first gradient through a cold Adam, theirs and ours; without the hidden term, which outweighs it."
    method, original = start(change(settings, outer_regularizer=0., learner_first=False), dropout=0.)
    batch, theirs, original.hidden = batches(method, 1)[0], [], 0.
    original.phi.register_step_pre_hook(lambda *_: theirs.append(flat(p.grad for p in original.learner.parameters())))
    original.teach(batch)
    method.clock = Clock(0, 14, 7)
    method.training_step(batch)
    return theirs[0], flat(p.grad for p in method.learner.parameters())


def flat(tensors): return torch.cat([tensor.flatten() for tensor in tensors])


def test_first_hypergradient():
    "F3: `higher` adds eps before Adam's bias correction. So does the release; torch's own step gives 1/31.6 of it."
    theirs, equal = first_gradient(FAST)
    assert (theirs - equal).norm() < 1e-4*theirs.norm() # of a cold step, autograd keeps few digits
    _, torchs = first_gradient(change(FAST, virtual_eps="torch"))
    assert (theirs - .001**-.5*torchs).norm() < 1e-3*theirs.norm()


ORDERS = {"release": (FAST, "labelled weak strong outer labelled weak strong"), "paper": (HPL.paper(), "outer weak labelled strong"),
          "paper, separate": (HPL.paper(separate_forward=True), "labelled weak strong outer labelled weak strong"),
          "paper, previous": (HPL.paper(outer="previous"), "weak labelled strong")}


@pytest.mark.parametrize("settings, order", ORDERS.values(), ids=ORDERS)
def test_running_statistics(settings, order):
    "F12: batch norm's running mean and variance after one step are those of the passes in their order, with momentum 0.1."
    method, _ = start(settings)
    batch = batches(HPL.release().build(network()), 1)[0]
    first, norm = method.regressor.body.network[:2]
    views = {"labelled": ("labelled", "weak"), "weak": ("unlabelled", "weak"), "strong": ("unlabelled", "strong"),
             "outer": ("outer", "weak")}
    mean, variance = torch.zeros(16).double(), torch.ones(16).double()
    for name in order.split():
        stream, view = views[name]
        hidden = first(batch[stream][view]).detach()
        mean, variance = .9*mean + .1*hidden.mean(0), .9*variance + .1*hidden.var(0)
    method.clock = Clock(0, 14, 7)
    method.training_step(batch)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


WHOLE = {"paper": {}, "learner first": dict(learner_first=True), "separate passes": dict(separate_forward=True),
         "previous": dict(outer="previous"), "previous, separate": dict(outer="previous", separate_forward=True, learner_first=True),
         "Adam's step": dict(virtual_step="optimizer", outer_every=2), "attached input": dict(detach_input=False),
         "more inputs, a teacher": dict(learner_inputs="pair+features+disagreement", teacher_decay=.9)}


def trained(settings, accumulate):
    "Weights of theta and phi after two epochs of five steps, and how often phi's optimiser stepped; in float64."
    seed_everything(0)
    method, steps = settings.build(mlp(3, (16,)).double()).double(), []
    build = method.make_optimizers
    def make_optimizers(rates):
        optimizers = build(rates)
        optimizers["learner"].register_step_post_hook(lambda *_: steps.append(method.learner.layers[0].weight.detach().clone()))
        return optimizers
    method.make_optimizers, data = make_optimizers, vectors()
    train = Train(epochs=2, iterations_per_epoch=5, accumulate=accumulate, streams=StreamSettings(8, 16), optimizer=RATES)
    fit(method, replace(data, inputs=data.inputs.double()), train, progress=False)
    return method.state_dict(), steps


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("changes", [*WHOLE.values(), None], ids=[*WHOLE, "release"])
def test_micro_batches_are_the_whole_batch(changes, parts):
    "F4: one inner problem and one step of phi, however many parts the batch is cut into; theta's step knows the new phi."
    settings = FAST if changes is None else change(HPL.paper(**changes), learner_lr=1e-2)
    (whole, once), (cut, steps) = (trained(settings, accumulate) for accumulate in (1, parts))
    assert len(steps) == len(once)
    for name, value in whole.items():
        if torch.is_tensor(value): torch.testing.assert_close(cut[name], value, rtol=1e-6, atol=1e-9, msg=name)
