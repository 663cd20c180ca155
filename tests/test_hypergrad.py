"""The hypergradient against four oracles: finite differences, autograd, `higher` and torch's own optimisers."""
import copy
import gc
import sys
import tracemalloc
from functools import partial
from itertools import product
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
from torch import nn

from hpl_nb.core import HplError
from hpl_nb.hypergrad import (
    Labelled,
    PseudoLabelled,
    Sloped,
    VirtualStep,
    head_matrix,
    hypergradient,
    hypergradient_autograd,
    optimizer_step,
    sgd_step,
    slope_hypergradient,
)

sys.path.insert(0, str(Path(__file__).parent))
import bench_hypergrad  # noqa: E402

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
mse = nn.functional.mse_loss
WEIGHTS = {"exp(-z)": lambda z: torch.exp(-z), "exp(-z)/2": lambda z: torch.exp(-z) / 2,
           "bounded": lambda z: 1 / (1 + torch.exp(z))}


def problem(outputs=1, n=5, m=7, d=4, seed=0, dtype=torch.float64):
    """A head and one batch of each stream; the shared arguments of the closed form and its reference."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    head = nn.Linear(d, outputs, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(draw(outputs, d))
        head.bias.copy_(draw(outputs))
    labelled, unlabelled = Labelled(draw(n, d), draw(n, outputs)), PseudoLabelled(draw(m, d), draw(m, outputs), torch.exp(-draw(m, 1)))
    return head, {"labelled": labelled, "unlabelled": unlabelled, "outer": Labelled(draw(n, d), draw(n, outputs)), "unlabelled_weight": 1.7}


def changed(batch, key="unlabelled", **changes):
    """The arguments with other tensors in one of the batches."""
    return {**batch, key: batch[key]._replace(**changes)}


def make_optimizer(kind, head, steps, **settings):
    """An optimiser of the head after some real steps on fresh data."""
    optimizer = kind(head.parameters(), lr=0.03, **settings)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(99), dtype=head.weight.dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        mse(head(draw(6, head.in_features)), draw(6, head.out_features)).backward()
        optimizer.step()
    return optimizer


def set_gradient(head, gradient):
    """Put a gradient matrix where a backward pass would."""
    head.weight.grad, head.bias.grad = gradient[:, :-1].clone(), gradient[:, -1].clone()


def relative(a, b):
    """Relative difference in norm."""
    return ((a - b).norm() / b.norm()).item()


STEPS = [
    *[(SGD, {"momentum": momentum, "nesterov": nesterov, "weight_decay": decay})
      for momentum, nesterov, decay in ((0, False, 0), (0, False, 0.1), (0.9, False, 0), (0.9, False, 0.1),
                                        (0.9, True, 0), (0.9, True, 0.1))],
    (SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True, "weight_decay": 0.1}),
    *[(kind, {"weight_decay": decay, **extra}) for kind, decay, extra in product(
        (Adam, AdamW), (0, 0.1), ({}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.5, 0.9), "eps": 1e-3}))],
]
IDS = [f"{kind.__name__}-" + "-".join(f"{key}={value}" for key, value in settings.items()) for kind, settings in STEPS]


@pytest.mark.parametrize("kind, settings", STEPS, ids=IDS)
@pytest.mark.parametrize("warm", [0, 1, 5])
@pytest.mark.parametrize("outputs", [1, 3])
def test_virtual_step_is_the_real_step(kind, settings, warm, outputs):
    """eta' is what torch's own optimiser makes of the head; D is its derivative, by central differences."""
    head, _ = problem(outputs)
    optimizer = make_optimizer(kind, head, warm, **settings)
    gradient = torch.randn(outputs, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    virtual = optimizer_step(optimizer, head, gradient)

    def real(gradient):
        copied_head, copied = copy.deepcopy((head, optimizer))
        set_gradient(copied_head, gradient)
        copied.step()
        return head_matrix(copied_head)

    assert (virtual.head - real(gradient)).abs().max() < 1e-12
    # after a cold first step Adam's D is about 1e-9: too small for differences of numbers near 1, hence the floor
    numerical = (real(gradient + 1e-6) - real(gradient - 1e-6)) / 2e-6
    assert (virtual.derivative - numerical).abs().max() < 1e-6 * numerical.abs().max() + 1e-9


@pytest.mark.parametrize("kind, settings", STEPS, ids=IDS)
@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_autograd(kind, settings, warm, outputs, reduction):
    """The closed form and differentiation through the step: weights, slopes, prediction, loss and head."""
    head, batch = problem(outputs)
    optimizer = make_optimizer(kind, head, warm, **settings)

    def step(eta, gradient):
        return optimizer_step(optimizer, head, gradient)

    closed = hypergradient(head, step, **batch, reduction=reduction)
    reference = hypergradient_autograd(head, step, **batch, reduction=reduction)
    # in a cold Adam all but eps / |G| < 1e-8 of the derivative cancels, and autograd loses as many digits;
    # the cases with eps = 1e-3 hold it to 1e-9 in the cold state, too
    cold = kind is not SGD and not warm and settings.get("eps") is None
    for name in closed._fields:
        mine, other = getattr(closed, name), getattr(reference, name)
        assert mine.shape == other.shape
        assert relative(mine, other) < (1e-5 if cold and name in ("weights", "slope") else 1e-9), name


@pytest.mark.parametrize("kind, settings", [case for case in STEPS
                                            if case[0] is not AdamW and not case[1].get("maximize")])
@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("eps_first", [False, True])
def test_equals_higher(kind, settings, warm, outputs, weight, eps_first):
    """The gradient in z by `higher` (which has neither AdamW nor maximize).

    With `eps_first` our step is `higher`'s as it stands; torch adds eps after the bias correction, which is `higher` with eps
    times the root of that correction. `higher`'s step counter is made a Python float, as float32 would lose digits.
    """
    higher = pytest.importorskip("higher")
    head, batch = problem(outputs)
    optimizer = make_optimizer(kind, head, warm, **settings)
    z = torch.randn(7, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    mine = z.clone().requires_grad_()
    weights = weight(mine)
    weights.backward(hypergradient(head, lambda eta, gradient: optimizer_step(optimizer, head, gradient, eps_first),
                                   **changed(batch, weights=weights)).weights)

    other = z.clone().requires_grad_()
    with higher.innerloop_ctx(head, optimizer) as (virtual_head, virtual_optimizer):
        for group, states in zip(virtual_optimizer.param_groups, virtual_optimizer.state):
            if kind is Adam and not eps_first:
                group["eps"] = group["eps"] * (1 - group["betas"][1]**(warm + 1))**0.5
            for state in states.values():
                state.update({"step": float(state["step"])} if "step" in state else {})
        error = virtual_head(batch["unlabelled"].features) - batch["unlabelled"].pseudo_label
        virtual_optimizer.step(mse(virtual_head(batch["labelled"].features), batch["labelled"].targets)
                               + batch["unlabelled_weight"] * (weight(other) * error**2).mean())
        mse(virtual_head(batch["outer"].features), batch["outer"].targets).backward()
    cold = kind is Adam and not warm and settings.get("eps") is None
    assert relative(mine.grad, other.grad) < (1e-5 if cold else 1e-9)


class OuterLoss(torch.autograd.Function):
    """The outer loss as a function of the weights, with the closed form as its backward."""

    @staticmethod
    def forward(context, weights, head, step, batch):
        result = hypergradient(head, step, **changed(batch, weights=weights))
        context.save_for_backward(result.weights)
        return result.outer_loss

    @staticmethod
    def backward(context, gradient):
        return gradient * context.saved_tensors[0], None, None, None


@pytest.mark.parametrize("kind, settings", STEPS, ids=IDS)
@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3)])
def test_gradcheck(kind, settings, shape):
    """Finite differences of the outer loss, for every shape that weights may have."""
    head, batch = problem(3)
    optimizer = make_optimizer(kind, head, 5, **settings)
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).add(0.5)

    def step(eta, gradient):
        return optimizer_step(optimizer, head, gradient)

    for weight in WEIGHTS.values():
        z = weights.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda z: OuterLoss.apply(weight(z), head, step, batch), z)


def test_weight_and_bias_in_groups_of_their_own():
    """Different settings for weight and bias, and different numbers of steps."""
    head, batch = problem(3)
    optimizer = Adam([{"params": [head.weight], "lr": 0.1}, {"params": [head.bias], "weight_decay": 0.2}])
    for parameters in ([head.weight, head.bias], [head.bias]):
        optimizer.zero_grad()
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
    gradient = torch.randn(3, 5, dtype=torch.float64)
    virtual = optimizer_step(optimizer, head, gradient)
    reference = hypergradient_autograd(head, lambda eta, g: optimizer_step(optimizer, head, g), **batch)
    closed = hypergradient(head, lambda eta, g: optimizer_step(optimizer, head, g), **batch)
    assert relative(closed.weights, reference.weights) < 1e-9
    set_gradient(head, gradient)
    optimizer.step()
    assert (head_matrix(head) - virtual.head).abs().max() < 1e-12


def test_one_group_but_different_numbers_of_steps():
    """A bias that was frozen for a while shares the group but not the bias correction."""
    head, _ = problem(1)
    optimizer = Adam(head.parameters(), lr=0.1)
    for frozen in (True, False):
        head.weight.grad = torch.ones_like(head.weight)
        head.bias.grad = None if frozen else torch.ones_like(head.bias)
        optimizer.step()
    gradient = torch.randn(1, 5, dtype=torch.float64)
    virtual = optimizer_step(optimizer, head, gradient)
    set_gradient(head, gradient)
    optimizer.step()
    assert (head_matrix(head) - virtual.head).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_zero_gradient_gives_the_finite_limit(kind):
    """A coordinate that never had a gradient: sqrt(0) must not become NaN; the limit of D is -lr / eps."""
    head, _ = problem(1)
    for amsgrad in (False, True):
        virtual = optimizer_step(kind(head.parameters(), lr=0.1, amsgrad=amsgrad, weight_decay=0), head,
                                 torch.zeros(1, 5, dtype=torch.float64))
        assert torch.equal(virtual.head, head_matrix(head))
        assert torch.allclose(virtual.derivative, torch.full((1, 5), -0.1 / 1e-8, dtype=torch.float64))


def test_learning_rate_as_tensor_and_accelerate_wrapper():
    """A learning rate that is a tensor, and accelerate's wrapped optimiser."""
    head, _ = problem(1)
    gradient = torch.randn(1, 5, dtype=torch.float64)
    expected = optimizer_step(Adam(head.parameters(), lr=0.25), head, gradient)
    tensor = optimizer_step(Adam(head.parameters(), lr=torch.tensor(0.25)), head, gradient)
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare(Adam(head.parameters(), lr=0.25))
    for virtual in (tensor, optimizer_step(wrapped, head, gradient)):
        assert torch.equal(virtual.head, expected.head) and torch.equal(virtual.derivative, expected.derivative)


@pytest.mark.parametrize("kind, settings", STEPS, ids=IDS)
def test_live_objects_stay_untouched(kind, settings):
    """Parameters, gradients and the optimiser's state are bitwise what they were, before the first step as later."""
    for warm in (0, 3):
        head, batch = problem(3)
        optimizer = make_optimizer(kind, head, warm, **settings)
        set_gradient(head, torch.randn(3, 5, dtype=torch.float64))
        live = [head.weight, head.bias, head.weight.grad, head.bias.grad,
                *(value for state in optimizer.state.values() for value in state.values() if value is not None)]
        entries = len(optimizer.state)
        before, versions = [tensor.clone() for tensor in live], [tensor._version for tensor in live]
        weights = batch["unlabelled"].weights.requires_grad_()
        result = hypergradient(head, lambda eta, gradient: optimizer_step(optimizer, head, gradient), **batch)
        assert all(torch.equal(a, b) for a, b in zip(live, before))
        assert [tensor._version for tensor in live] == versions
        assert len(optimizer.state) == entries
        assert weights.grad is None and not any(tensor.requires_grad for tensor in result)


def test_memory_is_flat():
    """200 calls leave neither tensors nor memory behind."""
    head, batch = problem(1, d=64)
    optimizer = make_optimizer(Adam, head, 3)

    def once():
        z = torch.zeros(7, 1, dtype=torch.float64, requires_grad=True)
        weights = torch.exp(-z)
        weights.backward(hypergradient(head, lambda eta, gradient: optimizer_step(optimizer, head, gradient),
                                       **changed(batch, weights=weights)).weights)

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(5):
        once()
    count = tensors()
    tracemalloc.start()
    once()
    start = tracemalloc.get_traced_memory()[0]
    for _ in range(200):
        once()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert tensors() == count
    assert grown < 20_000


def on_processes(count, head, step, batch, reduction):
    """`count` threads stand for processes: a slice of the batch each, `reduce` averages over them."""
    calls, barrier, results = [[] for _ in range(count)], Barrier(count), [None] * count

    def work(rank):
        mine = {key: type(value)(*(tensor.chunk(count)[rank] for tensor in value)) if isinstance(value, tuple) else value
                for key, value in batch.items()}

        def average(tensor):
            calls[rank].append(tensor)
            number = len(calls[rank])
            barrier.wait()
            return torch.stack([own[number - 1] for own in calls]).mean(0)

        results[rank] = hypergradient(head, step, **mine, reduction=reduction, reduce=average, processes=count)

    threads = [Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_processes_equal_the_joined_batch(kind, reduction):
    """The average over processes of the phi-gradients is the gradient on the joined batch."""
    head, batch = problem(3, n=6, m=8)
    optimizer = make_optimizer(kind, head, 4)

    def step(eta, gradient):
        return optimizer_step(optimizer, head, gradient)

    joined = hypergradient(head, step, **batch, reduction=reduction)
    parts = on_processes(2, head, step, batch, reduction)
    assert relative(torch.cat([part.weights for part in parts]) / 2, joined.weights) < 1e-12
    assert all(relative(part.head, joined.head) < 1e-12 for part in parts)
    assert relative(sum(part.outer_loss for part in parts) / 2, joined.outer_loss) < 1e-12
    phi = torch.tensor(0.3, dtype=torch.float64)  # omega_j = exp(-phi x_j): one shared parameter
    x = torch.randn(8, 1, dtype=torch.float64)
    gradients = []
    for rows, weights in [(slice(None), joined.weights), (slice(4), parts[0].weights), (slice(4, 8), parts[1].weights)]:
        parameter = phi.clone().requires_grad_()
        torch.exp(-parameter * x[rows]).backward(weights)
        gradients.append(parameter.grad)
    assert relative((gradients[1] + gradients[2]) / 2, gradients[0]) < 1e-12


def test_attached_prediction():
    """An unlabelled loss whose weight depends on the prediction: slopes against autograd through everything."""
    head, batch = problem(1)
    (features, pseudo_label, _), labelled, outer = batch["unlabelled"], batch["labelled"], batch["outer"]
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def loss(r):
        return torch.exp(-g(torch.cat([r, pseudo_label], 1))) * (r - pseudo_label)**2

    r = head(features).detach().requires_grad_()
    slope, = torch.autograd.grad(loss(r).sum(), r, create_graph=True)
    result = slope_hypergradient(head, partial(sgd_step, learning_rate=0.1), **{**batch, "unlabelled": Sloped(features, slope)})
    mine = torch.autograd.grad(slope, list(g.parameters()), result.slope)

    weight, bias = head.weight, head.bias
    inner = mse(head(labelled.features), labelled.targets) + 1.7 * loss(head(features)).mean()
    weight_gradient, bias_gradient = torch.autograd.grad(inner, (weight, bias), create_graph=True)
    weight, bias = weight - 0.1 * weight_gradient, bias - 0.1 * bias_gradient
    prediction = nn.functional.linear(outer.features, weight, bias)
    other = torch.autograd.grad(mse(prediction, outer.targets), list(g.parameters()))
    assert result.weights is None
    for a, b in zip(mine, other):
        assert relative(a, b) < 1e-9


def test_limits():
    """No unlabelled loss, or no error of the pseudo-labels: nothing to learn about the weights."""
    head, batch = problem(3)
    step = partial(sgd_step, learning_rate=0.1)
    assert hypergradient(head, step, **{**batch, "unlabelled_weight": 0.0}).weights.abs().max() == 0
    exact = head(batch["unlabelled"].features).detach()
    assert hypergradient(head, step, **changed(batch, pseudo_label=exact)).weights.abs().max() < 1e-13


def test_autocast_does_not_reach_the_hypergradient():
    """Mixed precision of the surrounding step changes nothing."""
    head, batch = problem(1, dtype=torch.float32)
    step = partial(sgd_step, learning_rate=0.1)
    expected = hypergradient(head, step, **batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = hypergradient(head, step, **batch)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(result, expected))


def test_a_step_of_ones_own():
    """Any (eta, G) -> VirtualStep will do: here a step that never moves the bias."""
    head, batch = problem(1)

    def step(eta, gradient):
        rates = torch.full_like(gradient, -0.1)
        rates[:, -1] = 0
        return VirtualStep(eta + rates * gradient, rates)

    reference = hypergradient_autograd(head, step, **batch)
    assert relative(hypergradient(head, step, **batch).weights, reference.weights) < 1e-9


@pytest.mark.parametrize("key, change, message", [
    ("labelled", {"targets": (5,)}, "labelled.targets: shape"), ("unlabelled", {"pseudo_label": (7,)}, "pseudo_label: shape"),
    ("outer", {"targets": (1, 5)}, "outer.targets: shape"), ("unlabelled", {"weights": (3,)}, "weights: shape"),
    ("labelled", {"features": (0, 4), "targets": (0, 1)}, "empty")])
def test_bad_input(key, change, message):
    """Wrong shapes are refused by name instead of being broadcast."""
    head, batch = problem(1)
    wrong = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in change.items()}
    with pytest.raises(HplError, match=message):
        hypergradient(head, partial(sgd_step, learning_rate=0.1), **changed(batch, key, **wrong))
    with pytest.raises(HplError, match="reduction is 'max'"):
        hypergradient(head, partial(sgd_step, learning_rate=0.1), **batch, reduction="max")


def test_bad_optimizers():
    """Other optimisers, subclasses with a step of their own, other heads, and heads without a bias."""
    class Mine(Adam):
        pass

    head, _ = problem(1)
    gradient = torch.zeros(1, 5, dtype=torch.float64)
    for optimizer in (torch.optim.NAdam(head.parameters()), Mine(head.parameters())):
        with pytest.raises(HplError, match="SGD, Adam or AdamW"):
            optimizer_step(optimizer, head, gradient)
    with pytest.raises(HplError, match="does not train this head"):
        optimizer_step(SGD(nn.Linear(4, 1).parameters(), lr=0.1), head, gradient)
    for other in (nn.Linear(4, 1, bias=False), nn.Sequential(nn.Linear(4, 1)), nn.Conv1d(4, 1, 1)):
        _, batch = problem(1)
        with pytest.raises(HplError, match="no linear layer with a bias.*bias=True"):
            hypergradient(other.double(), partial(sgd_step, learning_rate=0.1), **batch)


@pytest.mark.parametrize("kind, most, peer", [(SGD, 49, 75), (Adam, 69, 95)])
def test_operations(kind, most, peer):
    """Few operations, counted, not timed: at most nine more than by hand, and far fewer than autograd's graph takes."""
    arguments = bench_hypergrad.problem(64, 8, 2, kind)
    count = {name: bench_hypergrad.operations(partial(method, *arguments)) for name, method in (
        ("ours", bench_hypergrad.closed_form), ("fewest", bench_hypergrad.FEWEST[kind]), ("autograd", bench_hypergrad.autograd))}
    assert count["ours"] <= min(most, count["fewest"] + 9)
    assert count["autograd"] >= peer


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_the_yardstick_gives_the_same_numbers(kind):
    """The fewest operations that the benchmark times: all that a hypergradient holds, in float64."""
    arguments = bench_hypergrad.problem(16, 8, 3, kind, torch.float64)
    ours = bench_hypergrad.by(bench_hypergrad.hypergrad, *arguments)()
    for mine, fewest in zip(ours, bench_hypergrad.FEWEST[kind](*arguments)[:4]):
        assert relative(mine, fewest) < 1e-13


def test_memory_of_three_heads():
    """SGD: the new head, and at most two more of its size, where batches are small; no peer holds less."""
    arguments = bench_hypergrad.problem(2048, 4, 2, SGD)
    ours, func = (bench_hypergrad.peak_memory(partial(method, *arguments)) / (4 * 2 * 2049)
                  for method in (bench_hypergrad.closed_form, bench_hypergrad.with_func))
    assert ours < 3.05 and ours < func + 0.01


def test_optimizer_step_with_the_matrix_at_hand():
    """The head's matrix may be given: the same step."""
    head, _ = problem(2)
    optimizer = make_optimizer(Adam, head, 3)
    gradient = torch.randn(2, 5, dtype=torch.float64)
    for one, other in zip(optimizer_step(optimizer, head, gradient), optimizer_step(optimizer, head, gradient, eta=head_matrix(head))):
        assert torch.equal(one, other)
