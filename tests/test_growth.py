"What must not grow with a table, counted and not timed: permutations, seeds and operators of a step; ratios are printed."
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import bench_growth  # noqa: E402
from bench_hypergrad import operations  # noqa: E402

import hpl_nb.core  # noqa: E402
import hpl_nb.data.core  # noqa: E402
import hpl_nb.training.predict  # noqa: E402
from hpl_nb.bench import Bench, relative, table_loop  # noqa: E402
from hpl_nb.methods.hpl import HPL  # noqa: E402
from hpl_nb.methods.mean_teacher import MeanTeacher  # noqa: E402
from hpl_nb.training.predict import Evaluator  # noqa: E402

METHODS = [HPL.paper(), MeanTeacher()]
OPERATORS = {HPL.paper(): 2.5, MeanTeacher(): 1.4} # at most, of a step; the bare loop's are 1


class Counted:
    "A generator of random numbers that notes how many rows it permutes or chooses from."
    def __init__(self, generator, noted): self.generator, self.noted = generator, noted

    def permutation(self, count):
        self.noted.append(count)
        return self.generator.permutation(count)

    def __getattr__(self, name): return getattr(self.generator, name)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.title)
def test_a_stream_is_permuted_once_a_pass(method, monkeypatch):
    "64 labelled rows are four batches, 720 unlabelled ones 45."
    loop, noted, make = table_loop(Bench(batch=16), method, 800), [], np.random.default_rng
    monkeypatch.setattr(hpl_nb.data.core.np.random, "default_rng", lambda *seed: Counted(make(*seed), noted))
    loop.run(90)
    assert Counter(noted) == {64: 23, 720: 2}


@pytest.mark.parametrize("view, seeds", [("plain", 0), ("weak", 3)])
def test_no_seeds_that_nobody_reads(view, seeds, monkeypatch):
    "A view of a batch reads the first of each 256 rows."
    training = table_loop(Bench(), MeanTeacher(), 600).train.__self__
    hashed, derive = [], hpl_nb.core.derive_seed
    for module in (hpl_nb.core, hpl_nb.data.core, hpl_nb.training.predict):
        monkeypatch.setattr(module, "derive_seed", lambda *keys: hashed.append(keys) or derive(*keys))
    evaluator = Evaluator(training.method, training.data, training.accelerator)
    evaluator.map_rows(np.arange(600), (view,), lambda x: {"y": training.method.predict(x)})
    assert sum("evaluation" in keys for keys in hashed) == seeds and (seeds or not hashed)


@pytest.fixture
def bare_operators(monkeypatch):
    "What a step more costs."
    size, counts = bench_growth.Size(1000), []
    for steps in (3, 4):
        monkeypatch.setattr(bench_growth, "STEPS", steps)
        counts.append(operations(partial(bench_growth.bare_loop, *bench_growth.table(size), size)))
    return counts[1] - counts[0]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.title)
def test_operators_of_a_step(method, bare_operators):
    "As many for any number of rows, and not many more than those of a bare loop of MeanTeacher."
    loops = [table_loop(Bench(), method, rows) for rows in (800, 8000)]
    for loop in loops: loop.run(3)
    counts = [operations(partial(loop.run, 1)) for loop in loops]
    print(f"{method.title}: {counts[0]} operators a step, {counts[0]/bare_operators:.2f} of the bare loop's")
    assert counts[0] == counts[1] <= OPERATORS[method]*bare_operators


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.title)
def test_a_step_searches_no_module_and_reads_no_signature(method):
    "As accelerate does before each step of its wrapped optimiser."
    loop, called = table_loop(Bench(batch=16), method, 800), set()
    loop.run(3)
    sys.setprofile(lambda frame, event, _: event == "call" and called.add(frame.f_code.co_name))
    try: loop.run(1)
    finally: sys.setprofile(None)
    assert "training_step" in called and not called & {"find_spec", "signature", "_signature_from_callable"}


def test_growth_is_measured_row_by_row(tmp_path, monkeypatch):
    "A small table; the file goes on where it ends, and the ratios to the bare loop are printed."
    monkeypatch.setattr(bench_growth, "STEPS", 50)
    monkeypatch.setattr(bench_growth, "FITS", {name: bench_growth.FITS[name] for name in ("bare loop", "MeanTeacher", "HPL", "boosting")})
    file, sizes = tmp_path/"growth.csv", [bench_growth.Size(1000), bench_growth.Size(1000, outputs=2)]
    bench_growth.add_fits(file, 1, sizes[:1])
    first = file.read_text()
    bench_growth.add_fits(file, 1, sizes)
    table = pd.read_csv(file)
    assert file.read_text().startswith(first) and len(table) == 8
    assert (table.drop(columns=["round", "name", "MB"]) > 0).all(axis=None)
    found = relative(table, bench_growth.Size()._asdict())
    print(found.to_string())
    assert (found["bare loop"] == 1).all() and {*found.columns} == {*bench_growth.FITS}
