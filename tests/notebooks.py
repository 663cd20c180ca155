"""Run notebooks as `nbdev_test` does, and compare what they put out with the outputs that are stored.

    python tests/notebooks.py                          # all of them
    python tests/notebooks.py nbs/40_loss.ipynb        # some
"""
import argparse
import math
import multiprocessing
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["TQDM_DISABLE"] = "1" # a bar shows times, which no run repeats
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?", re.I)
ADDRESS = re.compile(r"(?: at)? 0x[0-9a-f]+\b") # of memory, which nbdev_clean removes
MEASURED = re.compile(r"\d+(?:[.,]\d+)* ?(?:ms|s|seconds|GB|MB)\b") # times and sizes, which no run repeats
TOLERANCE = .02 # relative: another processor and another thread count round otherwise
VARIES = "varies" # `#| varies`: a cell whose output no other run repeats


def said(output):
    "What an output says in words and numbers, spaces apart."
    data = output.get("data", {})
    text = output.get("text") or next((data[kind] for kind in ("text/markdown", "text/plain") if kind in data), "")
    return " ".join(MEASURED.sub("~", ADDRESS.sub("", "".join(text))).split())


def is_same(stored, fresh):
    "Equal words, and numbers that are equal to rounding."
    if NUMBER.sub("#", stored) != NUMBER.sub("#", fresh): return False
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(fresh))
    return all(a == b or math.isclose(number(a), number(b), rel_tol=TOLERANCE, abs_tol=last_digit(a)) for a, b in pairs)


def number(text): return float(text.replace(",", ""))


def last_digit(text):
    "One unit of the last digit of a decimal fraction; 0 of a whole number."
    decimals = re.search(r"\.(\d+)$", text)
    return 1.01*10.**-len(decimals[1]) if decimals else 0.


def stale(stored, fresh):
    "Where the outputs of a cell differ from what it puts out now, in words; empty: nowhere. Warnings are stored nowhere."
    before, now = (" ".join(said(output) for output in outputs if output.get("name") != "stderr") for outputs in (stored, fresh))
    if is_same(before, now): return ""
    words = [(a, b) for a, b in zip(before.split(), now.split()) if not is_same(a, b)]
    first, second = words[0] if words else (before[-40:], now[-40:])
    return f"stored {first!r:.80}, now {second!r:.80}"


def run(path):
    "Run one notebook: (whether it passed, seconds, cells whose stored output is stale)."
    multiprocessing.current_process()._config["daemon"] = False # a notebook may train in several processes
    import nbdev.test
    from nbdev.config import get_config
    found = []
    class Comparing(nbdev.test.CaptureShell):
        def cell(self, cell, **options):
            if cell.cell_type != "code": return
            stored, cell.outputs = cell.outputs, []
            super().cell(cell, **options)
            if not self.exc and VARIES not in (cell.directives_ or {}) and (why := stale(stored, cell.outputs)):
                found.append(f"{path.relative_to(ROOT).as_posix()}, cell {cell.idx_}: {why}")
    nbdev.test.CaptureShell = Comparing # what `test_nb` runs notebooks in
    passed, seconds = nbdev.test.test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    return passed, seconds, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="empty: all")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    import notebooks  # as another module than __main__, whose place a notebook takes
    import pandas as pd
    import torch  # noqa: F401 (once, for all processes)
    from nbdev.doclinks import nbglob
    paths = [path.resolve() for path in args.notebooks] or sorted(path.resolve() for path in nbglob(ROOT/"nbs", as_path=True))
    pd.set_option("display.max_columns", 20) # as in Jupyter
    problems, times = [], {}
    with multiprocessing.get_context("fork").Pool(args.workers, os.chdir, [ROOT], maxtasksperchild=1) as pool: # a process for each notebook
        for path, (passed, seconds, found) in zip(paths, pool.imap(notebooks.run, paths, chunksize=1)):
            times[path.name] = seconds
            problems += [] if passed else [f"{path.relative_to(ROOT).as_posix()} failed"]
            problems += [f"{each}; run the notebook and store its outputs" for each in found]
    for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:9]: print(f"{name}: {seconds:.0f} s")
    print(*problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__": sys.exit(main())
