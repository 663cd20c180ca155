"""Time of one hypergradient: closed form against `higher`'s differentiable Adam, on one CPU thread.

Run `python tests/bench_hypergrad.py`; it prints the medians and their ratio.
"""
import gc
import statistics
import time
from functools import partial

import torch
from torch import nn

from hpl_nb.hypergrad import Labelled, PseudoLabelled, hypergradient, optimizer_step


def problem(features: int = 2048, samples: int = 32, seed: int = 0):
    """A head with a warm Adam, and one batch of each stream, at the size of ResNet-50."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    head = nn.Linear(features, 1)
    with torch.no_grad():
        head.weight.copy_(draw(1, features) / features**0.5)
        head.bias.zero_()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3, weight_decay=1e-3)
    for _ in range(5):
        head.zero_grad()
        (head(draw(samples, features)) - draw(samples, 1)).square().mean().backward()
        optimizer.step()
    labelled = Labelled(draw(samples, features), draw(samples, 1))
    unlabelled = PseudoLabelled(draw(samples, features), draw(samples, 1), torch.exp(-draw(samples, 1)))
    outer = Labelled(draw(samples, features), draw(samples, 1))
    return head, optimizer, {"labelled": labelled, "unlabelled": unlabelled, "outer": outer, "unlabelled_weight": 10.0}


def with_higher(head, optimizer, batch):
    """The gradient in the weights by `higher`: differentiate through a copy of the head and of its optimiser."""
    import higher
    (features, pseudo_label, weights), labelled, outer = batch["unlabelled"], batch["labelled"], batch["outer"]
    weights = weights.detach().requires_grad_()
    mse = nn.functional.mse_loss
    with higher.innerloop_ctx(head, optimizer) as (virtual_head, virtual_optimizer):
        error = virtual_head(features) - pseudo_label
        inner = mse(virtual_head(labelled.features), labelled.targets)
        virtual_optimizer.step(inner + batch["unlabelled_weight"] * (weights.reshape(len(error), -1) * error**2).mean())
        return torch.autograd.grad(mse(virtual_head(outer.features), outer.targets), weights)[0]


def closed_form(head, optimizer, batch):
    """The gradient in the weights by `hypergradient`."""
    return hypergradient(head, lambda eta, gradient: optimizer_step(optimizer, head, gradient), **batch).weights


def seconds_per_call(method, arguments, calls: int) -> float:
    """Processor time per call: other programs on the machine do not count."""
    start = time.process_time()
    for _ in range(calls):
        method(*arguments)
    return (time.process_time() - start) / calls


def compare(repetitions: int = 60, calls: int = 5) -> dict[str, float]:
    """Median seconds per call of both, in turns of a few calls each on one thread, and the ratio of the medians.

    As in `timeit`, no garbage is collected during the measurements: `higher` leaves cycles behind, and what collecting
    them costs depends on everything else in the process.
    """
    threads, arguments = torch.get_num_threads(), problem()
    methods, seconds = {"closed form": closed_form, "higher": with_higher}, {"closed form": [], "higher": []}
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.disable()
    for _ in range(repetitions):
        for name, method in methods.items():
            seconds[name].append(seconds_per_call(method, arguments, calls))
        gc.collect()
    gc.enable()
    gc.unfreeze()
    torch.set_num_threads(threads)
    result = {name: statistics.median(times) for name, times in seconds.items()}
    return {**result, "ratio": result["higher"] / result["closed form"]}


def main() -> None:
    """Print what `compare` measures, and how far the two gradients are apart."""
    head, optimizer, batch = problem()
    exact, reference = closed_form(head, optimizer, batch), with_higher(head, optimizer, batch)
    result = compare()
    print(f"closed form {1e6 * result['closed form']:.0f} us, higher {1e6 * result['higher']:.0f} us: "
          f"{result['ratio']:.1f} times faster; relative difference "
          f"{float((exact - reference).norm() / reference.norm()):.1e} (float32)")


if __name__ == "__main__":
    main()
