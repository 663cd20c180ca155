"Decoded pictures in a file, and views on a device: distributed as Pillow's, operation by operation; damage, disks that are full, resuming."
import pickle
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from small_runs import METHODS, differences, on_cpu  # noqa: F401
from test_utkface import NEEDS, load, make_folder, picture
from torchvision.transforms import v2

from hpl_nb import cli
from hpl_nb.core import HplError, seed_everything
from hpl_nb.data import pixels
from hpl_nb.data.core import PerSample, Streams, StreamSettings
from hpl_nb.data.images import RELEASED_OPERATIONS, FlipCrop, ImageFiles, ImageView, RandAugmentMC, image_views, published_views
from hpl_nb.data.pixels import DeviceView, Pixels, disk_cache, on_device, on_disk, published_step, released_step
from hpl_nb.data.utkface import UTKFace
from hpl_nb.experiment import Experiment, run_path
from hpl_nb.models import small_cnn
from hpl_nb.predictor import reader_for
from hpl_nb.training.loop import fit, open_training
from hpl_nb.training.run import load_run
from hpl_nb.training.state import Train


def drawn(seed, width, height, smooth):
    "Noise, or low-pass noise, of which some pictures have a narrow range of values."
    random = np.random.default_rng(seed)
    low, high = np.sort(random.choice(256, 2, replace=False))
    shape = (4, 4, 3) if smooth else (height, width, 3)
    image = Image.fromarray(random.integers(low, high + 1, shape, dtype=np.uint8))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def stack(images): return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


GREY_LEVELS = {"mean": .6, "std": .3, "pixel": .7} # how far apart a batch's mean, its standard deviation and (on average) a pixel may be


def assert_close(ours, pillow, allowed=GREY_LEVELS):
    "Statistics of pixels from 0 to 255 agree within so many grey levels."
    ours, pillow = ours.double(), pillow.double()
    found = {"mean": abs(ours.mean() - pillow.mean()), "std": abs(ours.std() - pillow.std()), "pixel": (ours - pillow).abs().mean()}
    assert all(found[name] <= allowed[name] for name in allowed), found


def apply(step, images): return pixels.carry_out(stack(images), [[step]]*len(images))


# ---- operations

@pytest.mark.parametrize("name", RELEASED_OPERATIONS)
@settings(max_examples=8, deadline=None)
@given(seed=some.integers(0, 10**6), width=some.integers(20, 60), height=some.integers(20, 60))
def test_released_operations_are_pillows_in_distribution(name, seed, width, height):
    "At every severity and sign, over 40 pictures that need not be square; and within the 20 settings together."
    images, both = [drawn(seed + i, width, height, i % 2) for i in range(40)], ([], [])
    for v, sign in [(v, sign) for v in range(1, 11) for sign in (1, -1)]:
        pillow = stack([RELEASED_OPERATIONS[name](image, v, sign) for image in images])
        made = apply(released_step(name, v, sign, width, height), images), pillow
        assert_close(*made, {"mean": 1.2, "std": 1., "pixel": 2.}) # of one setting: a nearest pixel may be the other one
        for list_of, each in zip(both, made): list_of.append(each)
    assert_close(*map(torch.cat, both))


@pytest.mark.parametrize("name", v2.RandAugment._AUGMENTATION_SPACE)
def test_published_operations_are_torchvisions_in_distribution(name):
    "At every magnitude and sign, against torchvision's own on Pillow's pictures."
    images, transform, both = [drawn(seed, 48, 40, seed % 2) for seed in range(40)], v2.RandAugment(), ([], [])
    def theirs(image, value): return transform._apply_image_or_video_transform(image, name, value, transform.interpolation, transform._fill)
    for magnitude in range(0, 31, 3):
        level, signed = pixels.randaugment_levels(magnitude, 31, 48, 40)[name]
        for value in (level, -level)[:1 + signed]:
            made = apply(published_step(name, value, 48, 40), images), stack([theirs(image, value) for image in images])
            assert_close(*made, {"mean": 1.2, "std": 1., "pixel": 2.})
            for list_of, each in zip(both, made): list_of.append(each)
    assert_close(*map(torch.cat, both))


def test_each_severity_does_something_else():
    "So that equal statistics are not those of doing nothing."
    images = [drawn(seed, 40, 40, True) for seed in range(20)]
    for name in {*RELEASED_OPERATIONS} - {"identity"}:
        made = [apply(released_step(name, v, 1, 40, 40), images) for v in (1, 9)]
        assert not torch.equal(made[0], stack(images)) and torch.equal(*made) == (name in ("autocontrast", "equalize"))


@pytest.mark.parametrize("padding_mode", ["reflect", "zeros"])
@settings(max_examples=15, deadline=None)
@given(seed=some.integers(0, 10**6), width=some.integers(8, 40), height=some.integers(8, 40), padding=some.integers(0, 3))
def test_crops_are_pillows(padding_mode, seed, width, height, padding):
    "To the bit: nothing is rounded."
    images, seeds = [drawn(seed + i, width, height, False) for i in range(24)], np.arange(24) + seed
    view = ImageView((FlipCrop(padding, padding_mode),))
    assert torch.equal(DeviceView(view.transforms, view.mean, view.std)(stack(images), seeds), view(images, seeds))


STRONG = {"released": RandAugmentMC(3, 4, 9), "no square, strongest": RandAugmentMC(5, 10, 0), "published": v2.RandAugment(),
          "strongest": v2.RandAugment(4, 30), "other bins": v2.RandAugment(3, 7, num_magnitude_bins=11)}


PLAIN = (0.,)*3, (1/255,)*3 # mean and std that leave grey levels as they are


@pytest.mark.parametrize("name", STRONG)
def test_strong_views_are_pillows_in_distribution(name):
    "Over 500 seeds, negative ones too, every operation among them: as a whole, and at each place of the picture."
    images, seeds = [drawn(seed, 36, 44, seed % 2) for seed in range(500)], np.arange(500) - 250
    view = image_views(FlipCrop(3), STRONG[name], *PLAIN).strong
    device = DeviceView(view.transforms, *PLAIN)
    ours, pillow = device(stack(images), seeds), view(images, seeds)
    assert_close(ours, pillow, GREY_LEVELS | {"pixel": 1.5}) # what one operation rounds, the next may enlarge
    assert_close(ours.mean(0), pillow.mean(0)), assert_close(ours.std(0), pillow.std(0))
    assert_close(device(stack(images), seeds + 1000), pillow, {"mean": 6., "std": 6.}) # other draws: within the draws' own spread
    plans = pixels.draw_plans(view.transforms, seeds, 500, 36, 44)
    assert {step.operation for plan in plans for step in plan} >= {*pixels.COLOURS, "zeros", "reflect"}
    histogram = [torch.histc(x[:, channel], 64) for x in (ours, stack(images).float()) for channel in range(3)]
    assert all((a - b).abs().sum() > .05*a.sum() for a, b in zip(histogram, histogram[3:])) # it does change the pictures


@pytest.mark.parametrize("name", STRONG)
def test_a_view_is_a_function_of_its_seed(name):
    "The same bits twice, alone, and in another batch in another order."
    samples, seeds = stack([drawn(seed, 36, 44, seed % 2) for seed in range(40)]), np.arange(40) - 20
    view = DeviceView(image_views(FlipCrop(3), STRONG[name]).strong.transforms, *PLAIN)
    made, order = view(samples, seeds), np.random.default_rng(0).permutation(40)[:25]
    assert torch.equal(view(samples, seeds), made) and torch.equal(view(samples[order], seeds[order]), made[order])
    for row in range(40): assert torch.equal(view(samples[row:row + 1], seeds[row:row + 1])[0], made[row])
    assert not torch.equal(view(samples, seeds + 1), made)


def test_without_seeds_views_draw_from_torch():
    images, view = [drawn(seed, 32, 32, True) for seed in range(6)], replace(published_views(32).strong, mean=PLAIN[0], std=PLAIN[1])
    made = []
    for each, samples in ((view, images), (DeviceView(view.transforms, *PLAIN), stack(images))):
        torch.manual_seed(3)
        made.append((each(samples), torch.rand(1)))
    assert_close(made[0][0], made[1][0], {"mean": 2., "std": 2., "pixel": 2.})
    assert made[0][1] == made[1][1]


def test_views_leave_samples_and_generators_alone():
    samples, view = stack([drawn(seed, 32, 32, True) for seed in range(6)]), DeviceView((FlipCrop(2), RandAugmentMC()), (.5,)*3, (.2,)*3)
    before, state = samples.clone(), torch.get_rng_state()
    view(samples, np.arange(6))
    assert torch.equal(samples, before) and torch.equal(torch.get_rng_state(), state)
    assert view(samples[:0], np.arange(0)).shape == (0, 3, 32, 32)


# ---- the file

def test_the_file_follows_the_pictures(tmp_path):
    "Another content, order, side or set of skipped rows is another file; a tar file or another place is not."
    data = load(make_folder(tmp_path/"a"))
    names = {pixels.cache_name(data.inputs), pixels.cache_name(load(make_folder(tmp_path/"b")).inputs)}
    assert len(names) == 1
    picture(1000).save(tmp_path/"b"/"UTKFace"/"7.jpg")
    sources = data.inputs.sources
    names |= {pixels.cache_name(files) for files in (load(tmp_path/"b").inputs, ImageFiles(sources[::-1], 32), ImageFiles(sources, 31))}
    names |= {pixels.cache_name(data.inputs, {3}), pixels.cache_name(ImageFiles(sources, 32, draft=True))}
    assert len(names) == 6


def test_a_draft_is_pillows(tmp_path):
    "A JPEG of at least twice the side is decoded at a half or less: in memory, on disk, by a predictor. Other pictures are as ever."
    make_folder(tmp_path)
    for row, side in enumerate((31, 40, 64, 130, 300)): picture(row, (side, side + 9)).save(tmp_path/"UTKFace"/f"{row}.jpg")
    sources, rows = load(tmp_path).inputs.sources, np.arange(5)
    drafts, usual = load(tmp_path, draft=True), load(tmp_path)
    assert drafts.notes["draft"] and "draft" not in usual.notes
    for row, image in zip(rows, drafts.inputs[rows]):
        with Image.open(sources[row].path) as file:
            file.draft("RGB", (32, 32))
            expected = np.asarray(file.resize((32, 32), Image.Resampling.BILINEAR))
        assert np.array_equal(image, expected)
        assert np.array_equal(image, usual.inputs[[row]][0]) == (row < 2)
    readers = on_disk(drafts, tmp_path/"cache").inputs, reader_for(drafts)([source.path for source in sources])
    for other in readers: assert all(np.array_equal(*pair) for pair in zip(other[rows], drafts.inputs[rows]))
    with pytest.raises(HplError, match="draft needs a size"): ImageFiles(sources, draft=True)


def test_a_draft_is_another_experiment_and_without_it_old_names_stay():
    "The folder of a run as versions before `draft` named it."
    assert run_path(Experiment(UTKFace())).as_posix() == "runs/utkface/0.05/hpl-paper-1c8df162/0"
    assert run_path(Experiment(UTKFace(draft=True))) != run_path(Experiment(UTKFace()))


@pytest.mark.parametrize("damage", ["cut", "longer type", "rubbish", "empty", "zeros", "another's"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    data = load(make_folder(tmp_path))
    path = disk_cache(data.inputs, tmp_path/"cache").path
    whole = path.read_bytes()
    if damage == "longer type": np.save(path, np.load(path).astype(np.uint16))
    else: path.write_bytes({"cut": whole[:-7], "rubbish": b"PK\3\4rubbish", "empty": b"", "zeros": whole[:128] + bytes(len(whole) - 128),
                            "another's": whole[:128] + whole[128:][::-1]}[damage])
    assert disk_cache(data.inputs, tmp_path/"cache").path.read_bytes() == whole


def test_a_broken_picture_is_named_or_left_black(tmp_path):
    (make_folder(tmp_path)/"UTKFace"/"4.jpg").write_bytes(b"broken")
    with pytest.raises(HplError, match="4.jpg cannot be read"): on_disk(load(tmp_path), tmp_path/"cache")
    assert not any((tmp_path/"cache").iterdir())
    with pytest.warns(UserWarning, match="4.jpg"): data = load(tmp_path, skip_broken=True)
    cache = on_disk(data, tmp_path/"cache").inputs.cache
    assert not cache.pixels[4].any() and cache.pixels[[row for row in range(30) if row != 4]].any((1, 2, 3)).all()


FULL = """
import resource, sys
from pathlib import Path
from hpl_nb.core import HplError
from hpl_nb.data.images import ImageFiles
from hpl_nb.data.pixels import disk_cache
files = ImageFiles(sorted(Path(sys.argv[1], "UTKFace").iterdir()), 32)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try: disk_cache(files, sys.argv[2])
except HplError as error: print(error)
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path, root):
    make_folder(tmp_path)
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path, tmp_path/"cache"], capture_output=True, text=True, cwd=root)
    assert "could not write" in done.stdout and "--cache" in done.stdout and not any((tmp_path/"cache").iterdir()), done


def test_a_folder_that_cannot_be_made_says_what_to_pass(tmp_path):
    (make_folder(tmp_path)/"file").write_text("")
    with pytest.raises(HplError, match="--cache on the command line"): disk_cache(load(tmp_path).inputs, tmp_path/"file")
    with pytest.raises(HplError, match="of one size"): disk_cache(ImageFiles([]), tmp_path)


def make_cache(root, folder, barrier, queue):
    files = load(root).inputs
    barrier.wait()
    queue.put(disk_cache(files, folder).pixels[:].tobytes())


def test_processes_that_start_at_once(tmp_path):
    "Each ends with the whole pictures, and one file stays."
    make_folder(tmp_path)
    context = get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [context.Process(target=make_cache, args=(tmp_path, tmp_path/"cache", barrier, queue)) for _ in range(4)]
    for process in processes: process.start()
    contents = {queue.get(timeout=60) for _ in processes}
    for process in processes: process.join()
    assert len(contents) == 1 and len([*(tmp_path/"cache").iterdir()]) == 1


def test_the_file_is_mapped_not_copied(tmp_path):
    "And sent to other processes as a path."
    data = on_disk(load(make_folder(tmp_path)), tmp_path/"cache")
    for inputs in (data.inputs, Pixels(data.inputs.cache)):
        copy = pickle.loads(pickle.dumps(inputs))
        assert len(pickle.dumps(inputs)) < 20_000 and isinstance(copy.cache.pixels, np.memmap) and not copy.cache.pixels.flags.writeable
        assert np.array_equal(np.asarray(copy[np.array([3])][0]), np.asarray(inputs[np.array([3])][0]))


# ---- data sets

def three(tmp_path, **changes):
    "The same data set in memory, on disk and on a device."
    data = replace(load(make_folder(tmp_path), cache_in_memory=True), **changes)
    return data, on_disk(data, tmp_path/"cache"), on_device(data, tmp_path/"cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches(tmp_path, workers):
    "From memory and from disk; on the device the same rows and weak views, and the same distribution of strong ones."
    streams = [Streams(data, NEEDS, StreamSettings(4, 4, 4), steps=3, seed=3) for data in three(tmp_path)]
    loaders = [torch.utils.data.DataLoader(each, batch_size=None, num_workers=workers) for each in streams]
    for memory, disk, device in zip(*loaders):
        assert not differences(memory, disk)
        strong = [batch["unlabelled"].pop("strong") for batch in (memory, device)]
        assert not differences(memory, device)
        assert (strong[0] - strong[1]).abs().mean() < .05 # of a standard deviation of ImageNet's pixels


@pytest.mark.parametrize("changes, says", [
    (dict(strong=PerSample(abs)), "the strong view uses PerSample"),
    (dict(weak=ImageView((v2.ColorJitter(),))), "the weak view uses ColorJitter"),
    (dict(strong=ImageView((FlipCrop(2), v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)))), "strong view uses RandAugment"),
    (dict(weak=ImageView((FlipCrop(16),))), "padding 16 is not less"), (dict(inputs=torch.zeros(30, 3)), "not pictures in files"),
    (dict(inputs=ImageFiles([str(i) for i in range(30)])), "give size=200")])
def test_what_cannot_be_done_is_named(tmp_path, changes, says):
    with pytest.raises(HplError, match=says): on_device(replace(load(make_folder(tmp_path)), **changes), tmp_path/"cache")
    assert not (tmp_path/"cache").exists()
    with pytest.raises(HplError, match="not list"): DeviceView((), (.5,)*3, (.2,)*3)([picture()])


SETTINGS = Train(epochs=2, iterations_per_epoch=4, streams=StreamSettings(3, 5))


def train(data, name="HPL paper", folder=None, **arguments):
    seed_everything(0)
    method = METHODS[name].build(regressor())
    run = fit(method, data, SETTINGS, folder=folder, progress=False, **arguments)
    return {"state": dict(method.state_dict()), "predictions": run.predictions, "metrics": {**run.metrics, "seconds": 0}}


def regressor():
    "A small network for pictures in colour."
    return small_cnn(3, width=4, dropout=.1)


@pytest.mark.parametrize("name", ["HPL paper", "HPL release", "TNNR"])
def test_training_does_not_depend_on_where_the_pixels_are(tmp_path, name):
    "The same bits from memory and disk; on the device, the same bits twice, and resumed in the middle of an epoch."
    memory, disk, device = three(tmp_path)
    assert not differences(train(memory, name), train(disk, name))
    whole = train(device, name)
    assert not differences(whole, train(device, name))
    train(device, name, tmp_path/"run", stop_after=3)
    assert not differences(whole, train(device, name, tmp_path/"run"))


def test_a_thread_that_prepares_batches_changes_nothing(tmp_path, monkeypatch):
    "As on a GPU: the same bits, also when stopped and resumed, and when the thread cannot make a batch."
    data = three(tmp_path)[2]
    whole = train(data)
    monkeypatch.setattr("hpl_nb.training.loop.is_on_gpu", lambda data: True)
    assert not differences(whole, train(data))
    train(data, folder=tmp_path/"run", stop_after=3)
    assert not differences(whole, train(data, folder=tmp_path/"run"))
    data.inputs.cache.pixels = data.inputs.cache.pixels[:0]
    with pytest.raises(IndexError): train(data)


def test_compiled_bodies_keep_names_and_resume(tmp_path):
    "Compiled in place, here without generating code: same states, same bits; a run can be continued either way."
    data = three(tmp_path)[2]
    def compiled(**arguments):
        seed_everything(0)
        method = METHODS["HPL paper"].build(regressor())
        method.regressor.body.compile(backend="eager")
        run = fit(method, data, SETTINGS, progress=False, **arguments)
        return {"state": dict(method.state_dict()), "predictions": run.predictions, "metrics": {**run.metrics, "seconds": 0}}
    whole = train(data)
    assert not differences(whole, compiled())
    compiled(folder=tmp_path/"run", stop_after=3)
    assert not differences(whole, train(data, folder=tmp_path/"run"))


# ---- commands

SMALL = ("hpl_paper", "utkface", "--size=32", "--depth=18", "--labelled_batch=3", "--unlabelled_batch=3", "--epochs=1",
         "--iterations_per_epoch=2", "--labelled_count=exact", "--label_ratio=.5")


def test_train_with_pixels_on_the_device(tmp_path, capsys):
    "A run may be continued with its decoded pictures elsewhere, but not with other views."
    root, out = make_folder(tmp_path/"faces"), f"--out={tmp_path/'run'}"
    cli.hpl_train([*SMALL, f"--root={root}", out, "--pixels=device", "--stop_after=1"])
    assert [path.suffix for path in (root/"cache").iterdir()] == [".npy"]
    with pytest.raises(SystemExit, match="pixels"): cli.hpl_train([*SMALL, f"--root={root}", out, "--pixels=disk"])
    cli.hpl_train([*SMALL, f"--root={root}", out, "--pixels=device", f"--cache={tmp_path/'other'}"])
    assert [path.suffix for path in (tmp_path/"other").iterdir()] == [".npy"] and (tmp_path/"run"/"metrics.json").exists()


@pytest.mark.parametrize("arguments, says", [
    (("--pixels=gpu",), "invalid choice 'gpu'"), (("--pixels=device", "--workers=2"), "use --workers 0"),
    (("hpl_paper", "rotated_digits", "--pixels=device"), "pixels")])
def test_wrong_pixels_are_refused(tmp_path, arguments, says, capsys):
    "Before anything is read or written."
    typed = arguments if "rotated_digits" in arguments else (*SMALL, f"--root={tmp_path}", *arguments)
    with pytest.raises(SystemExit) as refusal: cli.hpl_train([*typed, f"--out={tmp_path/'run'}"])
    said = " ".join(f"{refusal.value} {capsys.readouterr().err}".replace("│", " ").split()).lower()
    assert says in said and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train_compiled(tmp_path):
    "With code generated for the CPU: stopped, resumed, evaluated, and close to the run without."
    root, metrics = make_folder(tmp_path/"faces"), {}
    for name in (True, False):
        typed = [*SMALL, f"--root={root}", f"--out={tmp_path/str(name)}", "--pixels=device", *["--compile"]*name]
        for stop in (["--stop_after=1"], []): cli.hpl_train([*typed, *stop])
        metrics[name] = load_run(tmp_path/str(name)).metrics["test_mae"]
    assert metrics[True] == pytest.approx(metrics[False], rel=1e-3)


def test_inputs_on_a_gpu_are_not_pinned_and_have_no_workers(tmp_path, monkeypatch):
    "Seen from the trainer, without a GPU: the device that the inputs name decides."
    data = three(tmp_path)[2]
    seen = []
    monkeypatch.setattr("hpl_nb.training.loop.DataLoader", lambda *_, **settings: seen.append(settings["pin_memory"]) or ())
    training = open_training(METHODS["HPL paper"].build(regressor()), data, SETTINGS)
    for inputs, device in (("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
        data.inputs.device, training.accelerator = torch.device(inputs), type("", (), {"device": torch.device(device)})
        assert not [*training.batches(0)]
    assert seen == [True] # a loader is made only where there is something to pin
    with pytest.raises(HplError, match="use workers=0"): fit(METHODS["HPL paper"].build(regressor()), data, SETTINGS, workers=2)
