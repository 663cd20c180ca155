"""README.md and the site's pages, made from the notebooks without Quarto.

    python tests/pages.py           # notebooks -> _proc, ready for `quarto render _proc`
    python tests/pages.py --write   # nbs/index.ipynb -> README.md, settings.ini -> nbs/nbdev.yml
    python tests/pages.py --check   # is README.md what nbs/index.ipynb gives?
"""
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLOTLY = "application/vnd.plotly.v1+json"
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
    "nbs -> _proc: figures as HTML (Quarto does not know plotly's own format), then nbdev's processing."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)/"nbs"
        shutil.copytree(root/"nbs", copy, ignore=shutil.ignore_patterns(".*", "*.py"))
        for notebook in copy.rglob("*.ipynb"): show_figures(notebook)
        proc_nbs(str(copy), n_workers=0, force=True)
    return sorted((root/"_proc").rglob("*.ipynb"))


def show_figures(notebook):
    "Each plotly figure among a notebook's outputs that has no HTML of its own becomes the HTML that shows it."
    from plotly.io import to_html
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    for output in (output for cell in nb["cells"] for output in cell.get("outputs", []) if PLOTLY in output.get("data", {})):
        figure = output["data"].pop(PLOTLY)
        if "text/html" in output["data"]: continue
        figure = {key: figure[key] for key in ("data", "layout", "frames") if key in figure}
        html = to_html(figure, full_html=False, include_plotlyjs="cdn", validate=False)
        output["data"]["text/html"] = html.splitlines(True)
    notebook.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT) # nbdev looks for settings.ini from here upwards
    sys.path.insert(0, str(ROOT))
    if "--write" in sys.argv: write()
    elif "--check" in sys.argv: sys.exit("\n".join(readme_problems()) or None)
    else: print(*(page.relative_to(ROOT) for page in site()), sep="\n")
