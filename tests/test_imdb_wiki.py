"IMDB-WIKI in a small folder of DIR's layout: split, labelled rows, views, bad input."
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hpl_nb.core import HplError
from hpl_nb.data.core import Streams, StreamSettings
from hpl_nb.data.imdb_wiki import RELEASED_NORMALIZER, IMDBWiki, imdb_wiki, released_order, released_views


def make_folder(root, column="split", upper=False, rows=60):
    "40 training, 10 validation and 10 test rows, pictures of many sizes in two folders, rows out of order."
    rng = np.random.default_rng(1)
    splits = rng.permutation(["train"]*(rows - 20) + ["val"]*10 + ["test"]*10)
    paths = [f"{('imdb_crop', 'wiki_crop')[row % 2]}/{row % 4:02d}/nm{row}_1970-1-1_2000.jpg" for row in range(rows)]
    for row, path in enumerate(paths):
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 255, (*rng.integers(20, 60, 2), 3), dtype=np.uint8))
        image.convert("L" if row % 7 == 0 else "RGB").save(root/path)
    table = pd.DataFrame({"age": rng.integers(0, 120, rows), "path": paths, column: np.char.upper(splits) if upper else splits})
    table.to_csv(root/"imdb_wiki.csv", index=False)
    return root


@pytest.mark.parametrize("column, upper", [("split", False), ("SPLIT", False), ("split", True)])
def test_split_and_labelled_rows(tmp_path, column, upper):
    data = imdb_wiki(make_folder(tmp_path, column, upper), label_ratio=.2)
    table = pd.read_csv(tmp_path/"imdb_wiki.csv")
    train = np.flatnonzero(table[column].str.lower() == "train")
    positions = np.arange(40) # as the release does it
    np.random.default_rng(0).shuffle(positions)
    assert data.labelled.tolist() == train[positions[:8]].tolist()
    assert data.unlabelled.tolist() == train[positions[8:]].tolist()
    assert not set(data.labelled) & set(data.unlabelled)
    assert (table[column].str.lower()[data.val] == "val").all() and (table[column].str.lower()[data.test] == "test").all()
    assert data.sample_names[5] == table["path"][5] and data.targets[5, 0] == table["age"][5]
    assert data.normalizer.mean[0] == pytest.approx(table["age"][data.labelled].mean())


def test_counts_of_the_paper():
    order = released_order(np.arange(191509))
    assert sorted(order) == list(range(191509))
    assert [int(191509*ratio) for ratio in (.05, .1, .2)] == [9575, 19150, 38301]


def test_views_and_units(tmp_path):
    data = imdb_wiki(make_folder(tmp_path), label_ratio=.5, normalizer=RELEASED_NORMALIZER)
    needs = {"labelled": ("weak",), "unlabelled": ("weak", "strong")}
    batch = Streams(data, needs, StreamSettings(6, 6), steps=2, seed=0)[1]
    assert batch["unlabelled"]["strong"].shape == (6, 3, 224, 224)
    ages = torch.from_numpy(data.targets[batch["labelled"]["index"].numpy()])
    assert torch.allclose(batch["labelled"]["y"], ((ages - 35.8602)/12.2532).float())
    image = Image.new("RGB", (224, 224), (255, 255, 255))
    weak = torch.cat([released_views().weak([image], np.array([seed])) for seed in range(20)])
    assert set(weak.unique().tolist()) == {-1., 1.} # black beyond the edge, no mirror
    dark = (weak[:, 0] == -1)
    assert dark.all(2).sum(1).max() <= 16 and dark.all(1).sum(1).max() <= 16 and dark.any((1, 2)).sum() > 15
    crop, augment = released_views(64).strong.transforms
    assert (crop.padding, crop.padding_mode, augment.cutout) == (5, "zeros", 5)


def test_settings_load_what_the_loader_gives(tmp_path):
    by_hand, data = imdb_wiki(make_folder(tmp_path), label_ratio=.2, size=32), IMDBWiki(str(tmp_path), label_ratio=.2, size=32).load()
    assert data.labelled.tolist() == by_hand.labelled.tolist() and data.strong == by_hand.strong
    assert data.notes == by_hand.notes | {"views": "released", "size": 32, "deduplicate": False, "labelled_count": "released"}


def test_plain_view_is_the_releases_resize(tmp_path):
    from torchvision.transforms import v2
    data = imdb_wiki(make_folder(tmp_path), label_ratio=.5)
    rows = data.test[:3]
    def released(path): return v2.functional.pil_to_tensor(v2.Resize((224, 224))(Image.open(tmp_path/path).convert("RGB")))
    want = torch.stack([released(data.sample_names[row]) for row in rows])/255
    assert torch.allclose(data.plain(data.inputs[rows]), (want - .5)/.5, atol=1e-6)


def change(root, row, column, value):
    table = pd.read_csv(root/"imdb_wiki.csv", dtype=str)
    table.loc[row, column] = value
    table.to_csv(root/"imdb_wiki.csv", index=False)


@pytest.mark.parametrize("column, value, message", [
    ("age", "2014", "row 2 .*not within 0 to 200"), ("age", "-31", "row 2 .*not within 0 to 200"), ("age", "", "row 2 .*is missing"),
    ("split", "none", "row 2 .*'none' is none of train"), ("path", "imdb_crop/99/x.jpg", "1 of 60 pictures are missing.*imdb_crop.tar")])
def test_bad_rows_are_named(tmp_path, column, value, message):
    change(make_folder(tmp_path), 2, column, value)
    with pytest.raises(HplError, match=message): imdb_wiki(tmp_path)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(HplError, match="there is no folder .*imdb_crop.tar"): imdb_wiki(tmp_path/"none")
    with pytest.raises(HplError, match="there is no table .*imbalanced-regression"): imdb_wiki(tmp_path)
    (tmp_path/"imdb_wiki.csv").write_text("age,path\n3,a.jpg\n")
    with pytest.raises(HplError, match="no column 'split'"): imdb_wiki(tmp_path)
    make_folder(tmp_path)
    change(tmp_path, slice(None), "split", "val")
    with pytest.raises(HplError, match="no row of the split train"): imdb_wiki(tmp_path)


def test_duplicates_and_broken_pictures(tmp_path):
    order = imdb_wiki(make_folder(tmp_path), label_ratio=.5)
    first, second, third, held_out = order.labelled[0], order.unlabelled[3], order.labelled[5], order.test[0]
    names = order.sample_names
    (tmp_path/names[second]).write_bytes((tmp_path/names[first]).read_bytes())
    (tmp_path/names[third]).write_bytes((tmp_path/names[held_out]).read_bytes())
    (tmp_path/names[order.val[0]]).write_bytes(b"")
    with pytest.warns(UserWarning, match="IMDB-WIKI: 1 pictures"):
        data = imdb_wiki(tmp_path, label_ratio=.5, deduplicate=True, skip_broken=True)
    assert data.notes["duplicates"] == sorted([second, third]) and list(data.notes["skipped"]) == [order.val[0]]
    assert len(data.labelled) == 19 and len(data.unlabelled) == 19 and len(data.val) == 9 and len(data.test) == 10
