"""How time and memory grow with a table, a network, a batch and the outputs: the estimator beside what one would use instead.

    python tests/bench_growth.py                  # what growth.csv and hypergradient.csv in data/results/bench lack; remove them for all
    python tests/bench_growth.py FOLDER ROUNDS    # with PYTHONPATH=CHECKOUT: of another version

Each fit has a process of its own with one thread; fits of one size take turns. A step lasts from one `optimizer.step()` to the next.
Peers that are not installed are left out. No other file needs them, so they are best in an environment of their own, beside the package:
`pip install skorch torchopt higher` and `pip install --no-deps lamda-ssl`, which asks for torchtext and torch-geometric, and uses neither.
"""
import copy
import os
import sys
import time
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1", "KINETO_LOG_LEVEL": "9"} # before NumPy, PyTorch
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from sklearn.ensemble import HistGradientBoostingRegressor  # noqa: E402
from sklearn.multioutput import MultiOutputRegressor  # noqa: E402
from torch.nn.functional import mse_loss  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from bench_hypergrad import contenders, in_turns, peers, problem, ratio  # noqa: E402
from bench_hypergrad import peak_memory as peak_bytes  # noqa: E402

from hpl_nb.bench import peak_memory  # noqa: E402
from hpl_nb.data.core import StreamSettings  # noqa: E402
from hpl_nb.estimator import SemiSupervisedRegressor  # noqa: E402
from hpl_nb.models import mlp  # noqa: E402
from hpl_nb.training.state import OptimizerSettings, Train  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1]/"data"/"results"/"bench"
COLUMNS, STEPS, TREES, RATE = 20, 300, 100, 1e-3


class Size(NamedTuple):
    "Of a table of which a tenth is labelled, and of what is fitted to it."
    rows: int = 10_000
    width: int = 64 # of two hidden layers
    batch: int = 32 # labelled rows a step, and as many unlabelled ones
    outputs: int = 1


GROWTH = {"rows": (1_000, 100_000, 1_000_000), "width": (16, 256, 1024), "batch": (8, 128, 256), "outputs": (4, 16)}
HEADS = [(512, 32, 1), (16, 32, 1), (64, 32, 1), (2048, 32, 1), (512, 8, 1), (512, 256, 1), (512, 32, 4), (512, 32, 16)] # d, n, K
SIZES = [Size(), *(Size(**{name: value}) for name, values in GROWTH.items() for value in values)]


def table(size):
    "Features and labels in which a network finds more than a linear model."
    draw = np.random.default_rng(0)
    X = draw.normal(size=(size.rows, COLUMNS)).astype(np.float32)
    y = np.stack([np.sin(2*X[:, k]) + X[:, k + 1]*X[:, k + 2] for k in range(size.outputs)], 1) + .1*draw.normal(size=(size.rows, 1))
    return X, np.where(np.arange(size.rows)[:, None] < size.rows//10, y, np.nan).astype(np.float32)


def network(size): return mlp(COLUMNS, (size.width,)*2, size.outputs, linear_path=True)


# ---- mean teacher without a library: what one would write for one table

def noisy(x, scale): return x + scale*torch.randn_like(x)


def mean_teacher_loss(student, teacher, x, y, unlabelled):
    with torch.no_grad(): pseudo_label = teacher(noisy(unlabelled, .05))
    return mse_loss(student(noisy(x, .05)), y) + mse_loss(student(noisy(unlabelled, .1)), pseudo_label)


@torch.no_grad()
def follow(teacher, student):
    for slow, fast in zip(teacher.parameters(), student.parameters()): slow.lerp_(fast, .01)


def batches(rows, size):
    "Shuffled row numbers, pass after pass."
    while True: yield from rows[torch.randperm(len(rows))].split(size)


def bare_loop(X, y, size):
    x, y = torch.from_numpy((X - X.mean(0))/X.std(0)), torch.from_numpy(y)
    known = y.isfinite().all(1)
    y = (y - y[known].mean(0))/y[known].std(0)
    student = network(size)
    teacher, optimizer = copy.deepcopy(student), torch.optim.Adam(student.parameters(), RATE)
    labelled, unlabelled = (batches(torch.nonzero(rows)[:, 0], size.batch) for rows in (known, ~known))
    for _, i, j in zip(range(STEPS), labelled, unlabelled):
        optimizer.zero_grad()
        mean_teacher_loss(student, teacher, x[i], y[i], x[j]).backward()
        optimizer.step()
        follow(teacher, student)
    return lambda X: predicted(teacher, X)


@torch.no_grad()
def predicted(network, X): return network.eval()(torch.from_numpy(X)).numpy()


# ---- peers, and ours

def boosting(X, y, size):
    known, model = np.isfinite(y).all(1), HistGradientBoostingRegressor(max_iter=TREES, early_stopping=False)
    return (MultiOutputRegressor(model).fit(X[known], y[known]) if size.outputs > 1 else model.fit(X[known], y[known, 0])).predict


def with_skorch(X, y, size):
    "Batches of all rows, of which those without a label have a pseudo-label."
    from skorch import NeuralNetRegressor
    from torch.utils.data import RandomSampler

    class MeanTeacherNet(NeuralNetRegressor):
        def initialize_module(self):
            super().initialize_module()
            self.teacher_ = copy.deepcopy(self.module_)
            return self

        def train_step_single(self, batch, **_):
            self._set_training(True)
            (x, y), known = batch, batch[1].isfinite().all(1)
            loss = mean_teacher_loss(self.module_, self.teacher_, x[known], y[known], x[~known])
            loss.backward()
            return {"loss": loss, "y_pred": None}

        def train_step(self, batch, **_):
            step = super().train_step(batch)
            follow(self.teacher_, self.module_)
            return step

    sampler = RandomSampler(range(len(X)), replacement=True, num_samples=STEPS*2*size.batch)
    net = MeanTeacherNet(network(size), optimizer=torch.optim.Adam, lr=RATE, max_epochs=1, batch_size=2*size.batch, train_split=None,
                         iterator_train__sampler=sampler, iterator_valid__batch_size=4096, verbose=0)
    return net.fit(X, y).predict


def lamda_ssl(X, y, size):
    "Its release of 2022 asks scikit-learn for two names that have moved since."
    import sklearn.base
    import sklearn.utils
    from sklearn.utils.extmath import _approximate_mode
    sklearn.utils._approximate_mode, sklearn.base.RegressorMixin._estimator_type = _approximate_mode, "regressor"
    from LAMDA_SSL.Algorithm.Regression.MeanTeacherReg import MeanTeacherReg
    from LAMDA_SSL.Dataloader.LabeledDataloader import LabeledDataLoader
    from LAMDA_SSL.Dataloader.UnlabeledDataloader import UnlabeledDataLoader
    from LAMDA_SSL.Opitimizer.Adam import Adam
    from LAMDA_SSL.Sampler.RandomSampler import RandomSampler
    known, loader = np.isfinite(y).all(1), dict(num_workers=0, drop_last=True, prefetch_factor=None)
    def sampler(): return RandomSampler(replacement=True, num_samples=STEPS*size.batch)
    model = MeanTeacherReg(network=network(size), optimizer=Adam(lr=RATE), scheduler=None, lambda_u=1., ema_decay=.99, epoch=1,
                           num_it_epoch=STEPS, labeled_sampler=sampler(), unlabeled_sampler=sampler(),
                           labeled_dataloader=LabeledDataLoader(batch_size=size.batch, **loader),
                           unlabeled_dataloader=UnlabeledDataLoader(**loader),
                           test_dataloader=UnlabeledDataLoader(batch_size=4096, num_workers=0, prefetch_factor=None))
    return model.fit(X[known], y[known], X[~known]).predict


def ours(method):
    "The estimator without other arguments where the size is the default's."
    def fit(X, y, size):
        streams = StreamSettings(size.batch, size.batch)
        train = None if size.batch == Size().batch else Train(optimizer=OptimizerSettings(RATE, RATE, 0.), streams=streams)
        own = None if size.width == Size().width else lambda shape, outputs: network(size)
        model = SemiSupervisedRegressor(method, own, epochs=STEPS//50, train=train, random_state=0, verbose=False)
        return model.fit(X, y if size.outputs > 1 else y[:, 0]).predict
    return fit


FITS = {"bare loop": bare_loop, "MeanTeacher": ours("mean_teacher"), "HPL": ours("hpl_paper"), "boosting": boosting}
if find_spec("skorch"): FITS["skorch"] = with_skorch
if find_spec("LAMDA_SSL"): FITS["LAMDA-SSL"] = lamda_ssl


# ---- measurements

def now(): return np.array([time.perf_counter(), time.process_time()])


def measure(name, size):
    "Milliseconds of a step (of boosting: of a tree), seconds of the fit, microseconds of predicting a row, MB that the fit needs."
    (X, y), steps = table(size), defaultdict(list)
    register_optimizer_step_post_hook(lambda optimizer, *_: steps[id(optimizer)].append(now())) # HPL has two, each of which steps once
    memory, start = peak_memory(), now()
    predict = FITS[name](X, y, size)
    memory, end = peak_memory() - memory, now()
    predict(X := X[:100_000])
    predicting = 1e6*(now() - end)/len(X)
    step = np.median(np.concatenate([np.diff(times, axis=0) for times in steps.values()]), axis=0) if steps else (end - start)/TREES
    pairs = {"ms": 1e3*step, "fit_seconds": end - start, "predict_us": predicting}
    return {f"{kind}{key}": value for key, pair in pairs.items() for kind, value in zip(("", "cpu_"), pair)} | {"MB": memory}


def in_fork(*arguments):
    "In a process that has imported all there is to import, and gives its memory back."
    with ProcessPoolExecutor(1, get_context("fork")) as pool: return pool.submit(measure, *arguments).result()


def warm_up():
    "What is imported or allocated by a first fit is none of what the measured ones cost: the processes of these begin after it."
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for fit in FITS.values(): fit(*table(Size(1000)), Size(1000))


def there(file, columns):
    "What a file holds already, by some of its columns."
    return {*pd.read_csv(file)[columns].itertuples(index=False, name=None)} if file.exists() else set()


def append(file, rows): pd.DataFrame(rows).to_csv(file, mode="a", header=not file.exists(), index=False, float_format="%.4g")


def add_fits(file, rounds, sizes=SIZES):
    "Measure what a file lacks, row by row, each size with all contestants in turns."
    keys = ["round", "name", *Size._fields]
    done = there(file, keys)
    for turn, size, name in product(range(rounds), sizes, FITS):
        if (key := (turn, name, *size)) not in done: append(file, [dict(zip(keys, key)) | in_fork(name, size)])


def add_hypergradients(file, sizes=HEADS):
    "The same for one hypergradient by the closed form, by the fewest operations that give its numbers, and by its peers."
    names, done = ["ours", "fewest", *peers()], there(file, ["optimizer", "d", "n", "K"])
    for kind, size in product((torch.optim.SGD, torch.optim.Adam), sizes):
        if (kind.__name__, *size) in done: continue
        timed = contenders(problem(*size, kind), peers(), None)
        seconds = in_turns({name: timed[name] for name in names})
        common = dict(zip(("optimizer", "d", "n", "K"), (kind.__name__, *size)))
        append(file, [common | {"name": name, "us": 1e6*np.median(seconds[name]), "ratio": ratio(seconds, name, "ours"),
                                "KB": peak_bytes(timed[name])/2**10} for name in names])


def main(folder=FOLDER, rounds=3):
    warm_up()
    add_fits(Path(folder)/"growth.csv", int(rounds))
    add_hypergradients(Path(folder)/"hypergradient.csv")
    from hpl_nb.bench import relative  # which an earlier checkout lacks
    print(relative(pd.read_csv(Path(folder)/"growth.csv"), Size()._asdict()).round(2).to_string())


if __name__ == "__main__": main(*sys.argv[1:])
