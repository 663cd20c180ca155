"""Processor time of reading files and of predicting, as a multiple of the work that nobody can leave out, on one thread and in turns.

Run `python tests/bench_files.py --rows 1000000 --faces ../shared/data/utkface`; without `--faces` it draws 500 pictures.
It prints the median ratio of each pair and the rows or pictures a second.
"""
import argparse
import hashlib
import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from hpl_nb.bench import made_up_faces
from hpl_nb.core import PREDICTION_COLUMNS, RunFolder
from hpl_nb.data import check
from hpl_nb.data.images import ImageFiles
from hpl_nb.data.tables import read_table
from hpl_nb.data.utkface import read_faces
from hpl_nb.estimator import SemiSupervisedRegressor
from hpl_nb.training.predict import evaluating
from hpl_nb.training.run import Run, load_run, write_results


def in_turns(name, count, ours, least, turns=5):
    "Print how many times longer than `least` it takes, where `count` things are read or predicted."
    pairs = []
    for _ in range(turns + 1): # the first warms up
        seconds = []
        for function in (ours, least):
            start = time.process_time()
            function()
            seconds.append(time.process_time() - start)
        pairs.append(seconds)
    ratio, taken = statistics.median(one/other for one, other in pairs[1:]), statistics.median(one for one, _ in pairs[1:])
    print(f"{name:42} {ratio:5.2f} {count/taken:12,.0f} a second", flush=True)


def predictions(rows):
    "A predictions table of ten epochs."
    random, split = np.random.default_rng(0), np.repeat(["unlabelled", "val", "test"], [rows - 2*(rows//5), rows//5, rows//5])
    numbers = {name: random.normal(size=rows) for name in PREDICTION_COLUMNS[9:]}
    same = {"run": "made up/0.05/HPL/0", "method": "HPL", "dataset": "made up", "label_ratio": .05, "seed": 0, "output": 0}
    return pd.DataFrame(numbers | {"index": np.arange(rows)//10, "epoch": np.arange(rows) % 10 + 1, "split": split}).assign(**same)


def bench_tables(folder, rows):
    table = predictions(rows).reindex(columns=PREDICTION_COLUMNS)
    table.to_csv(folder/"table.csv", index=False)
    in_turns("table of text, pandas", rows, lambda: read_table(folder/"table.csv", []),
             lambda: pd.read_csv(folder/"table.csv", dtype=str, keep_default_na=False))
    run = {"format": 2, "run": "", "dataset": "", "method": "", "unit": "", "label_ratio": .05, "seed": 0, "settings": {}}
    (place := RunFolder(folder)).write_json("config.json", run)
    write_results(place, Run(run, pd.DataFrame({"epoch": [1]}), {"epoch": 1, "epochs": 1, "steps": 1, "seconds": 1.}, table, True))
    in_turns("load_run, pandas", rows, lambda: load_run(folder), lambda: pd.read_parquet(place.predictions))


def decode(content, size=None):
    with Image.open(io.BytesIO(content)) as image:
        if size: image.draft("RGB", (size, size))
        rgb = image.convert("RGB")
        return rgb.resize((size, size), Image.Resampling.BILINEAR) if size else rgb


def bench_pictures(folder, faces):
    def least():
        for source in sources:
            with open(source.path, "rb") as file:
                file.seek(source.offset)
                content = file.read(source.size)
            decode(content), hashlib.sha256(content).hexdigest()

    plain, packed = folder/"plain", folder/"packed"
    for place in (plain/"UTKFace", packed): place.mkdir(parents=True)
    with tarfile.open(packed/"images-0.tar", "w") as tar:
        for source in read_faces(faces)[1]:
            with open(source.path, "rb") as file:
                file.seek(source.offset)
                (path := plain/"UTKFace"/source.name).write_bytes(file.read(source.size))
            tar.add(path, source.name)
    for root in (plain, packed):
        (root/"utkface.csv").write_bytes((faces/"utkface.csv").read_bytes())
        sources = read_faces(root)[1]
        in_turns(f"check, Pillow and SHA-256 ({root.name})", len(sources), lambda: check(root, progress=False), least, 3)
    paths = sorted((plain/"UTKFace").iterdir())[:1000]
    drafts = ImageFiles(paths, 64, draft=True)
    in_turns("draft at 64 pixels, Pillow's", len(paths), lambda: [drafts[row] for row in range(len(paths))],
             lambda: [decode(path.read_bytes(), 64) for path in paths])


def bench_predict(rows, columns=20):
    X = np.random.default_rng(0).normal(size=(rows, columns))
    y = np.where(np.arange(2000) < 1000, X[:2000, 0], np.nan)
    model = SemiSupervisedRegressor(epochs=1, random_state=0, verbose=False).fit(X[:2000], y)
    predictor = model.predictor_
    x = predictor.view(predictor.reader(X), None)

    def least():
        with evaluating(predictor.method): predictor.method.predict(x)

    in_turns("Predictor.predict, network on one batch", rows, lambda: predictor.predict(X), least)
    in_turns("model.predict, network on one batch", rows, lambda: model.predict(X), least)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--faces", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'ours, the least':42} ratio")
    with tempfile.TemporaryDirectory() as folder:
        bench_tables(Path(folder), options.rows)
        bench_pictures(Path(folder)/"pictures", options.faces or made_up_faces(Path(folder)/"faces", 500))
    bench_predict(options.rows)
