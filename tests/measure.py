"""Measure the size and the seams of the package.

    python tests/measure.py            # the table of issue 15: measure, value, goal
    python tests/measure.py FOLDER     # of another checkout
"""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SESSION = {"Session", "Training"} # annotations that mean the whole training session


def modules(root):
    "Generated modules by their names."
    return {path.relative_to(root).with_suffix("").as_posix().replace("/", "."): path.read_text(encoding="utf-8")
            for path in sorted((root/"hpl_nb").rglob("*.py")) if path.name != "_modidx.py"}


def functions(tree):
    "Every function of a module, methods and inner ones too."
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def names(function):
    "Its arguments, without self and cls."
    a = function.args
    return [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs) if arg.arg not in ("self", "cls")]


def public(tree):
    "`__all__` of a module."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__": return ast.literal_eval(node.value)
    return []


def fields(tree):
    "The largest dataclass: what its constructor takes."
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or not any("dataclass" in ast.unparse(d) for d in node.decorator_list): continue
        yield node.name, sum(isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.unparse(part.annotation) for part in node.body)


def importers(texts, of):
    "Modules that import another one."
    pattern = re.compile(rf"^from (?:\.|hpl_nb\.){of} import|^from \. import .*\b{of}\b|^import hpl_nb\.{of}\b", re.M)
    return [name for name, text in texts.items() if pattern.search(text)]


def code_in_view(root):
    "Lines of code that a companion page shows."
    import json
    for path in sorted((root/"nbs"/"experiments").glob("*.ipynb")):
        cells = [("".join(cell["source"])) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        yield path.stem, sum(len(text.splitlines()) for text in cells if not re.search(r"^#\| *(hide|echo: *false)", text, re.M))


def measure(root):
    "All numbers of a checkout: (measure, value, goal)."
    texts = modules(root)
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    shown = {name: len(public(tree)) for name, tree in trees.items()}
    arguments = {f"{name}.{function.name} at line {function.lineno}": len(names(function))
                 for name, tree in trees.items() for function in functions(tree)}
    constructors = {f"{name}.{kind}": count for name, tree in trees.items() for kind, count in fields(tree)}
    whole = [f"{name}.{f.name}" for name, tree in trees.items() for f in functions(tree)
             if any(arg.annotation is not None and ast.unparse(arg.annotation).strip("'\"") in SESSION
                    for arg in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs))]
    tests = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (root/"tests").glob("test_*.py"))
    def most(counts):
        name = max(counts, key=counts.get)
        return f"{counts[name]:,} ({name.removeprefix('hpl_nb.')})"
    pages = dict(code_in_view(root))
    return [("exported lines without _modidx", f"{sum(lines.values()):,}", "<= 9,500"),
            ("public names (in __all__)", f"{sum(shown.values()):,}", "<= 300"),
            ("largest module, lines", most(lines), "<= 500"), ("largest module, names", most(shown), "<= 25"),
            ("most arguments of a function", most(arguments), "<= 12"), ("most fields of a dataclass", most(constructors), ""),
            ("functions that take the whole training session", f"{len(whole)}", "<= 8"),
            ("modules that import cli", f"{len(importers(texts, 'cli'))}", "0"),
            ("most lines of code in view of a companion page", most(pages) if pages else "-", "<= 60"),
            ("test lines", f"{tests:,}", "fewer than 11,576")]


def main():
    rows = measure(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    widths = [max(len(str(row[i])) for row in rows) for i in range(3)]
    for row in rows: print("  ".join(str(value).ljust(width) for value, width in zip(row, widths)).rstrip())


if __name__ == "__main__": main()
