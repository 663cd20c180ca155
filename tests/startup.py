"""Measure what starting costs: processor seconds and memory of an import and of each kind of help page.

    python tests/startup.py            # of this checkout
    python tests/startup.py FOLDER     # of another checkout beside this one, in turns, and the ratio
"""
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5 # of which the median is printed
IMPORTS = {"the libraries alone": "import torch, pandas, sklearn.base, accelerate",
           "import of the estimator": "from hpl_nb import SemiSupervisedRegressor"}
PAGES = ("hpl_train --help", "hpl_train hpl_paper --help", "hpl_train hpl_paper utkface --help", "hpl_compare utkface --help",
         "hpl_queue --help", "hpl_store --help", "hpl_figures --help", "hpl_demo --help", "hpl_bench --help")


def cost(code, root):
    "Processor seconds and megabytes of a fresh Python, which reads compiled modules."
    environ = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": ""}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=environ, cwd=root)
    _, status, used = os.wait4(process.pid, 0)
    if status: raise RuntimeError(f"failed in {root}: {code}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss/1024


def main():
    roots = [*map(Path, sys.argv[1:]), ROOT]
    codes = IMPORTS | {page: f"from hpl_nb.cli import {page.split()[0]} as command; command({page.split()[1:]})" for page in PAGES}
    for name, code in codes.items():
        rounds = [[cost(code, root) for root in roots] for _ in range(ROUNDS + 1)][1:] # the first one compiles
        columns = [f"{median(row[0] for row in column):.2f} s {max(row[1] for row in column):4.0f} MB" for column in zip(*rounds)]
        ratio = f"  {median(row[-1][0]/row[0][0] for row in rounds):.2f}" if len(roots) > 1 else ""
        print(f"{name:38}", *columns, ratio, flush=True)


if __name__ == "__main__": main()
