"The package as it is installed and imported."
import configparser
import dataclasses
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["plotly", "torchvision", "IPython", "ipywidgets", "ipykernel", "jupyter_client", "notebook"]
LARGE = ["accelerate", "pandas", "scipy", "sklearn", "torch._dynamo"]
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                 for path in (ROOT/"hpl_nb").rglob("*.py") if path.name != "_modidx.py")
LIGHT = ["hpl_nb", *(name for name in MODULES if re.fullmatch(r"hpl_nb\.(core|data|data\.core|loss|uncertainty|hypergrad)", name))]


def settings():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def python(code):
    "What a fresh Python prints."
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_imports_are_light():
    "The package and the modules of the method's formulas, imported one after the other."
    code = f"""
import importlib, sys
for module in {LIGHT}:
    importlib.import_module(module)
    for name in set(sys.modules) & set({HEAVY}): print(module, "imports", name)
"""
    assert not python(code)


def test_the_estimator_imports_what_tables_need(tmp_path):
    "Pictures, files, figures and notebooks import their own libraries, when they are used."
    later = {*HEAVY, "skops", "plotly.graph_objs.layout", "pytest", "gpytorch"} - {"plotly"}
    code = f"""
import sys
from hpl_nb import SemiSupervisedRegressor
print(*{{"torch._dynamo", *{later}}} & set(sys.modules))
import numpy as np
X = np.random.default_rng(0).normal(size=(60, 3))
model = SemiSupervisedRegressor(epochs=1, random_state=0, verbose=False).fit(X, np.where(np.arange(60) < 30, X[:, 0], np.nan))
model.predict(X), model.predict_interval(X, .5)
print(*{later} & set(sys.modules))
model.save({str(tmp_path/"model.safetensors")!r})
print(*{{"skops", "torchvision"}} & set(sys.modules))
"""
    at_first, after_fit, after_save = python(code).splitlines()
    assert (at_first, after_fit, after_save) == ("", "", "skops")


def test_import_is_quick():
    "`import hpl_nb` beside `import torch`, in turn; the quicker of two of each."
    def seconds(module):
        start = time.perf_counter()
        python(f"import {module}")
        return time.perf_counter() - start
    times = [(seconds("hpl_nb"), seconds("torch")) for _ in range(2)]
    ours, torch = map(min, zip(*times))
    assert ours < torch, f"importing hpl_nb takes {ours/torch:.2f} times as long as importing torch"


COMMANDS = [line.partition("=")[0] for line in settings()["console_scripts"].split()]
PAGES = ["hpl_train", *(f"{name} --help" for name in COMMANDS), "hpl_train hpl_paper --help", "hpl_train hpl_paper utkface --help",
         "hpl_compare stsb -h"]


@pytest.mark.parametrize("line", PAGES)
def test_help_is_light(line):
    "A help text imports neither PyTorch nor anything else that is large."
    command, *words = line.split()
    printed = python(f"import sys\nfrom hpl_nb.cli import {command}\ntry: {command}({words})\nexcept SystemExit: print(*sys.modules)")
    assert printed.startswith(f"usage: {command}") and not set(printed.splitlines()[-1].split()) & {"torch", "numpy", *HEAVY, *LARGE}


def test_help_is_quick():
    "`hpl_train --help` and the help of a method beside `import torch`, in turn; the median of the ratios."
    def seconds(code):
        start = time.perf_counter()
        python(code)
        return time.perf_counter() - start
    def help_of(*words): return f"from hpl_nb.cli import hpl_train\ntry: hpl_train({[*words, '--help']})\nexcept SystemExit: pass"
    times = [[seconds(code) for code in ("import torch", help_of(), help_of("hpl_paper", "utkface"))] for _ in range(3)]
    ratios = [sorted(row[i]/row[0] for row in times)[1] for i in (1, 2)]
    assert max(ratios) < .6, f"help takes {ratios[0]:.2f}, of a method {ratios[1]:.2f} times as long as importing torch"


def test_commands_are_imported_without_effect():
    "A process that spawn starts imports the main module again: nothing is printed, and nothing large is imported."
    assert python("import sys, hpl_nb.cli\nprint(*({'torch', 'pandas', 'numpy'} & set(sys.modules)))").strip() == ""


def test_version():
    assert importlib.import_module("hpl_nb").__version__ == settings()["version"]


def test_commands_resolve():
    for line in settings()["console_scripts"].split():
        command, module, function = re.fullmatch(r"(\w+)=([\w.]+):(\w+)", line).groups()
        assert command == function and callable(getattr(importlib.import_module(module), function))


def test_resources_are_readable():
    registry = json.loads((files("hpl_nb")/"resources"/"registry.json").read_text(encoding="utf-8"))
    assert all(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in registry.values())


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_typed_and_documented(module):
    module = importlib.import_module(module)
    problems = []
    for name in getattr(module, "__all__", []):
        thing = inspect.unwrap(getattr(module, name))
        if inspect.isfunction(thing): problems += undocumented(name, thing)
        elif inspect.isclass(thing) and thing.__module__ == module.__name__: problems += undocumented_class(name, thing)
    assert not problems, "\n".join(problems)


def undocumented(name, function):
    "What a public function lacks: a docstring, types."
    missing = [] if function.__doc__ else [f"{name} has no docstring"]
    parameters = [p for p in inspect.signature(function).parameters.values()
                  if p.name not in ("self", "cls") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return missing + [f"{name}: {p.name} has no type" for p in parameters if p.annotation is p.empty]


def undocumented_class(name, cls):
    "A class needs a docstring, its public methods and `__init__` need types (a dataclass's are its fields)."
    missing = [] if cls.__doc__ else [f"{name} has no docstring"]
    for key, value in vars(cls).items():
        if not inspect.isfunction(value) or (key.startswith("_") and (key != "__init__" or dataclasses.is_dataclass(cls))): continue
        missing += [line for line in undocumented(f"{name}.{key}", value) if "no docstring" not in line]
    return missing


def test_wheel_carries_everything(tmp_path):
    "A wheel has every module, the types marker and the tracked tables, and no results."
    pytest.importorskip("setuptools", minversion="64")
    skip = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "_proc", "_docs", "runs", "nbs")
    shutil.copytree(ROOT, tmp_path/"source", symlinks=True, ignore=skip)
    (tmp_path/"source"/"data"/"results").mkdir(exist_ok=True)
    (tmp_path/"source"/"data"/"results"/"table.csv").write_text("a\n1\n")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path/"source"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    tables = {f"hpl_nb/resources/{path.name}" for kind in ("*.csv", "*.json") for path in (ROOT/"data").glob(kind)}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT/"hpl_nb").rglob("*.py")}
    assert tables | sources | {"hpl_nb/py.typed"} <= names
    assert not [path for path in names if "results" in path]
