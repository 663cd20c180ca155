"""What a change can break: the notebooks and tests that reach a changed function or class, the nearest first.

    python tests/changed.py            # what differs from the last commit
    python tests/changed.py main~3     # or from any other
"""
import ast
import json
import re
import subprocess
import sys
from collections import defaultdict, deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = "tests/test_notebooks.py" # the rules that every notebook keeps


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: sys.exit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def changed_files(base):
    "Files that differ from a commit, new ones too."
    new = git("ls-files", "--others", "--exclude-standard").splitlines()
    return sorted({*git("diff", "--name-only", base, "--").splitlines(), *new})


def text_of(path, base=None):
    "A file's text now or at a commit; empty where there is none."
    if base is None: return (ROOT/path).read_text(encoding="utf-8") if (ROOT/path).is_file() else ""
    return subprocess.run(["git", "show", f"{base}:{path}"], cwd=ROOT, capture_output=True, text=True).stdout


def module_name(path):
    "Of a Python file: hpl_nb.data.core, or small_runs, as tests import each other."
    parts = Path(path).with_suffix("").parts
    return ".".join(part for part in (parts[1:] if parts[0] == "tests" else parts) if part != "__init__")


def owner(node):
    "The symbol that a statement at the top of a module belongs to; a patched method belongs to its class."
    patched = any(ast.unparse(decorator).split("(")[0] == "patch" for decorator in getattr(node, "decorator_list", ()))
    if patched and not isinstance(node, ast.ClassDef):
        return [ast.unparse(node.args.args[0].annotation).strip("'\"")]
    if hasattr(node, "name"): return [node.name]
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [name.id for target in targets if target is not None for name in ast.walk(target) if isinstance(name, ast.Name)] or [""]


class Module:
    "Symbols of a Python text: their code, and what each of them names."
    def __init__(self, name, text):
        self.name, self.code, self.uses, self.imports, self.stars = name, defaultdict(str), defaultdict(set), {}, []
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)): continue
            for symbol in owner(node):
                self.code[symbol] += ast.unparse(node)
                self.uses[symbol] |= names_in(node)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import): self.imports |= {a.asname or a.name: (a.name, None) for a in node.names}
            if isinstance(node, ast.ImportFrom):
                origin = absolute(name, node)
                self.imports |= {a.asname or a.name: (origin, a.name) for a in node.names if a.name != "*"}
                self.stars += [origin for a in node.names if a.name == "*"]


def absolute(name, node):
    "The module that `from ... import` names."
    return ".".join([*name.split(".")[:-node.level], *([node.module] if node.module else [])]) if node.level else node.module


def names_in(node):
    "Names that a statement reads, arguments among them (fixtures), dotted ones as a whole, and modules and commands within its texts."
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} | {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
    found |= {ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return found | {word for text in texts for word in re.findall(r"\bhpl_[a-z_.]+|[\w-]+\.(?:csv|ipynb|json)", text)}


def notebook_text(path, lessons=True):
    "The code of a notebook without magics: cells that are no part of a module."
    cells = [cell for cell in json.loads(text_of(path))["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    kept = [source for source in sources if bool(re.search(r"^#\| *export", source, re.M)) != lessons]
    return re.sub(r"^\s*[%!].*", "", "\n".join(kept), flags=re.M)


def own_module(path):
    "The module that a notebook exports; empty: none."
    found = re.search(r'#\| *default_exp +([\w.]+)', text_of(path))
    return f"hpl_nb.{found[1]}" if found else ""


def read_project():
    "All modules, tests and notebooks by name; a notebook is a module of one symbol, its lessons."
    there = [path.relative_to(ROOT) for folder in ("hpl_nb", "tests", "nbs") for path in sorted((ROOT/folder).rglob("*.*"))]
    there = [path.as_posix() for path in there if not any(part[0] == "." for part in path.parts)]
    files = {path: module_name(path) for path in there if path.endswith(".py") and path[:4] != "nbs/" and path != "hpl_nb/_modidx.py"}
    modules = {name: Module(name, text_of(path)) for path, name in files.items()}
    modules["hpl_nb"].imports |= Module("hpl_nb.face", text_of("hpl_nb/__init__.pyi")).imports
    for path in (path for path in there if path.endswith(".ipynb")):
        lessons = Module(path, notebook_text(path))
        lessons.uses = {"": set().union(*lessons.uses.values(), set())}
        exported = Module(path, notebook_text(path, lessons=False))
        lessons.imports |= exported.imports
        lessons.stars += [own_module(path)] if own_module(path) else []
        modules[path] = lessons
    return modules


def resolve(modules, name, symbol, depth=9):
    "Where a symbol that a module can name is defined: (module, symbol), or None where that is no file of ours."
    if name not in modules or not depth: return None
    module = modules[name]
    if symbol in module.code and not name.endswith(".ipynb"): return name, symbol
    if symbol in module.imports:
        origin, original = module.imports[symbol]
        if original is None: return (origin, "*") if origin in modules else None
        if f"{origin}.{original}" in modules: return f"{origin}.{original}", "*"
        return resolve(modules, origin, original, depth - 1)
    return next(filter(None, (resolve(modules, star, symbol, depth - 1) for star in module.stars)), None)


def uses(modules, name, symbol):
    "What a symbol names, each as (module, symbol)."
    for word in modules[name].uses[symbol]:
        head, *rest = word.split(".")
        found = resolve(modules, name, head)
        while found and found[1] == "*" and rest: # a name within a module
            head, *rest = rest
            found = (f"{found[0]}.{head}", "*") if f"{found[0]}.{head}" in modules else resolve(modules, found[0], head)
        if found: yield found
        elif word in modules and word.startswith("hpl_nb."): yield word, "*"
        elif word.startswith("hpl_"): yield "hpl_nb.cli", word


def users(modules):
    "{(module, symbol): what names it}."
    found = defaultdict(set)
    for name, module in modules.items():
        for symbol in module.uses:
            for used in uses(modules, name, symbol): found[used].add((name, symbol))
    return found


def changed_symbols(modules, base, files):
    "Symbols whose code differs from a commit's."
    for path in files:
        if path.endswith(".ipynb") and path in modules: yield path, ""
        if not path.endswith(".py") or (name := module_name(path)) not in modules: continue
        before, now = Module(name, text_of(path, base)), modules[name]
        for symbol in {*before.code, *now.code}:
            if before.code.get(symbol) != now.code.get(symbol): yield name, symbol
        for symbol in {*before.imports, *now.imports}:
            if before.imports.get(symbol) != now.imports.get(symbol):
                yield from ((name, user) for user in now.uses if symbol in {word.split(".")[0] for word in now.uses[user]})


def distances(modules, starts):
    "{(module, symbol): modules between it and a change}, of all that a change can reach."
    backwards, found, waiting = users(modules), {}, deque((start, 0) for start in starts)
    while waiting:
        (name, symbol), distance = waiting.popleft()
        if found.get((name, symbol), distance + 1) <= distance: continue
        found[name, symbol] = distance
        everywhere = {user for (other, _), some in backwards.items() if other == name for user in some} if symbol == "" else set()
        for user in backwards[name, symbol] | backwards[name, "*"] | everywhere:
            if user[0] == name: waiting.appendleft((user, distance))
            else: waiting.append((user, distance + 1))
    return found


def data_readers(modules, files):
    "What names a changed data file."
    names = {Path(path).name for path in files if path.startswith(("data/", "nbs/")) and not path.endswith(".py")}
    return [(name, symbol) for name, module in modules.items() for symbol, words in module.uses.items() if words & names]


def affected(base="HEAD"):
    "Lists of (distance, notebook or test file, tests in it), the nearest first."
    files, modules = changed_files(base), read_project()
    found = distances(modules, [*changed_symbols(modules, base, files), *data_readers(modules, files)])
    items = defaultdict(set)
    for (name, symbol), distance in found.items():
        if name.endswith(".ipynb"): items[distance, name]
        if name.startswith("test_") and symbol.lower().startswith("test"): items[distance, f"tests/{name}.py"].add(symbol)
    items[0, ALWAYS]
    def order(item): return item[0][0], item[0][1].count("/"), item[0][1] # tutorials and experiments, which are long, after the others
    return [(distance, path, sorted(tests)) for (distance, path), tests in sorted(items.items(), key=order)]


if __name__ == "__main__":
    for distance, path, tests in affected(*sys.argv[1:]): print(distance, path, *tests)
