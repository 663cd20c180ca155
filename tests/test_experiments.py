"Every companion notebook in a small setting: it runs, draws its figures, leaves the project alone, and repeats itself."
import hashlib
import json

import pages
import pandas as pd
import pytest
from test_stsb import small_table
from test_utkface import make_folder

papermill = pytest.importorskip("papermill")
SHORT = dict(seeds="0", epochs=2, iterations=2, record_every=1)
NOTEBOOKS = ("rotated_digits", "utkface", "imdb_wiki", "stsb", "ablation", "tabular", "cost", "results")
ABLATION_FIGURES = 8 # three on rotated digits, five on real data
TABLE_FIGURES = 10 # errors and coverage of five tables
DATA_FIGURES = 9 # of a data set's notebook: Fig. 1, 3, 4, 5, spread, calibration, two curves, and the moving one


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch): monkeypatch.setenv("ACCELERATE_USE_CPU", "true") # for the kernels


@pytest.fixture(autouse=True)
def unchanged(root):
    "The project's own notebooks and data are as they were."
    def digests():
        files = [path for folder in ("nbs/experiments", "data") for path in (root/folder).rglob("*")
                 if path.is_file() and path.suffix != ".py"]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    before = digests()
    yield
    assert digests() == before


@pytest.fixture
def play(root, tmp_path):
    "Run a notebook with parameters; its outputs as they are stored, cell by cell."
    def run(name, **parameters):
        source, target = root/"nbs/experiments"/f"{name}.ipynb", tmp_path/f"{name}.ipynb"
        papermill.execute_notebook(source, target, parameters, cwd=source.parent, progress_bar=False, kernel_name="python3")
        notebook = json.loads(target.read_text(encoding="utf-8"))
        pages.without_widgets(notebook) # whose names are drawn at random
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert any("injected-parameters" in cell["metadata"].get("tags", ()) for cell in cells) == bool(parameters)
        return [[output.get("data", output.get("text")) for output in cell["outputs"]] for cell in cells]
    return run


def figures(outputs):
    return sum("application/vnd.plotly.v1+json" in output for cell in outputs for output in cell if isinstance(output, dict))


def words(outputs): return json.dumps(outputs, ensure_ascii=False)


@pytest.fixture
def faces(tmp_path): return make_folder(tmp_path/"faces", rows=270, ages=[21 + row % 40 for row in range(270)])


@pytest.fixture
def pairs(tmp_path):
    "Sentence pairs of every score in every split."
    folder = tmp_path/"pairs"
    folder.mkdir()
    table = pd.read_csv(small_table(folder/"sts.tsv", 600), sep="\t")
    table.assign(score=[float(row//6 % 6) for row in range(600)]).to_csv(folder/"sts.tsv", sep="\t", index=False)
    return folder


def test_rotated_digits_repeat_themselves(play, tmp_path):
    "The first time the runs are trained, the second time they are read; nobody can tell which."
    small = dict(SHORT, epochs=3, methods="pseudo_label,joint_uncertainty,hpl_paper", jobs=1, out=str(tmp_path/"runs"))
    trained, read = (play("rotated_digits", **small) for _ in range(2))
    assert trained == read and figures(trained) == DATA_FIGURES + 1
    assert all(question in words(trained) for question in ("Where are the pseudo-labels wrong", "know it?", "Did the bi-level step help"))
    assert "One seed decides nothing" in words(trained)


def test_utkface_trains(play, faces, tmp_path):
    outputs = play("utkface", root=str(faces), methods="pseudo_label,hpl_paper", label_ratio=.25, size=32, out=str(tmp_path/"runs"),
                   **SHORT)
    assert figures(outputs) == DATA_FIGURES and "Stored runs" not in words(outputs) and "data.size=32" in words(outputs)
    assert str(faces) not in words(outputs)


def test_stsb_trains(play, pairs, tmp_path):
    outputs = play("stsb", root=str(pairs), methods="pseudo_label,hpl_paper", label_ratio=.25, hidden=4, out=str(tmp_path/"runs"), **SHORT)
    assert figures(outputs) == DATA_FIGURES and "model.hidden=4" in words(outputs)


def test_imdb_wiki_makes_up_its_pictures(play):
    outputs = play("imdb_wiki")
    assert figures(outputs) == DATA_FIGURES and "Made-up pictures" in words(outputs)


def test_missing_runs_are_named(play, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="no stored run of TNNR: set `root`"):
        play("stsb", methods="tnnr", stored=str(tmp_path))


def test_ablation_trains_and_reads(play, tmp_path):
    only, results = "BL,BL + UL,paper,D1,D6 log", str(tmp_path/"ablation.csv")
    small = dict(seeds="0,1", only=only, epochs=2, iterations=3, results=results, tried="paper,normalised,teacher",
                 search_seeds="100,101", improved=str(tmp_path/"improved.csv"), references="")
    trained = play("ablation", train=True, jobs=1, out=str(tmp_path/"runs"), **small)
    table = pd.read_csv(tmp_path/"ablation.csv").pivot(index="seed", columns="variant", values="mae")
    assert table.shape == (2, 5) and table["D6 log"].tolist() == table["paper"].tolist() != table["D1"].tolist()
    attempts = pd.read_csv(tmp_path/"improved.csv").groupby(["stage", "variant"])["seed"].agg(list).to_dict()
    assert attempts == {("search", key): [100, 101] for key in ("normalised", "paper", "teacher")} | {
        ("test", key): [0, 1] for key in ("normalised", "teacher")}
    assert figures(trained) == ABLATION_FIGURES
    read = play("ablation", **small)
    assert read[-1] == trained[-1] and figures(read) == ABLATION_FIGURES


def test_stored_ablation(play):
    outputs = play("ablation")
    assert figures(outputs) == ABLATION_FIGURES
    for text in ("Worse at every seed", "Better than both presets", "stsb, HPL (release) (seeds"): assert text in words(outputs)


def test_tabular_trains_and_reads(play, tmp_path):
    "Rows that are there are kept, missing ones made; what is read shows the same."
    pytest.importorskip("sklego")
    results = tmp_path/"tabular.csv"
    small = dict(seeds="0,1", only="Ridge,LabelSpreading,Supervised,UCVME", rows=300, epochs=1, label_ratios=".1", results=str(results),
                 datasets="diabetes,abalone")
    trained = play("tabular", train=True, **small)
    table = pd.read_csv(results)
    assert table.groupby(["dataset", "seed"])["method"].agg(list).map(len).tolist() == [4]*4
    assert table["same_coverage_0.95"].isna().all() and table["paid_coverage_0.95"].between(.5, 1).all() # 9 rows are too few for it
    assert (table["sigma_coverage_0.9"].notna() == (table["method"] == "UCVME")).all()
    table.drop(index=5).to_csv(results, index=False)
    again, read = (play("tabular", train=train, **small) for train in (True, False))
    pd.testing.assert_frame_equal(*(frame.sort_values([*frame.columns[:4]], ignore_index=True) for frame in (table, pd.read_csv(results))))
    assert figures(trained) == figures(again) == 4 and read[-1] == again[-1] == trained[-1]


def test_stored_tables(play):
    outputs = play("tabular")
    assert figures(outputs) == TABLE_FIGURES and "GradientBoosting" in words(outputs) and "LabelSpreading" in words(outputs)


def test_cost_measures_what_is_named(play):
    outputs = play("cost", live="Supervised", size=16, batch=4)
    assert figures(outputs) == 3 and "Supervised" in words(outputs[-1]) and "nothing was measured" not in words(outputs)


def test_results_need_nothing_but_what_is_stored(play):
    outputs = play("results")
    assert figures(outputs) >= 1 and "hpl_queue gpu --utkface FACES" in words(outputs) and "HPL (paper)" in words(outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_parameters_are_explained(root, name):
    "One cell for papermill on top, every value with a comment."
    cells = json.loads((root/"nbs/experiments"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", ())]
    assert tagged == code[:1] and all("#" in line for line in tagged[0]["source"])


def test_real_pairs(play, shared, tmp_path):
    vectors = str(shared/"data/glove/glove6B50d_stsb.npz")
    outputs = play("stsb", root=str(shared/"data/stsb"), vectors=vectors, methods="pseudo_label,hpl_paper", hidden=4,
                   out=str(tmp_path/"runs"), **dict(SHORT, epochs=1))
    assert figures(outputs) == DATA_FIGURES - 1 and "One epoch was kept" in words(outputs)
    assert "glove6B50d_stsb.npz" in words(outputs) and str(shared) not in words(outputs)


@pytest.mark.slow
def test_real_faces(play, shared, tmp_path):
    outputs = play("utkface", root=str(shared/"data/utkface"), methods="pseudo_label,hpl_paper", size=32, out=str(tmp_path/"runs"),
                   **dict(SHORT, epochs=1))
    assert figures(outputs) == DATA_FIGURES - 1 and str(shared) not in words(outputs)


@pytest.mark.parametrize("name", [*NOTEBOOKS, "compared_methods"])
def test_code_does_not_drown_the_page(root, name):
    "At most 60 lines of code in view; helpers are in modules."
    cells = json.loads((root/"nbs/experiments"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    shown = [source for source in code if not source.startswith(("#| hide", "#| include: false"))]
    assert sum(bool(line.strip()) for source in shown for line in source.splitlines()) <= 60
