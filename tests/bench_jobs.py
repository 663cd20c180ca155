"""Runs side by side against one after the other: wall and processor seconds of `run_all`, in turns, in one session.

    python tests/bench_jobs.py                 # 4 short runs, one at a time and two
    python tests/bench_jobs.py 6 20 2 ray      # runs, epochs, jobs, and Ray too
"""
import json
import sys
import tempfile
import threading
import time

import psutil
import torch

from hpl_nb.data.rotated_digits import RotatedDigits
from hpl_nb.experiment import DATASETS, Experiment
from hpl_nb.methods.hpl import HPL
from hpl_nb.runner import ray_cluster, run_all
from hpl_nb.settings import change


def look(seen):
    "Add the processor seconds of this process and of all that it has started, by their ids."
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        try: seen[process.pid, process.create_time()] = sum(process.cpu_times()[:2])
        except psutil.Error: continue


def keep_looking(seen, over):
    while not over.wait(.5): look(seen)


def main(runs=4, epochs=2, jobs=2, *more):
    "Two rounds: the first has the start of all processes in it."
    torch.set_num_threads(1)
    seen, over, train = {}, threading.Event(), change(DATASETS[0].train, epochs=int(epochs))
    threading.Thread(target=keep_looking, args=(seen, over)).start()
    todo = [Experiment(RotatedDigits(), HPL.paper(), train=train, seed=seed) for seed in range(int(runs))]
    for turn in ("first", "second"):
        for parallel, kind in ((1, ""), (int(jobs), ""), *[(int(jobs), "ray")]*("ray" in more)):
            look(seen)
            before, start = sum(seen.values()), time.perf_counter()
            with tempfile.TemporaryDirectory() as out:
                done = run_all(todo, out, parallel, progress=False, backend=ray_cluster() if kind else None)
                wall = time.perf_counter() - start
            look(seen)
            said = {"turn": turn, "jobs": parallel, "backend": kind or "processes", "wall": wall, "processor": sum(seen.values()) - before}
            print(json.dumps(said | {"mae": sum(run.metrics["test_mae"] for run in done)}), flush=True) # the same in every row
    over.set()


if __name__ == "__main__": main(*sys.argv[1:])
