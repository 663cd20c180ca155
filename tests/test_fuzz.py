"""Whatever a file holds, its reader reads it or refuses it with a sentence that names it: no other error, no hang, no code that is run,
nothing written anywhere else, no memory that the file's length does not explain.

Every place where the package opens a file that is not its own, and the reader below that goes through it:

    data.tables.read_table (.csv, .tsv, .parquet)               tables: csv, tsv, parquet; utkface, imdb_wiki, own pictures
    data.images.find_images (names of pictures in a table)      names that lead elsewhere
    data.images.read_source, decode_image, open_image           a picture of each format, picture in a data set
    data.images.content_hashes, quick_keys                      picture in a data set
    data.images.tar_index                                       tar
    data.tables.sha256, fetch                                   fetched table
    data.pixels.is_intact, DiskCache                            decoded pictures
    data.utkface.read_faces, data.imdb_wiki.read_actors         utkface, imdb_wiki
    data.own.from_images, picture_table                         own pictures
    data.check.read_layout, check_pairs                         checked pictures, checked pairs
    data.stsb.read_pairs                                        stsb
    data.stsb.load_vectors (.txt, .zip, .npz)                   word vectors: npz, txt, zip
    data.stsb.read_wordnet (data.*, *.exc)                      wordnet: data, exceptions
    models._read_weights (.safetensors, .pth)                   weights: safetensors, pth, legacy pth
    predictor.read_content, Predictor.load                      predictor
    estimator.SemiSupervisedRegressor.load, read_transformer    estimator
    core.RunFolder.read_json, core.content_digest               run: all files
    training.run.run_lock (who holds the folder)                lock
    training.run.load_run, check_results, stored_run            run: all files; stored run: json, parquet
    training.checkpoint.read_checkpoint, read_place             checkpoint
    runner.check_folder, store.run_summary (experiments)        run: experiment; stored run: experiment
    experiment.read_experiment                                  experiment
    convert.convert_runs                                        run to convert
    store.merge_runs                                            through load_run

Tables and registries in hpl_nb/resources are the package's own and are not read from elsewhere.
"""
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tarfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import broken_files as broken
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from safetensors.torch import save_file
from small_runs import forked
from torch import nn

from hpl_nb.convert import convert_runs
from hpl_nb.core import HplError, RunFolder
from hpl_nb.data import check
from hpl_nb.data.core import StreamSettings
from hpl_nb.data.images import ImageFiles, ImageSource, decode_image, exact_count, tar_index
from hpl_nb.data.imdb_wiki import imdb_wiki
from hpl_nb.data.own import Reading, from_arrays, from_images
from hpl_nb.data.pixels import disk_cache
from hpl_nb.data.stsb import STSB, load_vectors, read_wordnet, stsb
from hpl_nb.data.tables import fetch, read_table
from hpl_nb.data.utkface import utkface
from hpl_nb.estimator import SemiSupervisedRegressor
from hpl_nb.experiment import Experiment, read_experiment
from hpl_nb.methods.core import Supervised
from hpl_nb.methods.hpl import HPL
from hpl_nb.models import _load_trunk, mlp
from hpl_nb.predictor import Predictor, checksum
from hpl_nb.runner import check_folder
from hpl_nb.settings import as_json
from hpl_nb.store import merge_runs, store_run
from hpl_nb.training.checkpoint import read_place
from hpl_nb.training.loop import fit
from hpl_nb.training.run import load_run, run_lock
from hpl_nb.training.state import OptimizerSettings, Train

MANY = 1000 # inputs per reader, beside the traps
ROOM = 2**31 # bytes that a reader may ask for beyond what the process has
SECONDS = 120 # for one input, on a machine that is busy with something else


# ---- good files, and who reads them

@dataclass(frozen=True)
class Reader:
    "What writes a good file below a folder (and says which), and what reads it."
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    forge: Callable[[bytes, Any], bytes]|None = None # half of the inputs: damaged inside, with checksums that are right
    quick: int = 200 # inputs in the default run; the slow one takes all
    traps: dict[str, Callable] = field(default_factory=dict) # beside those that every reader meets: (path, canary) -> None
    speaks_of: Callable[[Path], Path] = lambda path: path # what a refusal must name
    writes: Callable[[Path], Path]|None = None # the folder that it may change
    claims: bool = False # may memory be reserved that a file only claims to need (and is never touched)?
    most_accepted: float = .9 # share of the damaged inputs that may pass: more, and nothing was tested


def pixels(number, side=8): return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def picture_folder(root, table, lines, below=""):
    (root/below).mkdir(parents=True)
    for number in range(8): pixels(number).save(root/below/f"{number}.png")
    (root/table).write_text("\n".join(lines) + "\n")
    return root/table


SPLITS = ("train", "train", "train", "train", "val", "val", "test", "test")


def faces(root):
    lines = [f"{number}.png,{20 + number},{split}" for number, split in enumerate(SPLITS)]
    return picture_folder(root, "utkface.csv", ["FileName,age,SPLIT", *lines], "UTKFace")


def actors(root):
    lines = [f"{20 + number},crop/{number}.png,{split}" for number, split in enumerate(SPLITS)]
    return picture_folder(root, "imdb_wiki.csv", ["age,path,split", *lines], "crop")


def own(root): return picture_folder(root, "mine.csv", ["file,y,split", *(f"{n}.png,{n/7},{s}" for n, s in enumerate(SPLITS))])


def own_parquet(root):
    table = own(root)
    pd.read_csv(table).to_parquet(table.with_suffix(".parquet"))
    table.unlink()
    return table.with_suffix(".parquet")


def own_picture(root): return own(root).with_name("2.png")


def tarred(root):
    table = faces(root)
    with tarfile.open(root/"images-0.tar", "w") as archive:
        for path in sorted((root/"UTKFace").iterdir()): archive.add(path, f"a/{path.name}")
    shutil.rmtree(root/"UTKFace")
    return table.with_name("images-0.tar")


def simple_table(name):
    def make(root):
        root.mkdir()
        notes = ['a "b"', "ü", "x, y", "", "z\nz", "é"]
        frame = pd.DataFrame({"file": [f"{n}.png" for n in range(6)], "age": np.arange(6)*1.5, "note": notes})
        if name.endswith("parquet"): frame.to_parquet(root/name)
        else: frame.to_csv(root/name, index=False, sep="\t" if name.endswith("tsv") else ",")
        return root/name
    return make


def pairs(root):
    root.mkdir()
    rows = [[f"A dog number {n} runs.", f"A cat, number {n}, sleeps.", str(n % 5), split, f"A hound {n}.", f"A pet {n}."]
            for n, split in enumerate(["train"]*4 + ["dev", "dev", "test", "test"])]
    lines = ["\t".join(row) for row in [["sentence1", "sentence2", "score", "split", "sent_s1", "sent_s2"], *rows]]
    (root/"sts.tsv").write_text("\n".join(lines) + "\n")
    return root/"sts.tsv"


WORDS = ["<pad>", "<unk>", "cat", "dog", "é"]
GLOVE = "".join(f"{word} {' '.join(f'{.1*k + n:.3f}' for k in range(6))}\n" for n, word in enumerate(["the", *WORDS[2:], "of"])).encode()


def vectors(kind):
    def make(root):
        root.mkdir()
        path = root/f"glove.{kind}"
        if kind == "npz": np.savez(path, words=np.array(WORDS[2:]), vectors=np.arange(18, dtype=np.float32).reshape(3, 6))
        else: path.write_bytes(GLOVE if kind == "txt" else broken.packed({"glove.6d.txt": GLOVE}, stored=False))
        return path
    return make


def wordnet(name):
    def make(root):
        root.mkdir()
        data = ("  1 This software and database is being provided to you.\n"
                "00001740 03 n 03 entity 0 thing 0 object(a) 1 001 ~ 00001930 n 0000 | that which is\n"
                "00001930 03 n 02 dog 0 hound 0 000 | an animal\n")
        for part in ("noun", "verb", "adj", "adv"):
            (root/f"data.{part}").write_text(data)
            (root/f"{part}.exc").write_text("geese goose\nmice mouse\n")
        return root/name
    return make


def small_trunk():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def weights(name, legacy=False):
    def make(root):
        root.mkdir()
        state = {**small_trunk().state_dict(), "fc.weight": torch.ones(2, 2)}
        if name.endswith("safetensors"): save_file(state, root/name, {"strides": "v1"})
        else: torch.save(state, root/name, _use_new_zipfile_serialization=not legacy)
        return root/name
    return make


def read_weights(path): return _load_trunk(small_trunk(), path)


SMALL = Train(epochs=2, iterations_per_epoch=2, streams=StreamSettings(4, 4), optimizer=OptimizerSettings(1e-2, 1e-2))


EXPERIMENT = Experiment(STSB(label_ratio=.05), HPL.paper())


def method(): return Supervised().build(mlp(3, (4,)))


def array_data():
    random = np.random.default_rng(0)
    return from_arrays(random.normal(size=(40, 3)).astype(np.float32), random.normal(size=40))


def saved_predictor(root):
    fitted = method()
    fit(fitted, data := array_data(), SMALL, progress=False)
    return Predictor.from_method(fitted, data).save(root/"model.safetensors")


def read_predictor(path): return Predictor.load(path, method())


def saved_estimator(root):
    frame = pd.DataFrame({"a": np.arange(40.), "kind": list("pq")*20})
    y = np.where(np.arange(40) < 30, np.arange(40.)*2, np.nan)
    settings = {"epochs": 1, "train": Train(iterations_per_epoch=2), "random_state": 0}
    return SemiSupervisedRegressor("supervised", **settings).fit(frame, y).save(root/"model.safetensors")


def read_estimator(path): return SemiSupervisedRegressor.load(path)


def signed(content, draw):
    "A predictor's file whose content was changed, with the checksum of what it holds now."
    size = int.from_bytes(content[:8], "little")
    text, tensors = json.loads(content[8:8 + size])["__metadata__"]["predictor"].partition(" ")[2], load_safetensors(content)
    text = broken.forge_json(text, draw).decode()
    if draw.random() < .3:
        name = draw.choice(sorted(tensors))
        others = torch.zeros(0), torch.full((3,), float("nan")), torch.ones(2, 3, 4, dtype=torch.uint8), -1*tensors[name]
        tensors[name] = draw.choice(others)
    return save_safetensors(tensors, {"predictor": f"{checksum(text, tensors)} {text}"})


def trained(name, checksums=False):
    def make(root):
        fit(method(), array_data(), replace(SMALL, record_every=1), folder=root/"run", progress=False, experiment=as_json(EXPERIMENT))
        if not checksums: (root/"run"/"checksums.json").unlink() # as in runs of version 0.1, where only the readers can notice
        return root/"run"/name
    return make


def stored(suffix):
    def make(root):
        trained("config.json")(root)
        store_run(root/"run", root/"stored"/"0")
        return root/"stored"/f"0{suffix}"
    return make


def stored_as(path): return path.with_suffix("")
def read_stored(path): return load_run(stored_as(path))


def experiment_file(root):
    root.mkdir()
    return RunFolder(root).write_json("experiment.json", as_json(EXPERIMENT))


def to_convert(root):
    "As version 0.1 stored a run at first: flat options, and a table beside it."
    stored(".json")(root)
    content, place = json.loads((root/"stored"/"0.json").read_text()), root/"stored"/"stsb"/"0.05"/"hpl-paper"
    place.mkdir(parents=True)
    for name in ("format", "experiment"): del content["config"][name]
    content["config"] |= {"method": "HPL (paper)", "settings": {"preset": "paper", "outer_every": 5}}
    content["options"] = {"dataset": "stsb", "root": "", "label_ratio": .05, "hidden": 128, "vectors": "glove.npz", "dropout": .2}
    (root/"stored"/"0.parquet").rename(place/"0.parquet")
    (root/"stored"/"0.json").unlink()
    return RunFolder(place).write_json("0.json", content)


def top_of(path): return path.parents[3]
def convert(path): return convert_runs([top_of(path)])


def to_gather(root):
    path = stored(".json")(root)
    (root/"gathered").mkdir()
    return path


def gathered(path): return path.parents[1]/"gathered"


def held(root):
    (root/"run").mkdir(parents=True)
    (root/"run"/"training.lock").write_text("process 1 on here\n")
    return root/"run"/"training.lock"


def second_process(path):
    "What a process is told that finds the folder held by another."
    import fcntl
    with ExitStack() as stack:
        if path.is_file(): fcntl.flock(stack.enter_context(open(path, "r+b")), fcntl.LOCK_EX)
        with run_lock(RunFolder(path.parent)): pass


def cached(root):
    own(root)
    return disk_cache(picture_files(root), root/"cache").path


def picture_files(root): return ImageFiles([root/f"{n}.png" for n in range(3)], 8)


def read_cache(path):
    "The pictures as they are, whatever stood in the cache."
    files = picture_files(path.parent.parent)
    assert all(np.array_equal(a, b) for a, [b] in zip(disk_cache(files, path.parent).pixels, map(files.__getitem__, range(3))))


def fetched(root):
    root.mkdir()
    (root/"utkface.csv").write_text("FileName,age,SPLIT\n")
    return root/"utkface.csv"


def image(kind, mode="RGB", **how):
    def make(root):
        root.mkdir()
        pixels(0).convert(mode).save(root/f"x.{kind}", **how)
        return root/f"x.{kind}"
    return make


def read_image(path): return decode_image(ImageSource(path), 4)


def read_tar(path): return [decode_image(source) for source in tar_index(path).values()]


def read_faces(path):
    data = utkface(path.parent, .5, size=8, labelled_count=exact_count, deduplicate=True)
    return data.plain(data.inputs[data.train if hasattr(data, "train") else data.labelled], None)


def read_actors(path):
    data = imdb_wiki(path.parent, .5, size=8, deduplicate=True)
    return data.plain(data.inputs[data.labelled], None)


def read_own(path, skip_broken=False):
    table = path if path.suffix in (".csv", ".parquet") else path.parent/"mine.csv"
    data = from_images(path.parent, table, "file", "y", split="split", reading=Reading(32, deduplicate=True, skip_broken=skip_broken))
    return data.plain(data.inputs[data.labelled], None)


def checked(path): return str(check(path.parent, progress=False))
def root_of(path): return path.parent


def holding(make): return broken.content(make)


def traps_of_vectors():
    def npz(words, vectors): return broken.packed({"words.npy": words, "vectors.npy": vectors})
    word, npy = broken.npy(["cat"]), broken.npy
    arrays = {"pickled objects": lambda c: npz(word, npy(np.array([broken.Trap(c)], object), True)),
              "an array alone": lambda _: npy([1., 2.]), "a huge array alone": lambda _: broken.huge_npy(),
              "no arrays": lambda _: npz(b"cat", b"1 2"), "vectors of text": lambda _: npz(word, npy([["x", "y"]])),
              "vectors of dates": lambda _: npz(word, npy(np.zeros((1, 2), "M8[s]"))),
              "complex vectors": lambda _: npz(word, npy(np.zeros((1, 2), complex))),
              "no numbers": lambda _: npz(word, npy(np.zeros((1, 0)))),
              "records": lambda _: npz(npy(np.zeros(1, "U3,i4")), npy(np.zeros((1, 1), "f4,f4"))),
              "a header that claims much": lambda _: npz(word, broken.huge_npy("(1, 400000000000)")),
              "words that claim much": lambda _: npz(broken.huge_npy("(1,)", "<U400000000"), npy([[1., 2.]])),
              "zeros that are packed": lambda _: broken.zip_of_zeros("vectors.npy", broken.huge_npy("(2, 402653184)"), 3),
              "words of zeros that are packed": lambda _: broken.zip_of_zeros("words.npy", broken.huge_npy("(1,)", "<U805306368"), 3)}
    return {name: holding(make) for name, make in arrays.items()}


def encrypted(_):
    "The flags of a member say that it is."
    content = broken.packed({"a.txt": GLOVE})
    for header in (b"PK\x03\x04\x14\x00", b"PK\x01\x02\x14\x03\x14\x00"): content = content.replace(header + b"\x00", header + b"\x01")
    return content


def outside(line):
    "A table whose picture lies outside the folder."
    def write(path, canary):
        pixels(0).save(canary.parent/"outside.png")
        whole = canary.parent/"outside.png"
        path.write_text(line.format(up=os.path.relpath(whole, path.parent), whole=whole))
    return write


def names(line):
    return {"a picture further up": outside(line.replace("@", "{up}")), "a picture elsewhere": outside(line.replace("@", "{whole}")),
            "the passwords": outside(line.replace("@", "/etc/passwd")), "no end": outside(line.replace("@", "/dev/zero")),
            "the folder": outside(line.replace("@", ".")), "its parent": outside(line.replace("@", ".."))}


def predictor_traps():
    def huge(_):
        header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        return len(header).to_bytes(8, "little") + header
    return {"huge": holding(huge), "a header without end": holding(lambda _: (2**62).to_bytes(8, "little") + b"{}")}


def checkpoint_traps():
    def saved(value):
        def make(canary):
            torch.save(value(canary), file := io.BytesIO())
            return file.getvalue()
        return holding(make)
    return {"a list": saved(lambda c: [1]), "nothing": saved(lambda c: None), "a tensor": saved(lambda c: torch.ones(3)),
            "code": saved(lambda c: {"method": broken.Trap(c)}), "code in a legacy file": holding(lambda c: broken.pickled(c)*2),
            "a large tensor of one number": saved(lambda c: {"0.weight": torch.zeros(1).expand(2**40)})}


def run_traps(name):
    def list_of(*names): return holding(lambda _: json.dumps({n: "0"*64 for n in names}).encode())
    if name != "checksums.json": return {}
    return {"checksum of /dev/zero": list_of("/dev/zero"), "of a file further up": list_of("../../../../../../../../dev/zero"),
            "of a folder": list_of("checkpoints", ".", "")}


def huge_pictures():
    sizes = {"a picture of 2^31 x 2^31": (2**31 - 1, 2**31 - 1), "of 20,000 x 20,000": (20_000, 20_000), "of 10^9 x 1": (10**9, 1),
             "of 1 x 10^9": (1, 10**9)}
    return {name: holding(lambda _, size=size: broken.huge_png(*size)) for name, size in sizes.items()} | {
        "EPS, which runs a program": holding(
            lambda c: f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({c}) (w) file\nshowpage\n".encode())}


def extension_parquet(path, canary):
    "An extension type whose description is a pickle."
    import pyarrow as pa
    import pyarrow.parquet
    marks = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(broken.Trap(canary))}
    schema = pa.schema([pa.field("file", pa.string(), metadata=marks), pa.field("age", pa.string())])
    pyarrow.parquet.write_table(pa.table([pa.array(["a"]), pa.array(["1"])], schema=schema), path)


def parquet_of(*columns):
    def write(path, canary): pd.DataFrame(dict(columns)).to_parquet(path)
    return write


PARQUET = {"an extension type": extension_parquet, "other columns": parquet_of(("a", [1])),
           "lists": parquet_of(("file", [["a"]]), ("age", [{"b": 1}])), "bytes": parquet_of(("file", [b"\xff"]), ("age", [b"\x00"]))}
TAR = {"an endless tar": holding(broken.endless_tar)}
FACES = "FileName,age,SPLIT\n1.png,3,train\n@,20,train\n2.png,1,val\n3.png,1,test\n"
ACTORS = "age,path,split\n3,crop/1.png,train\n20,@,train\n"
OWN = "file,y,split\n@,1,train\n1.png,2,train\n2.png,2,val\n"

READERS = {
    "table: csv": Reader(simple_table("t.csv"), partial(read_table, columns=["file", "age"])),
    "table: tsv": Reader(simple_table("t.tsv"), partial(read_table, columns=["file", "age"])),
    "table: parquet": Reader(simple_table("t.parquet"), partial(read_table, columns=["file", "age"]), traps=PARQUET),
    "utkface": Reader(faces, read_faces, traps=names(FACES), speaks_of=root_of),
    "imdb_wiki": Reader(actors, read_actors, traps=names(ACTORS), speaks_of=root_of),
    "own pictures": Reader(own, read_own, traps=names(OWN), speaks_of=root_of),
    "own pictures, broken ones skipped": Reader(own, partial(read_own, skip_broken=True), traps=names(OWN), speaks_of=root_of),
    "own pictures, parquet": Reader(own_parquet, read_own, quick=100, speaks_of=root_of, traps={
        **PARQUET, "lists of labels": parquet_of(("file", ["1.png"]), ("y", [[1, 2]]), ("split", [["train"]])),
        "labels that are dates": parquet_of(("file", ["1.png"]), ("y", pd.to_datetime(["2020-01-01"])), ("split", ["train"])),
        "names that are bytes": parquet_of(("file", [b"1.png"]), ("y", [b"1"]), ("split", [b"train"]))}),
    "checked pictures": Reader(own, checked, traps=names(OWN), quick=100, most_accepted=1),
    "checked faces": Reader(faces, checked, traps=names(FACES), quick=100, most_accepted=1),
    "checked pairs": Reader(pairs, checked, quick=100, most_accepted=1),
    "checked tar": Reader(tarred, checked, broken.forge_tar, quick=100, traps=TAR, most_accepted=1),
    "picture in a data set": Reader(own_picture, read_own, broken.forge_png, traps=huge_pictures(), most_accepted=1),
    "picture in a data set, skipped": Reader(own_picture, partial(read_own, skip_broken=True), broken.forge_png, quick=200,
                                             traps=huge_pictures(), most_accepted=1),
    "tar": Reader(tarred, read_tar, broken.forge_tar, traps=TAR),
    "faces in a tar": Reader(tarred, read_faces, broken.forge_tar, traps=TAR, speaks_of=root_of),
    **{f"picture: {kind}": Reader(image(kind, **how), read_image, broken.forge_png if kind == "png" else None, quick=300,
                                 traps=huge_pictures())
       for kind, how in {"png": {}, "jpg": {}, "bmp": {}, "gif": {"mode": "P"}, "tif": {}, "tiff": {"mode": "L", "compression": "tiff_lzw"},
                         "webp": {}, "ppm": {}, "jp2": {}}.items()},
    "decoded pictures": Reader(cached, read_cache, most_accepted=1, writes=root_of),
    "fetched table": Reader(fetched, lambda path: fetch(path.name, path.parent, progress=False), most_accepted=0),
    "stsb": Reader(pairs, lambda path: stsb(path.parent, 1).plain(torch.zeros(1, 2, 2, 4)), speaks_of=root_of),
    "word vectors: npz": Reader(vectors("npz"), partial(load_vectors, words=WORDS), broken.forge_zip, traps=traps_of_vectors()),
    "word vectors: txt": Reader(vectors("txt"), partial(load_vectors, words=WORDS)),
    "word vectors: zip": Reader(vectors("zip"), partial(load_vectors, words=WORDS), broken.forge_zip, traps={
        "zeros that are packed": holding(lambda _: broken.zip_of_zeros("a", b"cat ", 3)), "encrypted": holding(encrypted)}),
    "wordnet: data": Reader(wordnet("data.noun"), lambda path: read_wordnet(path.parent), speaks_of=root_of),
    "wordnet: exceptions": Reader(wordnet("verb.exc"), lambda path: read_wordnet(path.parent), speaks_of=root_of, most_accepted=1),
    "weights: safetensors": Reader(weights("w.safetensors"), read_weights, broken.forge_safetensors, traps=predictor_traps()),
    "weights: pth": Reader(weights("w.pth"), read_weights, broken.forge_zip, traps=checkpoint_traps()),
    "weights: legacy pth": Reader(weights("w.pth", legacy=True), read_weights, claims=True, traps=checkpoint_traps()),
    "predictor": Reader(saved_predictor, read_predictor, signed, traps=predictor_traps()),
    "estimator": Reader(saved_estimator, read_estimator, signed, traps=predictor_traps()),
    **{f"run: {name}": Reader(trained(name, name == "checksums.json"), lambda path: load_run(path.parent), forge, quick=quick, traps=traps,
                              speaks_of=root_of, most_accepted=1)
       for name, forge, quick, traps in (
           ("config.json", broken.forge_json, 100, {}), ("metrics.json", broken.forge_json, 100, {}),
           ("environment.json", broken.forge_json, 100, {}),
           ("checksums.json", broken.forge_json, 100, run_traps("checksums.json")),
           ("log.csv", None, 100, {}), ("predictions.parquet", None, 100, PARQUET))},
    "stored run: json": Reader(stored(".json"), read_stored, broken.forge_json, speaks_of=stored_as),
    "stored run: parquet": Reader(stored(".parquet"), read_stored, traps=PARQUET, speaks_of=stored_as, most_accepted=1),
    "checkpoint": Reader(trained("checkpoints/last.pt"), read_place, broken.forge_zip, traps=checkpoint_traps()),
    "lock": Reader(held, second_process, most_accepted=0, speaks_of=root_of, writes=root_of),
    "run: experiment": Reader(trained("config.json"), lambda path: check_folder(EXPERIMENT, path.parent), broken.forge_json,
                              speaks_of=root_of),
    "stored run: experiment": Reader(stored(".json"), lambda path: check_folder(EXPERIMENT, stored_as(path)), broken.forge_json,
                                     speaks_of=stored_as),
    "experiment": Reader(experiment_file, lambda path: read_experiment(RunFolder(path.parent).read_json(path.name)), broken.forge_json,
                         speaks_of=lambda path: ""), # it is given the content alone
    "run to gather": Reader(to_gather, lambda path: merge_runs(path.parent, gathered(path)), broken.forge_json,
                            speaks_of=stored_as, writes=gathered),
    "run to convert": Reader(to_convert, convert, broken.forge_json, writes=top_of),
}


# ---- what a reader may not do

WRITES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.rmtree",
          "shutil.move", "shutil.copyfile"}
RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen"}


class Watch:
    "Notes what this process does to files outside a folder, and whether it starts a program or calls another machine."
    def __init__(self): self.seen, self.inside, self.on = [], "", False

    def __call__(self, event, args):
        if not self.on: return
        if event in RUNS: self.seen.append((event, str(args)[:200]))
        writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if not writes and event not in WRITES: return
        below = isinstance(args[-1], int) and args[-1] >= 0 and event != "open" # relative to a folder that is open: `tree` looks there
        paths = [os.fsdecode(a) for a in args[:2] if isinstance(a, (str, bytes, os.PathLike))][:1 if event == "open" else 2]
        if not below: self.seen += [(event, path) for path in paths if not os.path.abspath(path).startswith((self.inside, os.devnull))]


class Hang(BaseException):
    "Not an `Exception`: no reader catches it."


def interrupt(*_): raise Hang


def tree(top): return {path: (info.st_mode, info.st_size, info.st_mtime_ns) for path, info in _walk(top)}


def _walk(top):
    for entry in os.scandir(top):
        yield entry.path, entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False): yield from _walk(entry.path)


def causes(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def remove(path):
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)


def verdict(reader, path, watch, top):
    "accepted, refused, or what is wrong with what the reader did."
    before, writable = tree(top), str(reader.writes(path)) if reader.writes else "\0"
    watch.seen, watch.inside, watch.on = [], writable, True
    signal.alarm(SECONDS)
    try:
        try: reader.read(path)
        finally: watch.on, _ = False, signal.alarm(0)
        end = "accepted"
    except HplError as error:
        named = str(reader.speaks_of(path))
        if named not in str(error): end = f"does not name {named}: {str(error)[:300]}"
        elif not reader.claims and any(isinstance(cause, MemoryError) or "allocate memory" in str(cause) for cause in causes(error)):
            end = f"asked for too much memory: {error}"
        elif len(str(error)) > 5000: end = f"a message of {len(str(error))} letters: {str(error)[:200]}"
        else: end = "refused"
    except BaseException as error:
        end = "".join(traceback.format_exception_only(error))[:400].strip() + " at " + " < ".join(
            f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[::-1][:6])
    if watch.seen: return f"did {watch.seen[:3]}"
    after = tree(top)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name) and not name.startswith(writable)]
    return f"changed {sorted(changed)[:3]}" if changed else end


def limit_memory():
    own = int(Path("/proc/self/statm").read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + ROOM,)*2)


def inputs(reader, good, count, name):
    "Names of inputs, and what puts each in place."
    for number in range(count):
        draw = broken.draws(f"{name} {number}")
        change = reader.forge if reader.forge and number % 2 else broken.mutate
        content = change(good, draw)
        yield f"input {number}", lambda path, _, content=content: path.write_bytes(content)
    yield from {**broken.TRAPS, **reader.traps}.items()


def work(name, count, top, results, start):
    "In a process of its own: read every input, and write down what came of it."
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    reader, template, canary, watch = READERS[name], top/"template", top/"canary", Watch()
    os.environ |= {"TMPDIR": str(top), "CUDA_VISIBLE_DEVICES": ""} # `forked` may have come second
    where = top/"cwd"
    where.mkdir()
    os.chdir(where)
    sys.stdout = open(os.devnull, "w") # noqa: SIM115
    template.mkdir()
    made = reader.make(template/"data")
    path, good = top/"data"/made.relative_to(template/"data"), made.read_bytes()
    shutil.copytree(template/"data", top/"data")
    def restore():
        shutil.rmtree(top/"data")
        for other in (canary, top/"outside.png"): remove(other)
        shutil.copytree(template/"data", top/"data")
    limit_memory()
    signal.signal(signal.SIGALRM, interrupt)
    sys.addaudithook(watch)
    with open(results, "a", buffering=1) as out:
        try: reader.read(path)
        except HplError:
            if reader.most_accepted: raise
        if reader.writes: restore()
        for number, (label, place) in enumerate(inputs(reader, good, count, name)):
            if number < start: continue
            out.write(f"{json.dumps([label, 'the process ended'])}\n")
            remove(path)
            place(path, canary)
            end = verdict(reader, path, watch, top)
            out.write(f"{json.dumps([label, end])}\n")
            if reader.writes or not label.startswith("input") or end not in ("accepted", "refused"):
                restore()
        out.write('["", "done"]\n')


@pytest.fixture(scope="module")
def context():
    with forked(__name__) as context: yield context


def run(context, name, count, tmp_path):
    "How many inputs were accepted and refused; what else came of any is a failure."
    results, lines, top = tmp_path/"results", [], tmp_path/"top"
    for _ in range(20): # what ends the process is one failure; the inputs after it are read by another
        top.mkdir()
        process = context.Process(target=work, args=(name, count, top, results, len({label for label, _ in lines})))
        process.start()
        process.join(20*SECONDS)
        process.kill()
        process.join()
        shutil.rmtree(top)
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        assert lines, f"nothing could be read; the process ended with {process.exitcode}"
        if not lines[-1][0]: break
    assert not lines[-1][0], f"gave up after {lines[-1]}"
    ends = {label: end for label, end in lines if label}
    wrong = {label: end for label, end in ends.items() if end not in ("accepted", "refused")}
    kinds = Counter(end.split(" at ")[0][:80] for end in wrong.values())
    examples = "\n".join(f"{label}: {end}" for label, end in list(wrong.items())[:25])
    assert not wrong, f"{len(wrong)} of {len(ends)}: {dict(kinds.most_common(12))}\n{examples}"
    found = Counter(ends.values())
    assert found["accepted"] <= READERS[name].most_accepted*len(ends), found
    return found


@pytest.mark.parametrize("name", READERS)
def test_some(name, context, tmp_path): run(context, name, READERS[name].quick, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_all(name, context, tmp_path, record_property):
    found = run(context, name, MANY, tmp_path)
    print(f"{name}: {dict(found)}")
