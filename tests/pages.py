"""README.md and the site's pages, made from the notebooks without Quarto.

    python tests/pages.py           # notebooks -> _proc, ready for `quarto render _proc`
    python tests/pages.py --write   # no stored widgets; nbs/index.ipynb -> README.md, settings.ini -> nbs/nbdev.yml
    python tests/pages.py --check   # is README.md what nbs/index.ipynb gives?
"""
import ast
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
LIBRARY = "plotly.min.js" # the site's only copy; _quarto.yml names it too
ASSETS = "nbs/index_files" # pictures among the outputs of index.ipynb


def readme(root=ROOT):
    "README.md as text, and its pictures as {path: bytes}: nbdev's processing of index.ipynb, then Markdown."
    from execnb.nbio import read_nb
    from nbconvert import MarkdownExporter
    from nbdev import processors as p
    from nbdev.process import NBProcessor
    nb = read_nb(root/"nbs"/"index.ipynb")
    NBProcessor(nb=nb, procs=[p.populate_language, p.insert_warning, p.strip_ansi, p.hide_line, p.filter_stream_, p.rm_header_dash,
                              p.rm_export, p.clean_magics, p.hide_]).process()
    for cell in nb.cells: for_readme(cell)
    names = {"output_files_dir": ASSETS, "unique_key": "index"}
    text, resources = MarkdownExporter().from_notebook_node(as_notebook(nb), resources=names)
    return tidy(text, root), {name.replace("\\", "/"): data for name, data in resources["outputs"].items()}


def for_readme(cell):
    "Quarto's cell options, and outputs that GitHub shows: text, tables and pictures, but no scripts."
    if cell.cell_type != "code": return
    options = dict(re.findall(r"^#\| *([\w-]+) *: *(\S+)", cell.source, flags=re.M))
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    hidden = options.get("include") == "false"
    if hidden or options.get("echo") == "false": cell.metadata["transient"] = {"remove_source": True}
    if hidden or options.get("output") == "false": cell.outputs = []
    for output in cell.outputs:
        data = output.get("data", {})
        if PLOTLY in data or "<script" in "".join(data.get("text/html", "")): output.data = {}
        elif "text/markdown" in data: data.pop("text/html", None)


def as_notebook(nb):
    "An execnb notebook as nbformat's, with the language of its cells."
    import nbformat
    from execnb.nbio import nb2str
    notebook = nbformat.reads(nb2str(nb), as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def tidy(text, root):
    "Links that are relative to nbs/, made relative to the repository; no style sheets, no spare blank lines."
    def from_root(match):
        before, path, rest = match.groups()
        return f"{before}nbs/{path}{rest}" if (root/"nbs"/path).exists() else match.group()
    text = re.sub(r"(\]\(|src=\")([\w./-]+)([)#\"\s])", from_root, text)
    text = re.sub(r"<style.*?</style>\n?", "", text, flags=re.S)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip() + "\n"


def write(root=ROOT):
    "README.md with its pictures, and nbs/nbdev.yml, as files."
    from nbdev.quarto import refresh_quarto_yml
    refresh_quarto_yml()
    text, pictures = readme(root)
    (root/"README.md").write_text(text, encoding="utf-8")
    for path, data in pictures.items():
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        (root/path).write_bytes(data)


def readme_problems(root=ROOT):
    "What of README.md and its pictures differs from index.ipynb."
    text, pictures = readme(root)
    files = {"README.md": text.encode(), **pictures}
    return [f"{path} differs from what nbs/index.ipynb gives; run `python tests/check.py --fix`" for path, data in files.items()
            if not (root/path).exists() or (root/path).read_bytes() != data]


def site(root=ROOT):
    "nbs -> _proc: figures as HTML that uses the site's own copy of plotly.js, then nbdev's processing."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    from plotly.offline import get_plotlyjs
    refresh_quarto_yml()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)/"nbs"
        shutil.copytree(root/"nbs", copy, ignore=shutil.ignore_patterns(".*", "*.py"))
        for notebook in copy.rglob("*.ipynb"): change(notebook, without_widgets, name_pictures, show_figures(notebook, copy))
        (copy/LIBRARY).write_text(get_plotlyjs(), encoding="utf-8")
        proc_nbs(str(copy), n_workers=0, force=True)
    found = sorted((root/"_proc").rglob("*.ipynb"))
    for notebook in found: change(notebook, without_widgets, with_sources(root/"nbs"/notebook.relative_to(root/"_proc"), root))
    return found


def change(notebook, *edits):
    "Edit a notebook's JSON; a file that stays the same is not written."
    text = notebook.read_text(encoding="utf-8")
    nb = json.loads(text)
    for edit in edits: edit(nb)
    if nb != json.loads(text): notebook.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def show_figures(notebook, folder):
    "An edit: each plotly figure among the outputs becomes HTML for a page in the notebook's place below `folder`."
    import plotly.graph_objects as go

    from hpl_nb.figures import show
    address = "../" * len(notebook.parent.relative_to(folder).parts) + LIBRARY

    def edit(nb):
        for data in (output.get("data", {}) for cell in nb["cells"] for output in cell.get("outputs", [])):
            if PLOTLY not in data: continue
            figure = {key: value for key, value in data.pop(PLOTLY).items() if key in ("data", "layout", "frames")}
            words = "".join(data.get("text/plain", ""))
            alt = words.removeprefix("Figure: ") if words.startswith("Figure: ") else ""
            data["text/html"] = show(go.Figure(figure, skip_invalid=True), alt).page(address).splitlines(True)
    return edit


def picture_words(output):
    "What each picture of an output shows, in words: IPython's `alt`, or the name that an SVG gives itself."
    for kind, data in output.get("data", {}).items():
        if not kind.startswith("image/"): continue
        named = re.search(r'aria-label="([^"]+)"', "".join(data)) if kind == "image/svg+xml" else None
        yield output.get("metadata", {}).get(kind, {}).get("alt") or (named[1] if named else "")


def name_pictures(nb):
    "An edit: the words of a picture where Quarto looks for them."
    for cell in nb["cells"]:
        words = " ".join(words for output in cell.get("outputs", []) for words in picture_words(output))
        if words: cell["source"] = [f"#| fig-alt: {json.dumps(words, ensure_ascii=False)}\n", *"".join(cell["source"]).splitlines(True)]


def modules_of(notebook, root=ROOT):
    "The files of the modules that a notebook exports."
    names = re.findall(r"#\| *default_exp +([\w.]+)", notebook.read_text(encoding="utf-8"))
    return [root/"hpl_nb"/(name.replace(".", "/") + ".py") for name in names]


def definitions(file):
    "{exported name: its first line in the module, and its source there}"
    text = file.read_text(encoding="utf-8")
    found, exported = {}, None
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        for name in (part for target in targets for part in getattr(target, "elts", [target])):
            found[getattr(name, "id", getattr(name, "name", None))] = node.lineno, ast.get_source_segment(text, node)
        if "__all__" in found and exported is None: exported = ast.literal_eval(node.value)
    return {name: found[name] for name in exported or []}


def with_sources(notebook, root):
    "An edit of a notebook's page: nbdev documents functions and classes; here every exported name gets its place and its source."
    from nbdev.config import get_config
    config = get_config()

    def edit(nb):
        documented = {name: cell["outputs"][0]["data"] for cell in nb["cells"] if cell.get("outputs")
                      for name in re.findall(r"^show_doc\((\w+)\)", "".join(cell["source"]), flags=re.M)}
        values = []
        for file in modules_of(notebook, root):
            for name, (line, source) in definitions(file).items():
                address = f"{config.git_url}/blob/{config.branch}/{file.relative_to(root).as_posix()}#L{line}"
                link = f'[source]({address}){{target="_blank" style="float:right; font-size:smaller"}}'
                if name in documented: add_source(documented[name], link)
                else: values.append(f"{link}\n\n### {name}\n\n```python\n{shortened(source)}\n```")
        if values: nb["cells"].append(markdown_cell("## Constants\n\n" + "\n\n".join(values)))
    return edit


def add_source(data, link):
    "Put the link into a page's documentation of a name: nbdev has none, or that of a namesake in another module."
    text = re.sub(r"^\[source\]\(.*\n", "", "".join(data["text/markdown"]), flags=re.M)
    data["text/markdown"] = text.replace("---\n", f"---\n\n{link}\n", 1).splitlines(True)


def shortened(source, most=12):
    "The first lines of a source text."
    lines = source.splitlines()
    return "\n".join(lines if len(lines) <= most else [*lines[:most], "    ..."])


def markdown_cell(text): return {"cell_type": "markdown", "id": "constants", "metadata": {}, "source": text.splitlines(True)}


def without_widgets(nb):
    "An edit: no views of widgets, which no page can show, and nothing that is left of one."
    for cell in nb["cells"]:
        views = [output for output in cell.get("outputs", []) if output.get("data", {}).pop(WIDGET, None) is not None]
        if views: cell["outputs"] = [output for output in cell["outputs"] if output not in views or set(output["data"]) - {"text/plain"}]
    nb["metadata"].pop("widgets", None)


def strip_widgets(root=ROOT):
    "Notebooks without stored views of widgets, as files."
    for notebook in (root/"nbs").rglob("*.ipynb"): change(notebook, without_widgets)


if __name__ == "__main__":
    os.chdir(ROOT) # nbdev looks for settings.ini from here upwards
    sys.path.insert(0, str(ROOT))
    if "--write" in sys.argv:
        strip_widgets()
        write()
    elif "--check" in sys.argv: sys.exit("\n".join(readme_problems()) or None)
    else: print(*(page.relative_to(ROOT) for page in site()), sep="\n")
