"""Time and memory of one hypergradient, on one CPU thread: ours against the fewest operations and against its peers.

    python tests/bench_hypergrad.py                     # every size; pip install torchopt for one peer more
    python tests/bench_hypergrad.py --before FOLDER     # in turns with the hypergradient of another checkout

*Fewest* is the same mathematics by hand, without a check, a name or a choice, in the same order of additions: it gives
the same numbers. *Products* are its seven matrix products alone. *Fused* puts learning rate and scales into the products:
fewer operations, but other rounding. Times are processor times in turns, ratios the medians over the turns.
"""
import argparse
import gc
import importlib.util
import itertools
import math
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpl_nb import hypergrad
from hpl_nb.hypergrad import Labelled, PseudoLabelled, hypergradient_autograd

SGD, Adam = torch.optim.SGD, torch.optim.Adam
SIZES = list(itertools.product((16, 64, 512, 2048), (8, 32, 256), (1, 4)))


def problem(features: int = 2048, samples: int = 32, outputs: int = 1, kind=Adam, dtype=torch.float32, seed: int = 0):
    """A head with its optimiser after five steps, and one batch of each stream; by default at the size of ResNet-50."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    head = nn.Linear(features, outputs, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(draw(outputs, features) / features**0.5)
        head.bias.zero_()
    optimizer = kind(head.parameters(), lr=1e-3, **({"weight_decay": 1e-3} if kind is Adam else {}))
    for _ in range(5):
        head.zero_grad()
        (head(draw(samples, features)) - draw(samples, outputs)).square().mean().backward()
        optimizer.step()
    labelled = Labelled(draw(samples, features), draw(samples, outputs))
    unlabelled = PseudoLabelled(draw(samples, features), draw(samples, outputs), torch.exp(-draw(samples, outputs)))
    outer = Labelled(draw(samples, features), draw(samples, outputs))
    return head, optimizer, {"labelled": labelled, "unlabelled": unlabelled, "outer": outer, "unlabelled_weight": 10.0}


def virtual_step(module, head, optimizer):
    """The step of the paper (eq. 7) for SGD, the optimiser's own for Adam."""
    if type(optimizer) is SGD:
        return partial(module.sgd_step, learning_rate=optimizer.param_groups[0]["lr"])
    if module is not hypergrad:  # before issue 18 it had no argument eta
        return lambda eta, gradient: module.optimizer_step(optimizer, head, gradient)
    return lambda eta, gradient: hypergrad.optimizer_step(optimizer, head, gradient, eta=eta)


def by(module, head, optimizer, batch):
    """`hypergradient` of a version of the module, ready to be called."""
    return partial(module.hypergradient, head, virtual_step(module, head, optimizer), *batch.values())


def closed_form(head, optimizer, batch):
    """The gradient in the weights by `hypergradient`."""
    return by(hypergrad, head, optimizer, batch)().weights


def autograd(head, optimizer, batch):
    """The reference: autograd through our step."""
    return hypergradient_autograd(head, virtual_step(hypergrad, head, optimizer), **batch).weights


# ---- the yardstick

@torch.no_grad()
def fewest_sgd(head, optimizer, batch):
    """Weight and bias apart, since the derivative is one number for both; gradients first, then what else a `Hypergradient` holds."""
    (h, y), (k, p, omega), (o, z), lam = batch.values()
    w, b = head.weight, head.bias
    D, scale = w.new_full((), -optimizer.param_groups[0]["lr"]), w.new_full((), lam / p.numel())
    e = F.linear(k, w, b) - p
    e.add_(e)
    s = (omega * e).mul_(scale)
    c = (F.linear(h, w, b) - y).mul_(2 / y.numel())
    w = (c.t() @ h).add_(s.t() @ k).mul_(D).add_(w)
    b = c.sum(0).add_(s.sum(0)).mul_(D).add_(b)
    r = F.linear(o, w, b)
    v = r - z
    loss = v.square().sum().mul_(1 / z.numel())
    v.mul_(2 / z.numel())
    s = F.linear(k, (v.t() @ o).mul_(D), v.sum(0).mul_(D)).mul_(scale)
    return e * s, s, r, loss, w, b


@torch.no_grad()
def fewest_adam(head, optimizer, batch):
    """Weight and bias joined, since a dozen operations for each coordinate cost more twice than three joins."""
    (h, y), (k, p, omega), (o, z), lam = batch.values()
    w, b, group = head.weight, head.bias, optimizer.param_groups[0]
    (b1, b2), lr, t = group["betas"], group["lr"], optimizer.state[w]["step"].item() + 1
    c2 = math.sqrt(1 - b2**t)
    a = lr * c2 / (1 - b1**t)
    scale, eps = w.new_full((), lam / p.numel()), w.new_full((), group["eps"] * c2)
    eta, m, u = (torch.cat((x, y.unsqueeze(1)), 1) for x, y in (
        (w, b), *((optimizer.state[w][key], optimizer.state[b][key]) for key in ("exp_avg", "exp_avg_sq"))))
    e = F.linear(k, w, b) - p
    e.add_(e)
    s = (omega * e).mul_(scale).t()
    c = (F.linear(h, w, b) - y).mul_(2 / y.numel()).t()
    g = torch.cat(((c @ h).add_(s @ k), c.sum(1, keepdim=True).add_(s.sum(1, keepdim=True))), 1).add_(eta, alpha=group["weight_decay"])
    u.mul_(b2)
    root = torch.addcmul(u, g, g, value=1 - b2).sqrt_()
    D = u.addcmul_(m, g, value=-b1 * (1 - b2) / (1 - b1)).div_(root.clamp_min(torch.finfo(root.dtype).tiny)).add_(eps)
    q = root.add_(eps)
    D.div_(q * q).mul_(-a * (1 - b1))
    eta.addcdiv_(m.lerp_(g, 1 - b1), q, value=-a)
    moved = eta.t()
    r = torch.addmm(moved[-1], o, moved[:-1])
    v = r - z
    loss = v.square().sum().mul_(1 / z.numel())
    v = v.mul_(2 / z.numel()).t()
    D = D.mul_(torch.cat((v @ o, v.sum(1, keepdim=True)), 1)).t()
    s = torch.addmm(D[-1], k, D[:-1]).mul_(scale)
    return e * s, s, r, loss, eta


@torch.no_grad()
def fused_sgd(head, optimizer, batch):
    """As `fewest_sgd` with every scale inside a product: equal to rounding, not to the bit."""
    (h, y), (k, p, omega), (o, z), lam = batch.values()
    w, b, rate = head.weight, head.bias, 2 * optimizer.param_groups[0]["lr"]
    a, c = -rate / y.numel(), -rate * lam / p.numel()
    e = F.linear(k, w, b) - p
    s, f = omega * e, F.linear(h, w, b) - y
    w = torch.addmm(w, f.t(), h, alpha=a).addmm_(s.t(), k, alpha=c)
    b = torch.add(b, f.sum(0), alpha=a).add_(s.sum(0), alpha=c)
    r = F.linear(o, w, b)
    v, c = r - z, 2 * c / z.numel()
    s = torch.addmm(v.sum(0), k, (v.t() @ o).t(), beta=c, alpha=c)
    return e * s, s / 2, r, v.square().mean(), w, b


@torch.no_grad()
def products(head, optimizer, batch):
    """The seven products: three predictions and three gradients in the head, and what they say of each unlabelled sample."""
    (h, y), (k, p, _), (o, z), _ = batch.values()
    w, b = head.weight, head.bias
    for features in (h, k, o, k):
        F.linear(features, w, b)
    return [slope.t() @ features for slope, features in ((y, h), (p, k), (z, o))]


FEWEST = {SGD: fewest_sgd, Adam: fewest_adam}


# ---- peers

def mse(prediction, target):
    """As in the paper, a mean."""
    return (prediction - target).square().mean()


def with_higher(head, optimizer, batch):
    """The gradient in the weights by `higher`: differentiate through a copy of the head and of its optimiser."""
    import higher
    (features, pseudo_label, weights), labelled, outer = batch["unlabelled"], batch["labelled"], batch["outer"]
    weights = weights.detach().requires_grad_()
    with higher.innerloop_ctx(head, optimizer) as (virtual_head, virtual_optimizer):
        error = virtual_head(features) - pseudo_label
        inner = mse(virtual_head(labelled.features), labelled.targets)
        virtual_optimizer.step(inner + batch["unlabelled_weight"] * (weights.reshape(len(error), -1) * error**2).mean())
        return torch.autograd.grad(mse(virtual_head(outer.features), outer.targets), weights)[0]


def inner_loss(w, b, omega, batch):
    """Eq. 5 as a function of head and weights."""
    (h, y), (k, p, _) = batch["labelled"], batch["unlabelled"]
    return mse(F.linear(h, w, b), y) + batch["unlabelled_weight"] * (omega * (F.linear(k, w, b) - p)**2).mean()


def with_torchopt(head, optimizer, batch):
    """By torchopt's functional optimisers, with the live state."""
    import torchopt
    parameters, omega = (head.weight, head.bias), batch["unlabelled"].weights.detach().requires_grad_()
    group, outer = optimizer.param_groups[0], batch["outer"]
    if type(optimizer) is SGD:
        stepper = torchopt.sgd(group["lr"])
        state = stepper.init(parameters)
    else:
        stepper = torchopt.adam(group["lr"], group["betas"], group["eps"], weight_decay=group["weight_decay"])
        live = [optimizer.state[p] for p in parameters]
        decay, adam, scale = stepper.init(parameters)
        state = decay, adam._replace(mu=[s["exp_avg"] for s in live], nu=[s["exp_avg_sq"] for s in live],
                                     count=[s["step"] for s in live]), scale
    w, b = torchopt.apply_updates(parameters, stepper.update(
        torch.autograd.grad(inner_loss(*parameters, omega, batch), parameters, create_graph=True),
        state, params=parameters, inplace=False)[0], inplace=False)
    return torch.autograd.grad(mse(F.linear(outer.features, w, b), outer.targets), omega)[0]


def with_func(head, optimizer, batch):
    """By `torch.func`: a gradient of a function that takes a gradient and steps by hand."""
    group, outer, parameters = optimizer.param_groups[0], batch["outer"], (head.weight.detach(), head.bias.detach())

    def moved(p, g, state):
        if not state:
            return p - group["lr"] * g
        (b1, b2), t, g = group["betas"], state["step"].item() + 1, g + group["weight_decay"] * p
        m, u = b1 * state["exp_avg"] + (1 - b1) * g, b2 * state["exp_avg_sq"] + (1 - b2) * g**2
        return p - group["lr"] * m / (1 - b1**t) / ((u / (1 - b2**t)).sqrt() + group["eps"])

    def outer_loss(omega):
        gradients = torch.func.grad(inner_loss, (0, 1))(*parameters, omega, batch)
        states = [optimizer.state.get(p) for p in (head.weight, head.bias)]
        return mse(F.linear(outer.features, *map(moved, parameters, gradients, states)), outer.targets)

    return torch.func.grad(outer_loss)(batch["unlabelled"].weights)


def peers():
    """The ways of differentiating through a step that are installed here."""
    found = {"higher": with_higher, "torchopt": with_torchopt, "torch.func": with_func, "autograd": autograd}
    return {name: method for name, method in found.items() if "." in name or name == "autograd" or importlib.util.find_spec(name)}


# ---- measuring

class Operations(TorchDispatchMode):
    """Counts the operations, views included, that PyTorch is asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(method) -> int:
    """How many operations a call takes."""
    with Operations() as counted:
        method()
    return counted.count


def peak_memory(method) -> int:
    """Most bytes that a call holds at once beyond its arguments, result included."""
    method()
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says on every machine without a GPU that it has none
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        method()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def seconds_per_call(method, calls: int) -> float:
    """Processor time per call: other programs on the machine do not count."""
    start = time.process_time()
    for _ in range(calls):
        method()
    return (time.process_time() - start) / calls


def in_turns(methods, turns: int = 41, budget: float = 0.001) -> dict[str, list[float]]:
    """Seconds per call of each, in turns of about `budget` seconds, on one thread.

    As in `timeit`, no garbage is collected during a turn: `higher` leaves cycles behind, and what collecting them costs
    depends on everything else in the process.
    """
    threads, seconds = torch.get_num_threads(), {name: [] for name in methods}
    torch.set_num_threads(1)
    calls = {name: max(1, round(budget / seconds_per_call(method, 3))) for name, method in methods.items()}
    gc.collect()
    gc.freeze()
    gc.disable()
    for _ in range(turns):
        for name, method in methods.items():
            gc.collect()
            seconds_per_call(method, 10)  # a collection leaves the caches cold
            seconds[name].append(seconds_per_call(method, calls[name]))
    gc.enable()
    gc.unfreeze()
    torch.set_num_threads(threads)
    return seconds


def ratio(seconds, name: str, to: str) -> float:
    """Median over the turns of one time over another."""
    return statistics.median(one / other for one, other in zip(seconds[name], seconds[to]))


def earlier(folder: Path):
    """The hypergradient's module of another checkout."""
    spec = importlib.util.spec_from_file_location("hpl_nb.hypergrad_before", folder / "hpl_nb" / "hypergrad.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def distance(one, other) -> float:
    """Relative difference in norm."""
    return float((one - other).norm() / other.norm())


def contenders(arguments, others, before):
    """What is timed, ready to be called."""
    kind = type(arguments[1])
    hands = {"fewest": FEWEST[kind], "products": products, **({"fused": fused_sgd} if kind is SGD else {}), **others}
    timed = {"ours": by(hypergrad, *arguments), **{name: partial(method, *arguments) for name, method in hands.items()}}
    return timed | ({"before": by(before, *arguments)} if before else {})


def check(kind, others, before) -> None:
    """Everything that is timed gives the same numbers, in float64; the version before gives the same bits."""
    arguments = problem(64, 32, 4, kind, torch.float64)
    exact = by(hypergrad, *arguments)()
    assert max(map(distance, exact[:4], FEWEST[kind](*arguments))) < 1e-14
    far = {name: distance(method(*arguments), exact.weights) for name, method in others.items()}
    print(f"\n{kind.__name__}. Relative difference to the closed form: " + ", ".join(f"{name} {value:.0e}" for name, value in far.items()))
    for size in SIZES if before else []:
        single = problem(*size, kind)
        assert all(map(torch.equal, by(hypergrad, *single)(), by(before, *single)())), size


def columns(others, before) -> list[tuple[str, str, str]]:
    """Heading, and the two whose times are compared."""
    return [("/fewest", "ours", "fewest"), *[("before/fewest", "before", "fewest")] * bool(before), ("/products", "ours", "products"),
            ("/fused", "ours", "fused"), *[(f"{name}/ours", name, "ours") for name in others]]


def row(size, timed, shown) -> str:
    """One size: microseconds, ratios of times, and memory in matrices of the head's size."""
    seconds, unit = in_turns(timed), 4 * size[2] * (size[0] + 1)
    ratios = [f"{ratio(seconds, one, other):.2f}" if {one, other} <= set(seconds) else "" for _, one, other in shown]
    memory = [f"{peak_memory(method) / unit:.2f}" for name, method in timed.items() if name not in ("products", "fused")]
    cells = [*map(str, size), f"{1e6 * statistics.median(seconds['ours']):.0f}", *ratios, *memory]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print all of it, as tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, to be measured in turns")
    parser.add_argument("--largest", type=int, default=2048, help="most features")
    given, others = parser.parse_args(), peers()
    before = earlier(given.before) if given.before else None
    shown = columns(others, before)
    for kind in (SGD, Adam):
        check(kind, others, before)
        timed = contenders(problem(kind=kind), others, before)
        print("Operations: " + ", ".join(f"{name} {operations(method)}" for name, method in timed.items() if "." not in name) + "\n")
        held = [f"{name}: memory" for name in timed if name not in ("products", "fused")]
        heads = ["d", "n", "K", "us", *(heading for heading, *_ in shown), *held]
        print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for size in SIZES:
            if size[0] <= given.largest:
                print(row(size, contenders(problem(*size, kind), others, before), shown), flush=True)


if __name__ == "__main__":
    main()
