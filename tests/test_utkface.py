"Pictures and UTKFace: odd files, bad tables, views against torchvision, and the real faces where they are at hand."
import io
import pickle
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from hpl_nb.core import HplError
from hpl_nb.data import images, imdb_wiki, stsb, tables, utkface
from hpl_nb.data.core import SETS, Streams, StreamSettings
from hpl_nb.data.images import (
    ImageFiles,
    ImageSource,
    RandAugmentMC,
    decode_image,
    exact_count,
    pixel_statistics,
    published_views,
    shift_image,
    tar_index,
)
from hpl_nb.data.utkface import released_views
from hpl_nb.settings import as_json, digest, from_json

NEEDS = {"labelled": ("weak",), "unlabelled": ("weak", "strong"), "outer": ("weak",)}


def picture(seed=0, size=(40, 40)):
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def make_folder(root, pictures="UTKFace", rows=30, ages=None):
    "A folder in UTKFace's layout: 5 validation and 5 test rows, the others for training."
    (root/pictures).mkdir(parents=True, exist_ok=True)
    names = [f"{row}.jpg" for row in range(rows)]
    for row, name in enumerate(names): picture(row).save(root/pictures/name)
    table = pd.DataFrame(dict(FileName=names, age=ages or list(range(21, 21 + rows)), SPLIT=["TRAIN"]*(rows - 10) + ["VAL"]*5 + ["TEST"]*5))
    table.to_csv(root/"utkface.csv", index=False)
    return root


def edit(root, row, **values):
    table = pd.read_csv(root/"utkface.csv", dtype=str)
    for column, value in values.items(): table.loc[row, column] = value
    table.to_csv(root/"utkface.csv", index=False)


def load(root, **settings):
    return utkface.utkface(root, **{"label_ratio": .5, "size": 32, **settings})


# ---- the folder

@pytest.mark.parametrize("folder", ["UTKFace", "images", "."])
def test_layouts(tmp_path, folder):
    data = load(make_folder(tmp_path, folder))
    assert [len(data.rows(split)) for split in ("labelled", "unlabelled", "val", "test")] == [10, 10, 5, 5]
    assert not set(data.labelled) & set(data.unlabelled)
    assert data.inputs[np.array([3])][0].size == (32, 32) and data.sample_names[3] == "3.jpg" and data.targets[3] == 24


def test_tar_files_are_read_in_place(tmp_path):
    plain = load(make_folder(tmp_path))
    for part, names in enumerate((range(15), range(15, 30))):
        with tarfile.open(tmp_path/f"images-{part}.tar", "w") as tar:
            for row in names: tar.add(tmp_path/"UTKFace"/f"{row}.jpg", f"UTKFace/{row}.jpg")
    for path in (tmp_path/"UTKFace").iterdir(): path.unlink()
    before = sorted(tmp_path.rglob("*"))
    packed = load(tmp_path)
    assert {source.path.suffix for source in packed.inputs.sources} == {".tar"}
    assert np.array_equal(np.asarray(packed.inputs[np.array([17])][0]), np.asarray(plain_picture(17)))
    assert sorted(tmp_path.rglob("*")) == before and plain.sample_names == packed.sample_names


def plain_picture(seed):
    file = io.BytesIO()
    picture(seed).save(file, "JPEG")
    return Image.open(file).resize((32, 32), Image.Resampling.BILINEAR)


def test_a_bad_tar_file_is_named(tmp_path):
    make_folder(tmp_path)
    with tarfile.open(tmp_path/"images-0.tar.gz", "w:gz") as tar: tar.add(tmp_path/"UTKFace"/"1.jpg", "1.jpg")
    (tmp_path/"images-0.tar.gz").rename(tmp_path/"images-0.tar")
    with pytest.raises(HplError, match="images-0.tar is not an uncompressed tar file"): load(tmp_path)
    with tarfile.open(tmp_path/"images-0.tar", "w") as tar: tar.add(tmp_path/"UTKFace"/"1.jpg", "1.jpg")
    (tmp_path/"images-0.tar").write_bytes((tmp_path/"images-0.tar").read_bytes()[:900])
    with pytest.raises(HplError, match="images-0.tar is (cut off|not an uncompressed)"): load(tmp_path)


def test_byte_order_mark_and_windows_lines(tmp_path):
    make_folder(tmp_path)
    text = (tmp_path/"utkface.csv").read_text().replace("\n", "\r\n")
    (tmp_path/"utkface.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(load(tmp_path).labelled) == 10


@pytest.mark.parametrize("change, message", [
    (dict(age="old"), "row 3 .*'old' is not a number"), (dict(age=""), "row 3 .*is missing"),
    (dict(age="nan"), "row 3 .*is missing"), (dict(age="-inf"), "row 3 .*is infinite"),
    (dict(age="-3"), "row 3 .*not within 0 to 120"), (dict(SPLIT="DEV"), "row 3 .*'dev' is none of train, val, test"),
    (dict(FileName="gone.jpg"), "1 of 30 pictures are missing in .*gone.jpg.*susanqq.github.io/UTKFace")])
def test_bad_rows_are_named(tmp_path, change, message):
    edit(make_folder(tmp_path), 3, **change)
    with pytest.raises(HplError, match=message): load(tmp_path)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(HplError, match="there is no folder"): load(tmp_path/"none")
    with pytest.raises(HplError, match="there is no table .*download=True"): load(tmp_path)
    (tmp_path/"utkface.csv").write_text("FileName,years\n1.jpg,3\n")
    with pytest.raises(HplError, match="no column 'age' .it has 'FileName', 'years'"): load(tmp_path)
    (tmp_path/"utkface.csv").write_text("FileName,age,SPLIT\n")
    with pytest.raises(HplError, match="has no rows"): load(tmp_path)
    (tmp_path/"utkface.csv").write_bytes(b"FileName,age,SPLIT\n\xff\xfe,3,TRAIN\n")
    with pytest.raises(HplError, match="could not be read as a table"): load(tmp_path)
    (tmp_path/"utkface.csv").write_bytes(b"")
    with pytest.raises(HplError, match="could not be read as a table"): load(tmp_path)


@pytest.mark.parametrize("settings, message", [
    (dict(label_ratio=0), "label_ratio is 0"), (dict(label_ratio=5), "label_ratio is 5"), (dict(size=0), "size is 0"),
    (dict(label_ratio=.05), "500 rows are to be labelled, but there are 20 .*labelled_count=exact_count")])
def test_bad_arguments_are_named(tmp_path, settings, message):
    with pytest.raises(HplError, match=message): load(make_folder(tmp_path), **settings)


def test_fully_labelled_and_other_seeds(tmp_path):
    assert len(load(make_folder(tmp_path), label_ratio=1).unlabelled) == 0
    sets = [tuple(load(tmp_path, split_seed=seed).labelled) for seed in (0, 0, 1)]
    assert sets[0] == sets[1] != sets[2]


# ---- settings

def test_settings_load_what_the_loader_gives(tmp_path):
    "In memory, on disk and on the device, with notes that say how."
    root = str(make_folder(tmp_path))
    by_hand = load(tmp_path, views=published_views(32), labelled_count=exact_count)
    for pixels in ("memory", "disk", "device"):
        data = utkface.UTKFace(root, label_ratio=.5, size=32, views="published", labelled_count="exact", pixels=pixels).load()
        assert all(np.array_equal(data.rows(split), by_hand.rows(split)) for split in SETS) and data.normalizer == by_hand.normalizer
        assert torch.equal(data.plain(data.inputs[data.val]), by_hand.plain(by_hand.inputs[data.val]))
        assert data.notes == by_hand.notes | {"views": "published", "size": 32, "deduplicate": False, "labelled_count": "exact"}
        assert getattr(data.strong, "transforms", None)[0] == by_hand.strong.transforms[0]
        assert (tmp_path/"cache").exists() == (pixels != "memory")
    utkface.UTKFace(root, label_ratio=.5, size=32, labelled_count="exact", pixels="disk", cache=str(tmp_path/"other")).load()
    assert len([*(tmp_path/"other").iterdir()]) == 1


@pytest.mark.parametrize("kind", [utkface.UTKFace, imdb_wiki.IMDBWiki, stsb.STSB])
def test_settings_travel_and_places_do_not_count(kind):
    "A folder decides no number; a missing one is named when it is needed."
    value = kind("here", label_ratio=.2)
    assert from_json(as_json(value), kind) == value == kind("there", label_ratio=.2) != kind("here")
    assert digest(value) == digest(kind("there", label_ratio=.2))
    with pytest.raises(HplError, match=f"root is missing: the folder that holds {kind.short}; hpl_nb.data.check"): kind().load()
    with pytest.raises(HplError, match="label_ratio is 5"): kind("here", label_ratio=5)


@pytest.mark.parametrize("wrong, says", [
    (dict(views="public"), "views is 'public'; choose 'released' or 'published'"),
    (dict(size=0), "size is 0"), (dict(size=1.5), "size is 1.5"),
    (dict(pixels="gpu"), "choose 'memory' or 'disk' or 'device'"), (dict(labelled_count="all"), "choose 'released' or 'exact'"),
    (dict(lable_ratio=.1), "did you mean 'label_ratio'")])
def test_wrong_settings_are_named(wrong, says):
    with pytest.raises(HplError, match=says): utkface.UTKFace("here", **wrong)


# ---- fetching

@pytest.fixture
def server(monkeypatch):
    "A file server on this machine, and a registry that points to it."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/utkface.csv" else 404)
            self.end_headers()
            if self.path == "/utkface.csv": self.wfile.write(content)
        def log_message(self, *_): pass
    content = b"FileName,age,SPLIT\n" + b"".join(b"%d.jpg,%d,%s\n" % (n, 21 + n, b"TRAIN" if n < 20 else b"VAL") for n in range(30))
    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    import hashlib
    entry = dict(url=f"http://127.0.0.1:{http.server_port}/utkface.csv", sha256=hashlib.sha256(content).hexdigest())
    known = {"utkface.csv": entry, "gone.csv": dict(entry, url=entry["url"].replace("utkface", "gone"))}
    monkeypatch.setattr(tables, "registry", lambda: known)
    yield known
    http.shutdown()


def test_fetch_checks_the_checksum(tmp_path, server):
    make_folder(tmp_path)
    (tmp_path/"utkface.csv").unlink()
    data = load(tmp_path, download=True)
    assert len(data.val) == 10 and tables.fetch("utkface.csv", tmp_path) == tmp_path/"utkface.csv"
    (tmp_path/"utkface.csv").write_text("mine")
    with pytest.raises(HplError, match="move it away"): tables.fetch("utkface.csv", tmp_path)
    assert (tmp_path/"utkface.csv").read_text() == "mine"
    server["utkface.csv"]["sha256"] = "0"*64
    with pytest.raises(HplError, match="could not fetch utkface.csv"): tables.fetch("utkface.csv", tmp_path/"other")
    assert not (tmp_path/"other"/"utkface.csv").exists()
    with pytest.raises(HplError, match="could not fetch gone.csv .*Get it yourself from http"): tables.fetch("gone.csv", tmp_path)


# ---- decoding

@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("P", "gif"), ("1", "png"),
                                          ("CMYK", "jpg"), ("YCbCr", "jpg"), ("RGB", "bmp"), ("RGB", "webp")])
def test_modes_become_rgb(tmp_path, mode, suffix):
    original = picture(3, (60, 90))
    original.convert(mode).save(tmp_path/f"a.{suffix}")
    image = decode_image(ImageSource(tmp_path/f"a.{suffix}"), 32)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    if mode in ("RGBA", "CMYK", "YCbCr", "RGB"):
        small = original.resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(small).astype(int)).mean() < 4


def test_sixteen_bits_and_unknown_ranges(tmp_path):
    values = np.linspace(0, 65535, 40*40).reshape(40, 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path/"a.png")
    decoded = np.asarray(decode_image(ImageSource(tmp_path/"a.png"), pixel_range=(0, 65535)))[..., 0]
    assert np.array_equal(decoded, np.rint(values/257))
    Image.fromarray(values.astype(np.float32)).save(tmp_path/"b.tiff")
    for name in ("a.png", "b.tiff"):
        with pytest.raises(HplError, match=f"{name} cannot be read .*from 0 to 65535, and the file does not say.*pixel_range="):
            decode_image(ImageSource(tmp_path/name))


def test_orientation_mark_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6 # turned by a quarter
    picture(0, (60, 40)).save(tmp_path/"a.jpg", exif=exif)
    assert decode_image(ImageSource(tmp_path/"a.jpg")).size == (40, 60)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_broken_pictures(tmp_path, content):
    make_folder(tmp_path)
    broken = content if content is not None else (tmp_path/"UTKFace"/"4.jpg").read_bytes()[:300]
    (tmp_path/"UTKFace"/"4.jpg").write_bytes(broken)
    data = load(tmp_path)
    with pytest.raises(HplError, match=r"4\.jpg cannot be read.*skip_broken=True"): data.inputs[np.array([3, 4])]
    with pytest.warns(UserWarning, match="1 pictures cannot be read and are left out"): data = load(tmp_path, skip_broken=True)
    kept = np.concatenate([data.labelled, data.unlabelled])
    assert list(data.notes["skipped"]) == [4] and len(kept) == 19 and 4 not in kept and len(data.inputs) == 30


def test_pictures_of_several_sizes(tmp_path):
    make_folder(tmp_path)
    picture(0, (50, 20)).save(tmp_path/"UTKFace"/"1.jpg")
    files = ImageFiles([tmp_path/"UTKFace"/f"{row}.jpg" for row in range(3)])
    with pytest.raises(HplError, match="differ in size.*give size="): published_views(40).plain(files[np.arange(3)])
    with pytest.raises(HplError, match="cache_in_memory needs a size"): ImageFiles(files.sources, cache_in_memory=True)


# ---- memory and workers

def test_cache_decodes_once(tmp_path):
    cached, fresh = (load(make_folder(tmp_path), cache_in_memory=keep) for keep in (True, False))
    rows = np.array([2, 7, 2])
    first = [np.asarray(image) for image in cached.inputs[rows]]
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(first, fresh.inputs[rows]))
    assert int(cached.inputs.cache.known.sum()) == 2
    for path in (tmp_path/"UTKFace").iterdir(): path.unlink()
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(first, cached.inputs[rows]))
    copy = pickle.loads(pickle.dumps(cached.inputs))
    assert copy.cache.known.sum() == 0 and len(pickle.dumps(cached.inputs)) < 20_000


def test_workers_give_the_same_batches_and_share_the_cache(tmp_path):
    data = load(make_folder(tmp_path), cache_in_memory=True)
    streams = Streams(data, NEEDS, StreamSettings(4, 4, 4), steps=6, seed=3)
    loader = torch.utils.data.DataLoader(streams, batch_size=None, num_workers=2, multiprocessing_context="fork")
    worked = list(loader)
    known = int(data.inputs.cache.known.sum())
    here = [streams[step] for step in range(6)]
    assert known > 10
    for a, b in zip(worked, here):
        for stream in NEEDS: assert all(torch.equal(a[stream][key], b[stream][key]) for key in b[stream])


# ---- views

def test_weak_view_is_torchvisions_crop():
    "The same windows as padding and cropping by torchvision, for every corner."
    image = picture(1, (24, 24))
    for mode, fill in (("reflect", "reflect"), ("zeros", "constant")):
        padded = v2.functional.pad(image, [5, 5, 5, 5], padding_mode=fill)
        for left in range(-5, 6, 5):
            for top in range(-5, 6, 5):
                want = v2.functional.crop(padded, 5 + top, 5 + left, 24, 24)
                assert np.array_equal(np.asarray(shift_image(image, left, top, mode)), np.asarray(want)), (mode, left, top)


def test_weak_view_draws_all_windows_evenly(monkeypatch):
    seen = Counter()
    monkeypatch.setattr(images, "shift_image", lambda image, left, top, mode: seen.update([(left, top)]) or image)
    flipped, image = 0, picture(0)
    for seed in range(3000):
        torch.default_generator.manual_seed(seed)
        flipped += np.array_equal(np.asarray(images.FlipCrop(1)(image)), np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    assert len(seen) == 9 and max(seen.values()) < 1.25*min(seen.values()) and 1400 < flipped < 1600


def test_randaugment_mc_draws_as_released(monkeypatch):
    "Three of fourteen with replacement, severity 1, 2 or 3, each carried out with probability 1/2, both signs; then the square."
    seen, squares = Counter(), []
    names = list(images.RELEASED_OPERATIONS)
    def spy(name): return lambda image, v, sign: seen.update([("name", name), ("v", v), ("sign", sign), ("any", 0)]) or image
    monkeypatch.setattr(images, "RELEASED_OPERATIONS", {name: spy(name) for name in names})
    monkeypatch.setattr(images, "cutout", lambda image, side, x, y: squares.append((side, x, y)) or image)
    torch.default_generator.manual_seed(0)
    for _ in range(4000): RandAugmentMC()(picture())
    total = seen["any", 0]
    assert len(names) == 14 and abs(total/12000 - .5) < .02
    assert all(abs(seen["name", name]/total - 1/14) < .015 for name in names)
    assert {v: round(seen["v", v]/total, 1) for v in (1, 2, 3)} == {1: .3, 2: .3, 3: .3} and seen["v", 4] == 0
    assert abs(seen["sign", 1]/total - .5) < .02
    assert len(squares) == 4000 and {side for side, *_ in squares} == {16} and max(x for _, x, _ in squares) < 40


def test_randaugment_mc_severities():
    "Numbers of the release at severities 1, 2, 3: factors, degrees, bits, thresholds, shifts of a 200-pixel picture."
    grey = Image.new("RGB", (200, 200), (100, 100, 100))
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))
    stripe = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3)))
    run = images.RELEASED_OPERATIONS
    assert [np.asarray(run["brightness"](grey, v, 1))[0, 0, 0] for v in (1, 2, 3)] == [14, 23, 32]
    assert [len(np.unique(np.asarray(run["posterize"](ramp, v, 1)))) for v in (1, 2, 3)] == [16, 16, 32] # 4, 4, 5 bits
    assert [np.asarray(run["solarize"](ramp, v, 1)).max() for v in (1, 2, 3)] == [230, 204, 179]
    assert [np.asarray(run["translate_x"](stripe, v, 1))[0, 0, 0] for v in (1, 2, 3)] == [6, 12, 18]
    assert [np.asarray(run["translate_x"](stripe, v, -1))[0, 50, 0] for v in (1, 2, 3)] == [44, 38, 32]
    assert [int(np.asarray(run["shear_x"](stripe, v, 1))[100, 50, 0]) - 50 for v in (1, 2, 3)] == [3, 6, 9]
    assert all(np.array_equal(np.asarray(run["rotate"](stripe, v, -1)), np.asarray(stripe.rotate(-3*v))) for v in (1, 2, 3))
    assert np.array_equal(np.asarray(run["identity"](stripe, 3, 1)), np.asarray(stripe))


@pytest.mark.parametrize("make", [released_views, published_views])
def test_views_depend_on_picture_and_seed_alone(make):
    views, pictures, seeds = make(64), [picture(n, (64, 64)) for n in range(5)], np.arange(5)*7919
    state = torch.get_rng_state()
    for view in (views.weak, views.strong):
        batch = view(pictures, seeds)
        torch.rand(3)
        assert torch.equal(batch, view(pictures, seeds)) and not torch.equal(batch, view(pictures, seeds + 1))
        assert torch.equal(batch[[3, 1]], view([pictures[3], pictures[1]], seeds[[3, 1]]))
        assert batch.dtype == torch.float32 and batch.shape == (5, 3, 64, 64) and batch.isfinite().all()
    torch.set_rng_state(state)
    views.strong(pictures, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    want = torch.stack([v2.functional.normalize(v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True),
                                                images.IMAGENET_MEAN, images.IMAGENET_STD) for image in pictures])
    assert torch.allclose(views.plain(pictures), want, atol=1e-6)


def test_margins_scale_with_the_size():
    for size, padding, side in ((200, 8, 16), (64, 3, 5), (100, 4, 8)):
        crop, augment = released_views(size).strong.transforms
        assert (crop.padding, augment.cutout) == (padding, side)
    with pytest.raises(HplError, match="padding 8 is not less than half"): released_views(200).weak([picture(0, (16, 16))], np.array([1]))


def test_views_pickle():
    for view in (*released_views(64), *published_views(64)):
        again = pickle.loads(pickle.dumps(view))
        assert torch.equal(again([picture(0, (64, 64))], np.array([5])), view([picture(0, (64, 64))], np.array([5])))


def test_a_batch_of_views_is_quick(tmp_path):
    "Three weak and one strong view of 32 pictures each at 64 pixels, cached, on one thread: the quickest of eight steps."
    data = load(make_folder(tmp_path), size=64, cache_in_memory=True)
    rows, seeds = np.arange(32) % 30, np.arange(32)
    def step():
        start = time.perf_counter()
        for stream in ("labelled", "unlabelled", "outer"): data.weak(data.inputs[rows], seeds)
        data.strong(data.inputs[rows], seeds)
        return time.perf_counter() - start
    assert min(step() for _ in range(8)) < .1


def test_pixel_statistics(tmp_path):
    files = load(make_folder(tmp_path)).inputs
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in files[np.arange(30)]])/255
    mean, std = pixel_statistics(files)
    assert np.allclose(mean, pixels.mean(0)) and np.allclose(std, pixels.std(0))
    whole = torch.cat([released_views(32, mean, std).plain(files[np.arange(30)])])
    assert torch.allclose(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)


# ---- the same picture twice

def test_deduplicate(tmp_path):
    make_folder(tmp_path)
    order = utkface.released_order(np.arange(20))
    first, second, third = order[2], order[15], order[4] # labelled, unlabelled, labelled at half of 20 rows
    edit(tmp_path, second, FileName=f"{first}.jpg")
    edit(tmp_path, third, FileName="27.jpg")
    before = load(tmp_path)
    data = load(tmp_path, deduplicate=True)
    assert data.notes["duplicates"] == sorted([second, third])
    assert set(data.labelled) == set(before.labelled) - {third} and set(data.unlabelled) == set(before.unlabelled) - {second}
    assert np.array_equal(data.val, before.val) and np.array_equal(data.test, before.test)
    more = load(tmp_path, deduplicate=True, label_ratio=.8)
    assert set(data.labelled) <= set(more.labelled) and more.notes == data.notes


# ---- the real table and faces

@pytest.fixture(scope="module")
def faces(shared):
    root = shared/"data"/"utkface"
    if not (root/"utkface.csv").exists(): pytest.skip("UTKFace's table and faces are not beside the repository")
    return root


@pytest.mark.parametrize("ratio, count, mean", [(.05, 500, 35.63), (.1, 1000, 35.14), (.2, 2000, 35.13)])
def test_released_split(faces, ratio, count, mean):
    data = utkface.utkface(faces, ratio, size=64)
    assert [len(data.rows(split)) for split in ("labelled", "unlabelled", "val", "test")] == [count, 10518 - count, 2629, 3287]
    assert not set(data.labelled) & set(data.unlabelled)
    train = data.targets[np.concatenate([data.labelled, data.unlabelled])]
    assert round(train.mean(), 2) == 34.91 and round(train.std(), 2) == 10.77
    assert round(data.targets[data.labelled].mean(), 2) == mean == round(data.normalizer.mean[0], 2)
    np.random.seed(0)
    order = np.arange(10518)
    np.random.shuffle(order)
    table = pd.read_csv(faces/"utkface.csv")
    train_names = table.loc[table["SPLIT"] == "TRAIN", "FileName"].to_numpy()
    assert [data.sample_names[row] for row in data.labelled] == train_names[order[:count]].tolist()


def test_real_duplicates(faces):
    data = utkface.utkface(faces, .05, size=64, deduplicate=True)
    assert len(data.notes["duplicates"]) == 246
    hashes = images.content_hashes(data.inputs.sources)
    kept = np.concatenate([data.labelled, data.unlabelled])
    assert len(kept) == 10518 - 246 == len({hashes[row] for row in kept})
    assert not {hashes[row] for row in kept} & {hashes[row] for row in np.concatenate([data.val, data.test])}


def test_real_batch_trains(faces):
    from hpl_nb.models import small_cnn
    data = utkface.utkface(faces, .05, size=64, cache_in_memory=True, normalizer=utkface.RELEASED_NORMALIZER)
    batch = Streams(data, NEEDS, StreamSettings(), steps=3, seed=0)[1]
    assert batch["labelled"]["weak"].shape == (32, 3, 64, 64) and "y" not in batch["unlabelled"]
    torch.manual_seed(0)
    model = small_cnn(channels=3)
    loss = (model(batch["labelled"]["weak"]) - batch["labelled"]["y"]).square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_real_tar_members_match_the_table(faces):
    members = {name: source for tar in faces.glob("images-*.tar") for name, source in tar_index(tar).items()}
    assert len(members) == 16434 == len(set(members) & set(pd.read_csv(faces/"utkface.csv")["FileName"]))
    first = next(iter(members.values()))
    image = decode_image(first)
    assert image.size == (200, 200) and not Image.open(io.BytesIO(images.read_source(first))).getexif()
