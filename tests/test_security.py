"""SECURITY.md line by line: the class TestPromise7... holds the line 7.

What must not happen is looked for in the source (by its syntax tree), with hostile files, and in a process that does everything the
package can do while Python reports what is opened, connected and started (PEP 578). Damaged files are in test_faults.py.
"""
import ast
import base64
import hashlib
import html.parser
import importlib
import io
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import skops.io
import torch
from PIL import Image
from plotly.offline import get_plotlyjs
from sklearn.base import BaseEstimator
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from small_runs import METHODS, SETTINGS, digits, make, on_cpu, tree, vectors  # noqa: F401
from test_package import MODULES, ROOT, settings

import hpl_nb.data
from hpl_nb import cli, figures, runner
from hpl_nb.convert import convert_runs
from hpl_nb.core import HplError, RunFolder
from hpl_nb.data import tables
from hpl_nb.data.images import FORMATS, MOST_PIXELS, ImageFiles, ImageSource, decode_image, find_images, tar_index
from hpl_nb.data.own import Reading, from_images
from hpl_nb.data.pixels import DiskCache, is_intact, on_disk
from hpl_nb.data.stsb import load_vectors
from hpl_nb.data.tables import fetch
from hpl_nb.data.utkface import UTKFace
from hpl_nb.estimator import SemiSupervisedRegressor
from hpl_nb.experiment import Experiment, read_experiment
from hpl_nb.explorer import Explorer
from hpl_nb.live import LiveView
from hpl_nb.methods.core import Supervised
from hpl_nb.methods.hpl import HPL
from hpl_nb.models import BiLSTM, ResNet, mlp, resnet
from hpl_nb.predictor import Predictor
from hpl_nb.report import pseudo_labels, report
from hpl_nb.settings import as_json
from hpl_nb.settings import differences as settings_differ
from hpl_nb.store import store_run
from hpl_nb.training.checkpoint import read_checkpoint
from hpl_nb.training.loop import fit
from hpl_nb.training.run import load_run
from hpl_nb.training.state import Train

TEXT = (ROOT/"SECURITY.md").read_text(encoding="utf-8")
dense = partial(mlp, 3, (16,), dropout=.2)
QUICK = replace(SETTINGS, epochs=2, iterations_per_epoch=3, record_every=1)


def promise(number):
    "The words of a line."
    return " ".join(re.search(rf"^{number}\. (.*?)(?=^\d+\. |^$)", TEXT, re.M | re.S)[1].split())


def test_each_promise_has_its_tests():
    "The numbers are 1, 2, 3 ..., and there is one class for each."
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", TEXT, re.M)]
    classes = {name: thing for name, thing in globals().items() if name.startswith("TestPromise")}
    assert numbers == sorted(int(re.match(r"TestPromise(\d+)[A-Z]", name)[1]) for name in classes) == [*range(1, len(numbers) + 1)]
    assert all(any(name.startswith("test_") for name in vars(thing)) for thing in classes.values())


def test_contact_and_version():
    known = settings()
    assert known["author_email"] in TEXT and f"https://github.com/{known['user']}/{known['repo']}" in TEXT
    assert f"release, {known['version'].rpartition('.')[0]}," in TEXT
    assert "SECURITY.md" in (ROOT/"MANIFEST.in").read_text() and "SECURITY.md" in (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8")


# ---- the source

def dotted(node):
    "`a.b.c` of a name or an attribute; what stands before a call's result is left out."
    if isinstance(node, ast.Name): return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


@lru_cache
def source():
    "All calls (module, enclosing function, dotted name, constant keywords, positional arguments) and all imported modules."
    calls, imports = [], []
    def visit(node, module, function):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): function = node.name
        if isinstance(node, ast.Import): imports.extend((module, function, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level: imports.append((module, function, node.module))
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords}
            calls.append(SimpleNamespace(module=module, function=function, name=dotted(node.func), keywords=keywords, args=node.args))
        for child in ast.iter_child_nodes(node): visit(child, module, function)
    for module in MODULES:
        path = importlib.util.find_spec(module).origin
        visit(ast.parse(Path(path).read_text(encoding="utf-8")), module, "")
    assert len(calls) > 3000 and len({call.module for call in calls}) > 30
    return calls, imports


def called(*endings):
    "Calls whose dotted name is or ends with one of these."
    return [call for call in source()[0] if any(f".{call.name}".endswith(f".{ending}") for ending in endings)]


def imported(*names):
    "(module, function) that import these packages."
    return {(module, function) for module, function, name in source()[1] if name.partition(".")[0] in names}


# ---- hostile files

class Canary:
    "Makes a folder when it is unpickled."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


class Sings(BaseEstimator):
    "A transformer that does something when it is read."
    def __init__(self, song=""): self.song = song
    def fit(self, X, y=None): return self
    def transform(self, X): return np.asarray(X, dtype=float)
    def __setstate__(self, state):
        self.song = state["song"]
        os.mkdir(self.song)


def saved(thing, **how):
    "What torch.save writes."
    torch.save(thing, file := io.BytesIO(), **how)
    return file.getvalue()


def object_array(thing, write):
    array = np.empty(1, dtype=object)
    array[0] = thing
    write(file := io.BytesIO(), array)
    return file.getvalue()


def in_tar(thing):
    "PyTorch's format before version 0.1.10, whose parts are pickles in a tar file."
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(thing)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def in_parquet(thing):
    "A table with a column of an extension type whose parameters are a pickle, as pyarrow before 14.0.1 read them."
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(thing)}
    schema = pyarrow.schema([pyarrow.field("index", pyarrow.int64(), metadata=metadata)])
    pyarrow.parquet.write_table(pyarrow.table([[1]], schema=schema), file := io.BytesIO())
    return file.getvalue()


PAYLOADS = {"pickle": pickle.dumps, "pickle of 1990": partial(pickle.dumps, protocol=0), "torch.save": saved,
            "weights": lambda thing: saved({"conv1.weight": thing}),
            "before 2020": partial(saved, _use_new_zipfile_serialization=False), "tar": in_tar,
            "npy": lambda thing: object_array(thing, np.save),
            "npz": lambda thing: object_array(thing, lambda file, array: np.savez(file, words=array, vectors=array))}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    "A run that has ended, the same one stored, a predictor and an estimator."
    top = tmp_path_factory.mktemp("template")
    method = make("Supervised", 0, dense)
    fit(method, vectors(), QUICK, folder=top/"run", progress=False)
    store_run(top/"run", top/"stored"/"0")
    return top


def run_copy(template, folder, name, content):
    "A copy of the run, one file of which is replaced."
    for path, old in tree(template/"run").items():
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        (folder/path).write_bytes(content if path == name else old)
    return folder


def stored_copy(template, folder, name, content):
    folder.mkdir()
    for path, old in tree(template/"stored").items(): (folder/path).write_bytes(content if path == name else old)
    return folder/"0"


def both_checkpoints(template, folder, content):
    run_copy(template, folder, "checkpoints/last.pt", content)
    (folder/"checkpoints"/"previous.pt").write_bytes(content)
    (folder/"metrics.json").unlink()
    return fit(make("Supervised", 0, dense), vectors(), QUICK, folder=folder, progress=False)


def from_cache(folder, content):
    "torchvision's weights, as if they had been fetched before."
    before = torch.hub.get_dir()
    torch.hub.set_dir(folder)
    (folder/"checkpoints").mkdir(parents=True)
    name = importlib.import_module("torchvision.models").ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (folder/"checkpoints"/name).write_bytes(content)
    try: return resnet(18, weights="torchvision")
    finally: torch.hub.set_dir(before)


def given(call, name):
    "A reader that is given one file of this name."
    def read(template, folder, content):
        folder.mkdir()
        (folder/name).write_bytes(content)
        return call(folder/name)
    return read


READERS = {
    "checkpoint": given(read_checkpoint, "last.pt"), "checkpoints of a run": both_checkpoints,
    "best of a run": lambda template, folder, content: Predictor.from_folder(
        run_copy(template, folder, "checkpoints/best.pt", content), make("Supervised", 0, dense), vectors()),
    "predictor": given(lambda path: Predictor.load(path, Supervised().build(mlp(3))), "m.safetensors"),
    "estimator": given(SemiSupervisedRegressor.load, "m.safetensors"),
    "weights.pth": given(lambda path: resnet(18, weights=path), "w.pth"),
    "weights.safetensors": given(lambda path: resnet(18, weights=path), "w.safetensors"),
    "torchvision's weights": lambda template, folder, content: from_cache(folder, content),
    **{f"vectors.{ending}": given(lambda path: load_vectors(path, ["", "a"]), f"v.{ending}") for ending in ("npz", "zip", "txt")},
    **{f"table.{ending}": given(lambda path: tables.read_table(path, ["a"]), f"t.{ending}") for ending in ("csv", "tsv", "parquet")},
    "picture": given(lambda path: decode_image(ImageSource(path)), "p.png"), "archive of pictures": given(
        lambda path: decode_image(next(iter(tar_index(path).values()))), "p.tar"),
    **{f"{name} of a run": lambda template, folder, content, name=name: load_run(run_copy(template, folder, name, content))
       for name in ("config.json", "metrics.json", "log.csv", "predictions.parquet", "environment.json", "checksums.json")},
    **{f"{name} of a stored run": lambda template, folder, content, name=name: load_run(stored_copy(template, folder, name, content))
       for name in ("0.json", "0.parquet")},
    "run to convert": lambda template, folder, content: convert_runs([stored_copy(template, folder, "0.json", content).parent])}


class TestPromise1NoFileIsUnpickled:
    def test_source(self):
        loads = called("torch.load", "get_state_dict", "load_state_dict_from_url")
        assert len(called("torch.load")) >= 2 and all(call.keywords.get("weights_only") is True for call in loads)
        arrays = called("np.load", "numpy.load", "read_array")
        assert arrays and all(call.keywords.get("allow_pickle") is False for call in arrays)
        assert not called("pickle.load", "pickle.loads", "Unpickler", "joblib.load", "read_pickle", "hub.load", "allow_pickle", "fromfile",
                          "load_module", "yaml.load", "from_pickle")
        assert not imported("dill", "cloudpickle", "marshal", "shelve", "yaml", "h5py")
        text = "".join(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8") for module in MODULES)
        assert not re.findall(r"\bpickle\.(\w+)", text)
        from_joblib = re.findall(r"from joblib import (.+)", text) # sends values to processes of its own, and reads no file
        assert {*", ".join(from_joblib).split(", ")} <= {"wrap_non_picklable_objects", "Parallel", "delayed", "cpu_count"}
        assert text.count("joblib") == len(from_joblib)

    @pytest.mark.parametrize("payload", PAYLOADS)
    def test_payloads_would_run(self, payload, tmp_path):
        "By readers that unpickle."
        content, canary = PAYLOADS[payload](Canary(tmp_path/"canary")), tmp_path/"canary"
        try:
            if payload.startswith("np"): [*map(np.load(io.BytesIO(content), allow_pickle=True).__getitem__, ["words"]*(payload == "npz"))]
            elif payload.startswith("pickle"): pickle.loads(content)
            else:
                (tmp_path/"file").write_bytes(content)
                torch.load(tmp_path/"file", weights_only=False)
        except Exception: assert payload == "tar" # PyTorch would go on with what it has unpickled
        assert canary.exists()

    def test_training_unpickles_only_what_its_own_processes_send(self, everything):
        "Tensors of loader processes; Python's own unpickler reports each class that it looks up."
        found = {event[1][0].partition(".")[0] for event in everything.of("pickle.find_class")}
        assert found == {"torch", "multiprocessing"}

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("reader", READERS)
    def test_hostile_files(self, reader, template, tmp_path):
        "Each kind of pickle, in the place of each file that the package reads: refused, and not run."
        canary = tmp_path/"canary"
        for number, (payload, make_content) in enumerate(PAYLOADS.items()):
            with pytest.raises(HplError): READERS[reader](template, tmp_path/str(number), make_content(Canary(canary)))
            assert not canary.exists(), payload

    def test_parquet_with_a_pickle_in_its_schema(self, template, tmp_path):
        content = in_parquet(Canary(tmp_path/"canary"))
        (tmp_path/"t.parquet").write_bytes(content)
        assert b"arrow.py_extension_type" in pyarrow.parquet.read_schema(tmp_path/"t.parquet").field("index").metadata.values()
        assert tables.read_table(tmp_path/"t.parquet", ["index"])["index"].tolist() == [1] # a column of numbers
        with pytest.raises(HplError, match="has no column 'run'"): load_run(stored_copy(template, tmp_path/"stored", "0.parquet", content))
        assert not (tmp_path/"canary").exists()

    def test_cache_of_pixels(self, tmp_path):
        (tmp_path/"pixels.npy").write_bytes(PAYLOADS["npy"](Canary(tmp_path/"canary")))
        Image.new("RGB", (4, 4)).save(tmp_path/"a.png")
        assert not is_intact(tmp_path/"pixels.npy", ImageFiles([tmp_path/"a.png"], 4))
        with pytest.raises(ValueError): DiskCache(tmp_path/"pixels.npy")
        assert not (tmp_path/"canary").exists()


class TestPromise2PreprocessorsOfKnownTypes:
    def test_source(self):
        loads = called("skops.io.load", "skops.io.loads", "sio.load", "sio.loads")
        assert [(call.module, call.function) for call in loads] == [("hpl_nb.estimator_file", "read_transformer")]
        assert "trusted" in loads[0].keywords

    def test_unknown_types_are_named_and_not_built(self, tmp_path):
        x = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 2)), columns=["a", "b"])
        model = SemiSupervisedRegressor("supervised", preprocessor=StandardScaler(), epochs=1, train=Train(iterations_per_epoch=2),
                                        random_state=0)
        model.fit(x, np.where(np.arange(40) < 30, x["a"], np.nan))
        assert np.array_equal(SemiSupervisedRegressor.load(model.save(tmp_path/"good")).predict(x), model.predict(x))
        for transformer, name in ((FunctionTransformer(os.system), "system"), (FunctionTransformer(eval), "eval"),
                                  (Sings(str(tmp_path/"canary")), "Sings")):
            model.preprocessor_ = transformer
            path = model.save(tmp_path/"bad", trusted=skops.io.get_untrusted_types(data=skops.io.dumps(transformer)))
            with pytest.raises(HplError, match=f"{name}.*might do anything.*trusted="): SemiSupervisedRegressor.load(path)
            assert not (tmp_path/"canary").exists()
        SemiSupervisedRegressor.load(path, trusted=[f"{Sings.__module__}.Sings"])
        assert (tmp_path/"canary").exists() and skops.io.get_untrusted_types(data=skops.io.dumps(transformer))


class TestPromise3NoTextIsRun:
    def test_source(self):
        names = Counter(call.name for call in source()[0])
        assert not {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile"} & {*names}
        assert [call.function for call in called("import_module")] == ["import_gpytorch"] # a name in the source
        assert not [name for name in names if re.match(r"os\.(exec|spawn|posix_spawn)", name)]
        assert not [call for call in called("eval") if call.args or call.keywords] and not called("query") # pandas runs their text
        assert not [call for call in source()[0] if "shell" in call.keywords]
        assert not imported("subprocess", "pty", "pexpect", "code", "runpy")

    @pytest.mark.parametrize("text", ["__import__('os').mkdir('canary')", "$(mkdir canary)", "`mkdir canary`"])
    def test_settings_are_values(self, text, tmp_path, monkeypatch):
        "Numbers, places and names, as typed and as in a file."
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match="2"): cli.hpl_train(["mean_teacher", "--decay", text, "rotated_digits", "--out", "run"])
        with pytest.raises(SystemExit, match="hpl_nb: "): cli.hpl_train(["supervised", "utkface", "--root", text, "--out", "run"])
        with pytest.raises(SystemExit, match="hpl_nb: "): cli.hpl_compare(["rotated_digits", "--methods", text, "--out", "runs"])
        content = as_json(Experiment(UTKFace()))
        for broken in (content | {"kind": text}, content | {"seed": text}, content | {text: 1}):
            with pytest.raises(HplError): read_experiment(broken)
        assert not [*tmp_path.iterdir()]

    def test_no_program_is_started(self, everything):
        started = everything.of("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix")
        assert not [event for event in started if Path(event[1][0]).name != "ldconfig"] # by PyTorch's CUDA packages


class TestPromise4PicturesAreBounded:
    def test_the_numbers(self):
        assert f"{MOST_PIXELS:,}" in promise(4)
        assert re.search(r"\((.*?)\)", promise(4))[1].upper().replace(" ", "").split(",") == [*map(str.upper, FORMATS)]

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_a_header_that_claims_too_much(self, tmp_path):
        side = int(MOST_PIXELS**.5) + 1
        chunks = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")
        parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
        path = tmp_path/"bomb.png"
        path.write_bytes(b"".join([b"\x89PNG\r\n\x1a\n", *parts]))
        with pytest.raises(HplError, match=f"bomb.png.*header claims {side} x {side} pixels"): decode_image(ImageSource(path))

    def test_formats_that_run_programs(self, tmp_path):
        "Pillow gives EPS to Ghostscript."
        path = tmp_path/"picture.png"
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
        assert Image.open(path).format == "EPS"
        with pytest.raises(HplError, match="picture.png cannot be read"): decode_image(ImageSource(path))

    def test_source(self): assert all("formats" in call.keywords for call in called("Image.open"))


class TestPromise5ArchivesAreReadInPlace:
    def test_source(self): assert not called("extract", "extractall", "unpack_archive") and not imported("py7zr", "rarfile")

    def test_tar(self, tmp_path):
        folder = tmp_path/"inner"/"data"
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), "red").save(png := io.BytesIO(), "PNG")
        outside = tmp_path/"outside.png"
        Image.new("RGB", (4, 4), "blue").save(outside)
        with tarfile.open(folder/"p.tar", "w") as tar:
            for name in ("../../climbs.png", "/absolute.png", "a/../../../dots.png"):
                member = tarfile.TarInfo(name)
                member.size = len(png.getvalue())
                tar.addfile(member, io.BytesIO(png.getvalue()))
            for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("device.png", tarfile.CHRTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, str(outside)
                tar.addfile(member)
        before = tree(tmp_path)
        names = [f"{name}.png" for name in ("climbs", "absolute", "dots", "link", "hard", "device")]
        found = find_images(folder, names, tars="*.tar")
        assert [source is not None for source in found] == [True]*3 + [False]*3 # links lead nowhere
        assert all(decode_image(source).getpixel((0, 0)) == (255, 0, 0) for source in found[:3])
        assert tree(tmp_path) == before

    def test_zip(self, tmp_path):
        (tmp_path/"inner").mkdir()
        with zipfile.ZipFile(tmp_path/"inner"/"v.zip", "w") as archive: archive.writestr("../../words.txt", "a 1 2 3\n")
        before = tree(tmp_path)
        vectors, known = load_vectors(tmp_path/"inner"/"v.zip", ["", "a"])
        assert vectors[1].tolist() == [1, 2, 3] and known[1] and tree(tmp_path) == before


EVIL = "<evil-tag onclick='alert(1)'></script><script>alert('evil-script')</script><img src=x onerror='evil()'>"


class Page(html.parser.HTMLParser):
    "The tags of a page, with their attributes, and the text of its scripts."
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], ""
        self.feed(text)
    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
    def handle_endtag(self, tag): self.inside = ""
    def handle_data(self, text):
        if self.inside == "script": self.scripts.append(text)
    def is_clean(self):
        "Nothing of `EVIL` is a tag, an attribute or a script."
        events = [name for _, attributes in self.tags for name in attributes if name.startswith("on")]
        return not events and "evil-tag" not in {tag for tag, _ in self.tags} and not any("<evil" in text or text.startswith("alert")
                                                                                          for text in self.scripts)


@pytest.fixture(scope="module")
def evil_run():
    "A run whose method, data, unit and samples are called EVIL."
    data = vectors()
    data = replace(data, name=EVIL, unit=EVIL, sample_names=[EVIL]*len(data.targets))
    run = fit(make("HPL paper", 0, dense), data, replace(QUICK, record_every=0), progress=False)
    config = run.config | {"method": EVIL, "run": EVIL}
    return data, replace(run, config=config, predictions=run.predictions.assign(method=EVIL, run=EVIL, dataset=EVIL))


class TestPromise6NamesAreText:
    def test_the_test_sees_it(self):
        assert not Page(f"<p>{EVIL}</p>").is_clean() and Page(f"<p>{html.escape(EVIL)}</p>").is_clean()

    def test_report(self, evil_run, tmp_path):
        page = Page(report([evil_run[1]], tmp_path/"report.html", EVIL).read_text())
        assert page.is_clean() and len(page.scripts) > 4 and "evil-tag" in "".join(page.scripts) # as escaped text

    def test_figure_and_explorer(self, evil_run):
        data, run = evil_run
        figure = figures.pseudo_label_boxplots(pseudo_labels([run]), unit=EVIL)
        assert Page(figures.show(figure)._repr_mimebundle_()["text/html"]).is_clean()
        explorer = Explorer(run.predictions, data)
        explorer.choose(explorer.rows()["index"].head(3))
        assert explorer.cards.value.count("<figure") == 3
        assert all(Page(part).is_clean() for part in (explorer.cards.value, explorer.words.value))
        explorer.close()


# ---- everything that the package does, in a process that reports what Python opens, connects and starts

HOOK = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
def hook(event, args):
    kind = event.partition(".")[0]
    if kind in ("socket", "urllib", "http", "ftplib", "smtplib", "subprocess", "webbrowser") or event in (
            "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class"): pass
    elif event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITES: pass
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"): pass
    else: return
    os.write(log, (repr([event, [str(arg) for arg in args]]) + "\\n").encode())
sys.addaudithook(hook)
sys.path.insert(0, sys.argv[3])
import test_security
test_security.do_everything(sys.argv[2])
"""


def do_everything(top):
    "Train every method, stop and resume; two methods on pictures, one with loader processes; figures, files, commands, caches."
    torch.set_num_threads(1)
    top, data = Path(top), vectors()
    for module in MODULES: importlib.import_module(module)
    for name in METHODS:
        for stop_after in (4, None): run = fit(make(name, 0, dense), data, QUICK, folder=top/name, progress=False, stop_after=stop_after)
        assert run.finished
    for name in ("HPL paper", "MeanTeacher"): fit(make(name), digits(), replace(QUICK, record_every=0), progress=False) # no folder
    fit(make("Supervised"), digits(), QUICK, folder=top/"workers", progress=False, workers=1, watch=(view := LiveView(every=0)))
    view.close()
    predictor = Predictor.from_folder(top/"Supervised", make("Supervised", 0, dense), data)
    Predictor.load(predictor.save(top/"predictor"), make("Supervised", 0, dense)).predict_interval(data.inputs[:3], .5)
    frame = pd.DataFrame({"a": np.arange(40.), "b": list("xy")*20})
    model = SemiSupervisedRegressor("hpl_paper", epochs=1, train=Train(iterations_per_epoch=2), random_state=0, folder=top/"estimator")
    SemiSupervisedRegressor.load(model.fit(frame, np.where(frame["a"] < 30, frame["a"], np.nan)).save(top/"model")).predict(frame)
    cli.hpl_demo(["--out", f"{top}/demo", *"--methods supervised hpl_paper --seeds 0 --jobs 1 --iterations 2".split()])
    cli.hpl_figures([f"{top}/demo", "--out", f"{top}/figures.html"])
    cli.hpl_store([f"{top}/demo", "--store", f"{top}/store"])
    explorer = Explorer(load_run(top/"HPL paper").predictions, data)
    explorer._repr_mimebundle_(), explorer.close()
    do_pictures(top/"pictures")


def do_pictures(folder):
    "One's own pictures, checked, decoded into a cache, and trained on."
    folder.mkdir()
    for row in range(30): Image.fromarray(np.full((16, 16, 3), 8*row, dtype=np.uint8)).save(folder/f"{row}.png")
    pd.DataFrame({"file": [f"{row}.png" for row in range(30)], "label": range(30)}).to_csv(folder/"table.csv", index=False)
    str(hpl_nb.data.check(folder, progress=False))
    on_disk(from_images(folder, folder/"table.csv", "file", "label", reading=Reading(16)), folder/"cache").inputs[np.arange(3)]


class Seen:
    "What was seen of the process, and where it could have written."
    def __init__(self, log, **folders): self.events, self.folders = [*map(ast.literal_eval, log.read_text().splitlines())], folders
    def of(self, *starts): return [event for event in self.events if event[0].startswith(starts)]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    top = tmp_path_factory.mktemp("everything")
    folders = {name: top/name for name in ("home", "here", "temp", "out")}
    for folder in folders.values(): folder.mkdir()
    home = {name: str(folders["home"]) for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HF_", "TORCH", "IPYTHON"))}
    environ |= home | {"TMPDIR": str(folders["temp"]), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                       "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", HOOK, top/"log", folders["out"], ROOT/"tests"]
    done = subprocess.run(command, env=environ, cwd=folders["here"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return Seen(top/"log", **folders)


def local(event):
    "A socket that is made but not used, or one between processes of this machine."
    kind, args = event
    return kind in ("socket.__new__", "socket.gethostname") or f"family={int(getattr(socket, 'AF_UNIX', -1))}," in args[0]


class TestPromise7NoNetworkUnlessAsked:
    def test_everything_is_done_without(self, everything):
        kinds = ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.")
        assert not [event for event in everything.of(*kinds) if not local(event)]

    def test_the_test_sees_it(self, tmp_path):
        visit = "import urllib.request\ntry: urllib.request.urlopen('http://127.0.0.1:9')\nexcept OSError: pass"
        subprocess.run([sys.executable, "-c", HOOK[:HOOK.index("sys.path")] + visit, tmp_path/"log"], check=True)
        seen = {event[0] for event in Seen(tmp_path/"log").events if not local(event)}
        assert {"urllib.Request", "socket.connect", "socket.getaddrinfo"} <= seen

    def test_who_could(self):
        "Only what is asked for by name: `fetch`, torchvision's weights, and Ray."
        assert imported("pooch") == {("hpl_nb.data.tables", "fetch")} and imported("ray") == {("hpl_nb.runner", "ray_cluster")}
        assert {call.function for call in called("get_state_dict")} == {"_torchvision_trunk"}
        assert not imported("requests", "urllib", "http", "socket", "ftplib", "huggingface_hub", "wandb", "aiohttp", "httpx")
        assert {call.function for call in called("fetch")} == {"find_table", "read_faces"} # behind download=True

    def test_ray_keeps_quiet(self):
        "The variable is set before Ray is imported."
        text = Path(runner.__file__).read_text(encoding="utf-8")
        assert 0 < text.index('os.environ["RAY_USAGE_STATS_ENABLED"] = "0"') < text.index("import ray")


class TestPromise8WhatIsFetchedIsChecked:
    def test_registry(self):
        for entry in tables.registry().values():
            assert entry["url"].startswith("https://") and re.fullmatch("[0-9a-f]{64}", entry["sha256"])

    def test_other_content_is_refused_and_not_kept(self, tmp_path, monkeypatch):
        class Serve(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"something else")
            def log_message(self, *_): pass
        server = HTTPServer(("127.0.0.1", 0), Serve)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        entry = {"url": f"http://127.0.0.1:{server.server_port}/utkface.csv", "sha256": tables.registry()["utkface.csv"]["sha256"]}
        monkeypatch.setattr(tables, "registry", lambda: {"utkface.csv": entry})
        try:
            with pytest.raises(HplError, match="could not fetch utkface.csv"): fetch("utkface.csv", tmp_path, progress=False)
        finally: server.shutdown(), server.server_close()
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_a_file_that_is_there_stays(self, tmp_path, monkeypatch):
        def connect(*_, **__): raise AssertionError("fetched")
        monkeypatch.setattr(socket.socket, "connect", connect)
        (tmp_path/"sts.tsv").write_text("mine")
        with pytest.raises(HplError, match="is there already"): fetch("sts.tsv", tmp_path, progress=False)
        assert (tmp_path/"sts.tsv").read_text() == "mine"

    def test_torchvision_checks(self): assert all(call.keywords["check_hash"] is True for call in called("get_state_dict"))


class TestPromise9ReportsLoadNothing:
    def test_page(self, evil_run, tmp_path):
        page = Page(report([evil_run[1]], tmp_path/"report.html", "Runs").read_text())
        policies = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
        assert len(policies) == 1 and policies[0].startswith("default-src 'none'; ") and "http" not in policies[0]
        names = ("src", "href", "data", "srcset", "action")
        places = [attributes[name] for _, attributes in page.tags for name in names if name in attributes]
        assert all(place.startswith(("data:", "#")) for place in places) and len(page.tags) > 20

    def test_figures_in_notebooks(self, evil_run):
        "The one address in a figure is plotly.js, and the page says which content it has to have."
        text = figures.show(figures.pseudo_label_boxplots(pseudo_labels([evil_run[1]])))._repr_mimebundle_()["text/html"]
        address, digest = re.search(r'src: "(https://[^"]+)", integrity: "sha256-([^"]+)"', text).groups()
        assert address.startswith("https://cdn.plot.ly/plotly-") and {*re.findall(r"\bhttps?://[^\"\s<]+", text)} == {address}
        assert base64.b64decode(digest) == hashlib.sha256(get_plotlyjs().encode()).digest()


class TestPromise10WritesBelowTheFolder:
    def test_nothing_else_is_there(self, everything):
        "In the home folder, in the current folder, and among the temporary files, whoever has written them."
        assert not [path for name in ("home", "here") for path in everything.folders[name].rglob("*")]
        assert {path.name.partition("_")[0] for path in everything.folders["temp"].rglob("*")} <= {"torchinductor"} # an empty folder
        assert not tree(everything.folders["temp"])
        assert len(tree(everything.folders["out"])) > 15*len(METHODS)

    def test_nothing_else_was_opened(self, everything):
        out, devices = str(everything.folders["out"]), ("/dev/null", "/dev/shm/", "/dev/tty")
        two = ("os.rename", "os.link", "os.symlink") # whose second argument is written
        written = everything.of("open", "os.mkdir", "os.remove", "os.rmdir", *two)
        paths = {event[1][0] for event in written} | {event[1][1] for event in written if event[0] in two}
        inside = {path for path in paths if path.startswith(out)}
        temp = str(everything.folders["temp"])
        assert not {path for path in paths - inside if not path.startswith((*devices, temp)) and not path.isdigit()} and len(inside) > 500

    def test_cache_of_pixels(self, everything):
        assert len([*(everything.folders["out"]/"pictures"/"cache").glob("pixels-16-*.npy")]) == 1
        assert UTKFace(root="ROOT", pixels="disk").cache == ""


    def test_conversion_stays_in_its_place(self, template, tmp_path):
        "What a run says of itself is no place on the disk; a run that lies elsewhere, or has been converted, is refused by name."
        content = json.loads((template/"stored"/"0.json").read_text())
        del content["config"]["format"]
        content["config"]["settings"] = {"preset": "../../../evil"}
        content["options"] = {"dataset": "rotated_digits", "label_ratio": .055}
        places = [tmp_path/"inner"/name/"0.json" for name in ("rotated_digits/0.055/old", "rotated_digits/0.055/older", "elsewhere")]
        for place in places: RunFolder(place.parent).write_json("0.json", content)
        assert [path.parents[1] for path in convert_runs([places[0].parent])] == [places[0].parents[1]]
        before = tree(tmp_path)
        for place, says in ((places[1], "are two results of one run"), (places[2], "is not where such a run is stored; move it")):
            with pytest.raises(HplError, match=f"{place}.* {says}"): convert_runs([place.parent])
        assert tree(tmp_path) == before


class TestPromise11StoredRunsNameNobody:
    @pytest.mark.parametrize("model", [ResNet(weights="/home/secret-user/weights.pth"), BiLSTM(vectors="/home/secret-user/vectors.npz")])
    def test_paths_are_cut(self, model, tmp_path, monkeypatch):
        "A run whose settings name places, in a folder named after a person, on a machine with a name."
        monkeypatch.setattr("platform.node", lambda: "secret-host")
        monkeypatch.setenv("USER", "secret-user")
        folder = tmp_path/"secret-user"/"run"
        experiment = Experiment(UTKFace("/home/secret-user/faces", cache="/home/secret-user/cache"), HPL.paper(), model)
        fit(make("HPL paper", 0, dense), vectors(), QUICK, folder=folder, progress=False, experiment=as_json(experiment))
        stored = store_run(folder, tmp_path/"store"/"0")
        names = {"secret-user", "secret-host", socket.gethostname(), str(Path.home()), str(tmp_path), "/home/"}
        content = stored.read_bytes() + pd.read_parquet(stored.with_suffix(".parquet")).to_csv().encode()
        assert not settings_differ(read_experiment(json.loads(stored.read_text())["config"]["experiment"]), experiment)
        assert not [name for name in names if name.encode() in content]
        assert "secret-user" in (folder/"config.json").read_text() # the run folder itself keeps them
