"What every notebook keeps to: it reads as an argument, shows its evidence, and its module imports only earlier ones."
import ast
import json
import re
from pathlib import Path

import pages
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT/"nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in path.relative_to(ROOT).parts))
NOT_LESSONS = {"export", "exporti", "exports", "hide", "default_exp", "slow", "cuda"}
ABSOLUTE = re.compile(r"(?<![\w+./:~-])/(?:tmp|home|root|work|opt|Users|var/folders)(?=[/\"'\s)\\]|$)")
LAZY = {"hpl_nb.data", "hpl_nb.cli"} # may import anything inside their functions: they only pass calls on


def name(notebook): return notebook.relative_to(ROOT/"nbs").as_posix()


def cells(notebook, kind=None):
    "Cells with their source as one string."
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if kind in (None, cell["cell_type"]): yield number, dict(cell, source="".join(cell["source"]))


def flags(cell): return {line.split()[0].rstrip(":") for line in re.findall(r"^#\| *(.+)", cell["source"], flags=re.M)}


def code(cell):
    "A code cell as a syntax tree, without shell lines and magics."
    return ast.parse(re.sub(r"^\s*[%!].*", "", cell["source"], flags=re.M)).body


def body(cell): return re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M).strip()


each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)


@each
def test_title_and_claim(notebook):
    "nbdev takes the first cell as title and description of the page, and drops whatever else is in it."
    first = next(cells(notebook))[1]
    lines = [line for line in first["source"].splitlines() if line.strip()]
    if notebook.parent.name == "experiments" and lines[2:] == ["- skip_exec: true"]: lines.pop() # test_experiments.py runs it small
    assert first["cell_type"] == "markdown" and len(lines) == 2 and lines[0].startswith("# ") and lines[1].startswith("> "), \
        "the first cell must be `# title` and `> one-sentence claim`, each on one line; the introduction is the next cell"


@each
def test_imports_are_alone(notebook):
    "The pages' build runs every cell that imports, so it must not do more than import."
    imports = ast.Import, ast.ImportFrom
    mixed = [number for number, cell in cells(notebook, "code")
             if any(isinstance(line, imports) for line in code(cell)) and not all(isinstance(line, imports) for line in code(cell))]
    assert not mixed, f"cells {mixed} mix imports with other code"


def test_exported_cells_are_short(request):
    "Lines of code: a documented parameter or field, one a line, is prose for the reader, and imports are counted by nobody."
    documented = re.compile(r"\s*\w+:.*#|import |from |\s*$")
    lengths = {(name(notebook), number): sum(not documented.match(line) for line in body(cell).splitlines()) for notebook in NOTEBOOKS
               for number, cell in cells(notebook, "code") if flags(cell) & {"export", "exporti", "exports"}}
    request.config.export_cell_lengths = list(lengths.values())
    assert not {cell: length for cell, length in lengths.items() if length > 25}, "exported cells of over 25 lines"


@each
def test_lessons_show_their_evidence(notebook):
    "A lesson cell that ends in a value has an output: the notebook was run, and stored as it ran."
    missing = [number for number, cell in cells(notebook, "code") if ends_in_value(cell) and not cell["outputs"]]
    assert not missing, f"cells {missing} end in a value but have no output; run the notebook and store its outputs"


@each
def test_outputs_are_of_one_run_in_order(notebook):
    "nbdev_clean forgets the counts of all cells; a notebook that has counts has them for all its outputs, and increasing."
    counts = {number: cell.get("execution_count") for number, cell in cells(notebook, "code")}
    known = list(filter(None, counts.values()))
    assert known == sorted(set(known)), "cells were run out of order; restart and run all"
    unknown = [number for number, cell in cells(notebook, "code") if cell["outputs"] and not counts[number]]
    assert not known or not unknown, f"cells {unknown} have outputs of another run; restart and run all"
    inside = [number for number, cell in cells(notebook, "code") for output in cell["outputs"]
              if output.get("execution_count") not in (None, counts[number])]
    assert not inside, f"the outputs of cells {inside} are of another run; restart and run all"


@each
def test_no_widgets_are_stored(notebook):
    "A view of a widget shows nothing without its kernel; a picture in the text does, and a sentence on how to get it live."
    stored = [number for number, cell in cells(notebook, "code") for output in cell["outputs"] if pages.WIDGET in output.get("data", {})]
    assert not stored, f"cells {stored} hold widgets; run `python tests/check.py --fix`"


@each
def test_pictures_and_figures_say_what_they_show(notebook):
    for number, cell in cells(notebook):
        pictures = re.findall(r"!\[([^\]]*)\]\(", cell["source"] if cell["cell_type"] == "markdown" else "")
        pictures += [words for output in cell.get("outputs", []) for words in pages.picture_words(output)]
        assert all(map(str.strip, pictures)), f"cell {number} has a picture without words: give it an alternative text"
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            html = "".join(data.get("text/html", ""))
            assert not re.search(r"<img(?![^>]*\balt=)", html), f"cell {number} has an image without `alt`"
            if pages.PLOTLY not in data: continue
            words = re.search(r'<figure class="hpl-figure" aria-label="([^"]+)">', html)
            assert words and "".join(data["text/plain"]).startswith("Figure: "), f"cell {number} has a figure without words: use `show`"


def ends_in_value(cell):
    "Whether the last line of a cell that runs is an expression other than a call (which may give None)."
    if flags(cell) & NOT_LESSONS or re.search(r"^#\| *eval: *false", cell["source"], flags=re.M): return False
    last = (code(cell) or [None])[-1]
    silent = ast.Call, ast.Constant
    return isinstance(last, ast.Expr) and not isinstance(last.value, silent) and not cell["source"].rstrip().endswith(";")


@each
def test_outputs_are_clean_and_small(notebook):
    "No errors, warnings or progress bars; a notebook under 1 MB, the outputs of a cell under 100 KB."
    assert notebook.stat().st_size < 1_000_000
    for number, cell in cells(notebook, "code"):
        assert len(json.dumps(cell["outputs"])) < 100_000, f"cell {number} has outputs of over 100 KB"
        bad = [o for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
        assert not bad, f"cell {number} stored an error, a warning or a progress bar"


@each
def test_no_absolute_paths(notebook):
    for number, cell in cells(notebook):
        text = cell["source"] + "\n" + "\n".join(text_of(output) for output in cell.get("outputs", []))
        assert not ABSOLUTE.search(text), f"cell {number} holds a path of one machine: {ABSOLUTE.search(text)}"


def text_of(output):
    "What an output says in words."
    texts = [output.get("text", ""), *(value for key, value in output.get("data", {}).items() if key.startswith("text/"))]
    return "\n".join("".join(text) for text in texts)


def modules():
    "{module: (number of its notebook, its file)} from the notebooks' default_exp."
    found = {}
    for notebook in NOTEBOOKS:
        number = re.match(r"(\d+)([a-z]*)_", notebook.name)
        for _, cell in cells(notebook, "code"):
            for module in re.findall(r"^#\| *default_exp +(\S+)", cell["source"], flags=re.M):
                file = ROOT/"hpl_nb"/(module.replace(".", "/") + ".py")
                assert number, f"{name(notebook)} exports a module and needs a number"
                found[f"hpl_nb.{module}".removesuffix(".__init__")] = (int(number[1]), number[2]), file
    return found


def imported(file, module, known):
    "Pairs (a module of ours, whether inside a function) for the imports of a file."
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
              for node in ast.walk(function)}
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = ".".join((package[:len(package) - node.level + 1] if node.level else []) + [node.module] * bool(node.module))
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        yield from ((name, id(node) in inside) for name in names if name in known)


def test_modules_import_only_earlier_ones():
    known, wrong = modules(), []
    for module, (number, file) in known.items():
        for other, inside in imported(file, module, known):
            if not (known[other][0] < number or (inside and module in LAZY)): wrong.append(f"{module} imports {other}")
    assert not wrong, wrong


def test_every_module_has_a_notebook():
    generated = {file for _, file in modules().values()}
    others = {ROOT/"hpl_nb"/"_modidx.py", *(ROOT/"hpl_nb").rglob("__init__.py")}
    assert set((ROOT/"hpl_nb").rglob("*.py")) - others <= generated


def test_sidebar_names_every_notebook():
    def links(entry):
        if isinstance(entry, str): return [entry]
        return [*([entry["href"]] if "href" in entry else []), *(link for part in entry.get("contents", []) for link in links(part))]
    sidebar = yaml.safe_load((ROOT/"nbs"/"sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    named = links(sidebar)
    assert len(named) == len(set(named))
    assert set(named) == {name(notebook) for notebook in NOTEBOOKS}


@each
def test_links_between_notebooks(notebook):
    for number, cell in cells(notebook, "markdown"):
        for link in re.findall(r"\]\(([\w./-]+\.(?:ipynb|svg|png|md))[)#]", cell["source"]):
            assert (notebook.parent/link).exists(), f"cell {number} links to {link}, which does not exist"


def test_readme_is_the_index(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert not pages.readme_problems()
