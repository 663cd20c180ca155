"The check of a data set's folder: every kind of layout, every kind of problem, and the real faces."
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hpl_nb import data
from hpl_nb.core import HplError, LabelNormalizer
from hpl_nb.data import images
from hpl_nb.data.core import SemiSupervisedData, describe, synthetic
from hpl_nb.data.own import Reading, Split, from_arrays, from_frame, from_images


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)


def make_own(root, rows=10, **columns):
    for row in range(rows): draw(root/"faces"/f"{row}.png", row)
    table = pd.DataFrame({"file": [f"{row}.png" for row in range(rows)], "label": np.linspace(0, 1, rows), **columns})
    table.to_csv(root/"labels.csv", index=False)
    return root


def kinds(report): return dict(zip(data.summary(report)["kind"], data.summary(report)["count"]))


def check(root, **settings): return data.check(root, progress=False, **settings)


def test_a_good_folder_of_ones_own(tmp_path):
    report = check(make_own(tmp_path))
    assert report.ok and not len(report.problems) and report.rows == {"all": 10} and "0 errors, 0 warnings" in str(report)


def test_unlabelled_rows_are_no_problem_but_text_is(tmp_path):
    labels = ["1", "", "nan", "3", "many", "inf", "2", "1e400", "4", "5"]
    report = check(make_own(tmp_path, label=labels, split=["labelled", "unlabelled", "unlabelled"] + ["test"]*6 + ["extra"]))
    assert kinds(report) == {"text label": 1, "infinite label": 2, "unknown split": 1}
    assert not report.ok and set(report.problems["row"]) == {4, 5, 7, 9}
    report = check(make_own(tmp_path, label=["", "", ""] + ["1"]*7, split=["train", "labelled", "val"] + ["test"]*7))
    assert kinds(report) == {"missing label": 2} and set(report.problems["row"]) == {1, 2}


def test_problems_of_pictures(tmp_path):
    make_own(tmp_path, split=["train"]*6 + ["test"]*4)
    (tmp_path/"faces"/"0.png").write_bytes(b"")
    (tmp_path/"faces"/"1.png").unlink()
    (tmp_path/"faces"/"3.png").write_bytes((tmp_path/"faces"/"2.png").read_bytes())
    (tmp_path/"faces"/"8.png").write_bytes((tmp_path/"faces"/"4.png").read_bytes())
    draw(tmp_path/"faces"/"extra.png", 99)
    report = check(tmp_path)
    assert kinds(report) == {"broken picture": 1, "missing picture": 1, "picture not in the table": 1, "same picture in several splits": 1,
                             "same picture twice in one split": 1, "same picture, different labels": 2}
    assert "2 groups of identical pictures: 1 cross splits, 2 carry different labels, 1 do both." in report.notes
    assert any(note.startswith("deduplicate=True would leave out 2 of 4 training rows") for note in report.notes)
    assert str(tmp_path) not in str(report) and "extra.png" in str(report)
    html = report._repr_html_()
    assert html.count("<table") == 1 and "missing picture" in html and "8.png" in html


def test_each_picture_is_read_and_decoded_once(tmp_path, monkeypatch):
    "One look at a file gives its pixels and its fingerprint, and each folder is listed once."
    make_own(tmp_path)
    calls = Counter()

    def counted(name, real):
        def call(*arguments):
            calls[name] += 1
            return real(*arguments)
        return call

    for name in ("read_bytes", "open_image", "_listing"): monkeypatch.setattr(images, name, counted(name, getattr(images, name)))
    assert check(tmp_path).ok and calls == {"read_bytes": 10, "open_image": 10, "_listing": 2}


def test_names_are_escaped_in_html(tmp_path):
    make_own(tmp_path, rows=2, file=["<script>.png", "1.png"])
    assert "<script>" not in check(tmp_path)._repr_html_()


def test_columns_and_tables_are_named(tmp_path):
    make_own(tmp_path)
    pd.read_csv(tmp_path/"labels.csv").rename(columns={"file": "wo", "label": "wieviel"}).to_csv(tmp_path/"labels.csv", index=False)
    with pytest.raises(HplError, match="no column FileName or path .*file_column="): check(tmp_path)
    assert check(tmp_path, file_column="wo", label_column="wieviel").ok
    with pytest.raises(HplError, match="no column nirgends .*split_column="):
        check(tmp_path, file_column="wo", label_column="wieviel", split_column="nirgends")
    (tmp_path/"second.csv").write_text("a\n1\n")
    with pytest.raises(HplError, match="holds 2 tables .labels.csv, second.csv.; name one with table="): check(tmp_path)
    assert check(tmp_path, table="labels.csv", file_column="wo", label_column="wieviel").ok
    with pytest.raises(HplError, match="there is no folder"): check(tmp_path/"none")
    with pytest.raises(HplError, match="holds 0 tables"): check(tmp_path/"faces")


def test_imdb_wiki(tmp_path):
    for row in range(6): draw(tmp_path/"imdb_crop"/"00"/f"{row}.jpg", row)
    table = pd.DataFrame(dict(age=[20, 30, 300, 40, 50, 60], path=[f"imdb_crop/00/{row}.jpg" for row in range(6)],
                              split=["train"]*4 + ["val", "test"]))
    table.to_csv(tmp_path/"imdb_wiki.csv", index=False)
    report = check(tmp_path)
    assert report.layout == "IMDB-WIKI" and kinds(report) == {"label out of range": 1} and report.rows == {"train": 4, "val": 1, "test": 1}


def test_nothing_is_changed(tmp_path):
    make_own(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    check(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_importing_it_is_light():
    code = "import sys, hpl_nb.data.core; print([m for m in ('pandas', 'PIL', 'torchvision', 'hpl_nb.data.images') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_real_faces(shared):
    "Every one of the 16,434 pictures decodes; what is doubtful about them is counted."
    report = check(shared/"data"/"utkface")
    assert report.ok and report.rows == {"train": 10518, "val": 2629, "test": 3287}
    assert kinds(report) == {"same picture in several splits": 131, "same picture twice in one split": 136,
                             "same picture, different labels": 123}
    assert report.notes[0].startswith("utkface.csv is the authors' table")
    assert report.notes[1].startswith("267 groups of identical pictures: 131 cross splits, 123 carry different labels")
    assert report.notes[2].startswith("deduplicate=True would leave out 246 of 10,518 training rows")


def test_the_real_pairs(shared):
    pytest.importorskip("hpl_nb.data.stsb")
    report = check(shared/"data"/"stsb")
    assert report.ok and report.rows == {"train": 5249, "dev": 1000, "test": 1000}
    assert report.notes[0].startswith("sts.tsv is the authors' table")
    assert report.notes[1] == "55 groups of identical pairs: 28 cross splits, 15 carry different labels, 8 do both."


def test_bad_pairs(tmp_path):
    pytest.importorskip("hpl_nb.data.stsb")
    columns = ["sentence1", "sentence2", "score", "split", "sent_s1", "sent_s2"]
    rows = [["a b", "c d", "1", "train"], ["c d", "a b", "2", "test"], ["e", "f", "3", "dev"]]
    pd.DataFrame([[*row, row[0], row[1]] for row in rows], columns=columns).to_csv(tmp_path/"sts.tsv", sep="\t", index=False)
    report = check(tmp_path)
    assert kinds(report) == {"other table": 1, "same pair in several splits": 1, "same pair, different labels": 1}
    rows[2][2] = "six"
    pd.DataFrame([[*row, row[0], row[1]] for row in rows], columns=columns).to_csv(tmp_path/"sts.tsv", sep="\t", index=False)
    report = check(tmp_path)
    assert not report.ok and "six" in str(report)


def test_labels_of_another_unit_in_a_folder(tmp_path):
    make_own(tmp_path, rows=40, label=[*range(20, 49), 999, *range(240, 360, 12)], split=["train"]*30 + ["test"]*10)
    report = check(tmp_path)
    assert report.ok and kinds(report) == {"label far from the others": 1, "labels on another scale": 1}
    assert "Labels: train 20 to 999 (mean 66.17, 30 rows); test 240 to 348 (mean 294, 10 rows)." in report.notes


# ---- data that are loaded already, and what their loaders say

def told(caught): return [str(warning.message) for warning in caught]


def table(rows=120, labelled=60):
    random = np.random.default_rng(0)
    return random.normal(size=(rows, 3)), np.where(np.arange(rows) < labelled, random.uniform(20, 60, rows), np.nan)


SPLIT = {"val": range(20, 40), "test": range(40, 60)}


@pytest.mark.parametrize(("one", "other", "text"), [
    (0, 45, "1 of 20 labelled rows are equal to a row of test (row 0 is 45)"),
    (70, 25, "1 of 60 unlabelled rows are equal to a row of val (row 70 is 25)"),
    (25, 45, "1 of 20 val rows are equal to a row of test (row 25 is 45)"),
    (0, 70, "1 of 20 labelled rows are equal to a row of unlabelled (row 0 is 70)")])
def test_repeated_rows_are_named(one, other, text, recwarn):
    x, y = table()
    x[other] = x[one]
    loaded = from_arrays(x, y, split=SPLIT)
    assert len(told(recwarn)) == 1 and text in told(recwarn)[0]
    report = check(loaded)
    assert report.ok and kinds(report)["same sample in several splits"] == 1
    again = from_arrays(x, y, split=SPLIT, deduplicate=True)
    assert len(again.notes["duplicates"]) == (one != 25) and "duplicates" not in loaded.notes
    assert len(recwarn) == 1 + (one == 25) # two rows that are held out stay, and that is said again


def test_frames_are_compared_as_they_are_encoded(recwarn):
    x, y = table()
    frame = pd.DataFrame(x, columns=list("abc")).assign(kind=np.where(np.arange(120) % 2, "odd", "even"), y=y)
    frame.loc[45] = frame.loc[1].where(frame.columns != "y", 33.)
    from_frame(frame.infer_objects(), "y", split=SPLIT)
    assert len(recwarn) == 1 and "(row 1 is 45)" in told(recwarn)[0]
    frame.loc[45, "kind"] = "even"
    from_frame(frame.infer_objects(), "y", split=SPLIT)
    assert len(recwarn) == 1


def test_zero_is_zero_and_pictures_are_compared(recwarn):
    x, y = table()
    x[0], x[45] = 0., -0.
    assert from_arrays(x, y, split=SPLIT) and "(row 0 is 45)" in told(recwarn)[0]
    pictures = np.random.default_rng(0).integers(0, 255, (120, 8, 8), dtype=np.uint8)
    pictures[70] = pictures[3]
    assert from_arrays(pictures, y, split=SPLIT) and "(row 3 is 70)" in told(recwarn)[1]


def test_equal_files_and_forgotten_files_are_named(tmp_path, recwarn):
    make_own(tmp_path, rows=30, label=[*map(str, range(20)), *[""]*10])
    (tmp_path/"faces"/"25.png").write_bytes((tmp_path/"faces"/"4.png").read_bytes())
    for name in ("left.jpg", "over.png"): draw(tmp_path/"faces"/name, 99)
    split = {"val": range(5, 10), "test": range(10, 15)}
    loaded = from_images(tmp_path/"faces", tmp_path/"labels.csv", "file", "label", split=split, reading=Reading(16))
    assert "2 pictures in" in told(recwarn)[0] and "left.jpg" in told(recwarn)[0]
    assert "(row 4 (4.png) is 25 (25.png))" in told(recwarn)[1] and len(recwarn) == 2
    assert kinds(check(loaded)) == {"same sample in several splits": 1}
    (tmp_path/"faces"/"3.png").write_bytes(b"no picture")
    report = check(loaded)
    assert not report.ok and kinds(report)["broken picture"] == 1 and "3.png" in str(report)


def test_a_normaliser_of_another_unit(recwarn):
    x, y = table()
    rows = dict(labelled=range(20), unlabelled=range(60, 120), val=range(20, 40), test=range(40, 60))
    loaded = SemiSupervisedData("ages", x, y*12, **{split: [*r] for split, r in rows.items()}, normalizer=LabelNormalizer((35.,), (11.,)))
    assert kinds(check(loaded)) == {"normaliser of another unit": 1} and not len(recwarn)


def test_ordinary_labels_raise_no_warning(recwarn):
    "Normal, uniform, skewed and counted labels, of many sizes; and the package's own data."
    for seed in range(20):
        random = np.random.default_rng(seed)
        rows = int(random.choice([12, 60, 300, 3000]))
        x = random.normal(size=(rows, 4))
        for y in (random.normal(0, 1e-3, rows), random.uniform(1e5, 1e6, rows), random.lognormal(0, 1, rows), random.poisson(.2, rows),
                  random.standard_t(4, rows), random.exponential(5., rows), np.full(rows, 3.)):
            from_arrays(x, np.where(random.uniform(size=rows) < .7, y, np.nan), split=Split(seed=seed))
    assert not told(recwarn)
    report = check(synthetic(500))
    assert report.ok and not len(report.problems) and report.notes[0].startswith("labels in units: labelled")


def test_hidden_labels_are_not_shown():
    x, y = table()
    y[60:] = 777 # true labels of unlabelled rows
    loaded = from_arrays(x, y, split={**SPLIT, "unlabelled": range(60, 120), "train": range(20)})
    x[61] = x[60]
    report = check(from_arrays(x, y, split={**SPLIT, "unlabelled": range(60, 120), "train": range(20)}))
    assert "777" not in describe(loaded) + repr(loaded) + str(report)


def test_inputs_that_cannot_be_compared_are_said_so():
    class Words(list):
        def __getitem__(self, rows): return [super(Words, self).__getitem__(row) for row in rows]

    words = SemiSupervisedData("words", Words("abcd"), np.arange(4.), [0, 1], [2], [], [3])
    assert check(words).ok and "Samples are not compared with each other: Words" in check(words).notes[-1]


class TestTables:
    "A table of numbers, text and dates, in a file or in memory."
    def frame(self):
        rng = np.random.default_rng(0)
        frame = pd.DataFrame({"patient_id": np.arange(60), "bmi": rng.normal(27, 4, 60).round(1), "ward": rng.choice(["A", "B"], 60),
                              "admission": pd.date_range("2024-01-31", periods=60).strftime("%Y-%m-%d"),
                              "visit": ["01/02/2024", "03/04/2024"]*30,
                              "stay": np.where(np.arange(60) < 20, rng.normal(6, 1, 60).round(2), np.nan)})
        frame.loc[9, "bmi"], frame.loc[4, "ward"] = 999, None
        frame.loc[31] = frame.loc[30]
        frame.loc[31, "patient_id"] = 31
        return frame

    @pytest.mark.parametrize("kind", ["frame", "csv", "tsv", "parquet", "semicolons"])
    def test_each_kind_of_file(self, kind, tmp_path):
        frame, path = self.frame(), tmp_path/f"patients.{kind}"
        if kind == "parquet": frame.to_parquet(path)
        elif kind != "frame": frame.to_csv(path := tmp_path/f"p.{'tsv' if kind == 'tsv' else 'csv'}", index=False,
                                           sep={"tsv": "\t", "semicolons": ";"}.get(kind, ","))
        report = check(frame if kind == "frame" else path, target="stay")
        assert report.rows == {"labelled": 20, "unlabelled": 40} and not report.ok
        assert kinds(report) == {"column that is refused": 1, "identifier": 1, "impossible values": 1, "same row twice in one split": 1}
        assert "Columns of numbers: bmi, admission." in report.notes and "Columns of text: ward." in report.notes
        for part in ("'ward' in 1 row(s)", "'admission' (dates, as days"): assert any(part in note for note in report.notes)
        assert "999 in row 9" in str(report) and "X['visit'] = " in str(report)

    def test_labels(self):
        frame = self.frame().drop(columns="visit").astype({"stay": object})
        frame.loc[3, "stay"], frame.loc[5, "stay"] = "long", np.inf
        report = check(frame, target="stay")
        assert kinds(report)["text label"] == kinds(report)["infinite label"] == 1 and set(report.problems["row"]) >= {3, 5}
        assert check(frame).rows == {"all": 60}
        with pytest.raises(HplError, match="has no column 'days' \\(it has 'patient_id'"): check(frame, target="days")

    def test_no_file(self, tmp_path):
        with pytest.raises(HplError, match="there is no folder .*and no file of that name"): check(tmp_path/"gone.csv")
        (tmp_path/"short.csv").write_text("a,b\n1,2\n3\n")
        with pytest.raises(HplError, match="row 1 .*has 1 fields"): check(tmp_path/"short.csv")


def test_the_three_tables_of_stsb_dir(tmp_path):
    columns = ["sentence1", "sentence2", "score"]
    for split in ("train", "dev", "test"):
        rows = [[f"{split} {row}", f"another {row}", row % 6] for row in range(12)]
        pd.DataFrame([*rows, ["another 3", "train 3", 3]], columns=columns).to_csv(tmp_path/f"{split}_new.tsv", sep="\t", index=False)
    report = check(tmp_path)
    assert report.layout == "STS-B" and report.rows == {"train": 13, "dev": 13, "test": 13} and report.ok
    assert kinds(report) == {"same pair in several splits": 1}
    (tmp_path/"dev_new.tsv").unlink()
    assert "no dev_new.tsv" in str(check(tmp_path)) and not check(tmp_path).ok
