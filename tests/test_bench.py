"What an iteration costs, and how fast the whole loop is: every method trains, and the command prints and stores its tables."
import re

import numpy as np
import pandas as pd
import pytest
import torch

from hpl_nb.bench import Bench, benched, made_up_faces, make_bench, our_loop, release_loop
from hpl_nb.cli import hpl_bench
from hpl_nb.data.utkface import read_faces
from hpl_nb.methods.hpl import HPL
from hpl_nb.methods.known import METHODS, known_methods


def command(**settings):
    hpl_bench([word for name, value in settings.items() for word in (f"--{name}", *([] if value is True else [str(value)]))])


def test_bench_puts_the_paper_beside_ours(tmp_path, capsys):
    command(depth=0, size=16, batch=4, rounds=1, methods="UCVME", out=tmp_path/"bench.csv")
    table = pd.read_csv(tmp_path/"bench.csv").set_index("method")
    assert [*table.index] == ["PseudoLabel", "UCVME"] and table["paper"].tolist() == [1., 3.099]
    assert (table[["ms", "ratio", "MB"]] > 0).all(axis=None) and table.loc["PseudoLabel", "extra_MB"] == 0
    assert table.loc["UCVME", "ratio"] > 1.5 and "UCVME" in capsys.readouterr().out


def test_every_known_method_is_benched():
    "Each with its presets; FullySupervised steps as Supervised does."
    assert {type(each) for each in benched().values()} == {kind for kind in METHODS if kind.short != "fully_supervised"}
    assert {each.title for each in benched().values()} >= {each.title for each in known_methods().values()} - {"FullySupervised"}


@pytest.mark.parametrize("mode", benched())
def test_every_mode_of_the_bench_steps(mode):
    "And trains: the weights move."
    made = make_bench(mode, 0, 16, 4)
    before = [p.clone() for p in made.method.regressor.body.parameters()]
    assert all(made.step(number) > 0 for number in range(2))
    assert any((p != q).any() for p, q in zip(made.method.regressor.body.parameters(), before))


# ---- end to end

@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return made_up_faces(tmp_path_factory.mktemp("faces"), 60, 40)


SMALL = {"size": 24, "depth": 18, "batch": 4}


def test_made_up_faces_are_a_folder_of_utkface(faces):
    table, sources = read_faces(faces)
    assert len(table) == 60 and all(sources) and table["SPLIT"].value_counts().to_dict() == {"train": 48, "val": 6, "test": 6}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loop_like_the_releases(faces, workers):
    "Three passes an iteration and four more on each fifth; body and head move in all, the learner on the fifths only."
    loop = release_loop(Bench(**SMALL, workers=workers), faces, torch.device("cpu"))
    network, passes, moved = loop.train.args[0], [], []
    network.body.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(6):
        count, before = len(passes), [[p.clone() for p in part.parameters()] for part in (network.body, network.head, network.learner)]
        seconds, waited = loop.run(1)
        now = [[*part.parameters()] for part in (network.body, network.head, network.learner)]
        moved.append((len(passes) - count, *(any(not torch.equal(p, q) for p, q in zip(*pair)) for pair in zip(before, now))))
        assert 0 < waited < seconds
    assert moved == [(7, True, True, True), *[(3, True, True, False)]*4, (7, True, True, True)]


@pytest.mark.parametrize("changes", [{}, {"pixels": "disk"}, {"pixels": "memory"}, {"precision": "bf16"}])
@pytest.mark.parametrize("method", [HPL.paper(), HPL.release()], ids=["paper", "release"])
def test_our_loop_trains(faces, method, changes, tmp_path):
    "What hpl_train trains: the weights move, with whatever settings."
    loop = our_loop(Bench(**SMALL, workers=0, **changes), method, faces, str(tmp_path))
    body = loop.train.__self__.method.regressor.body
    before = [p.detach().clone() for p in body.parameters()]
    seconds, waited = loop.run(2)
    assert 0 < waited < seconds and any(not torch.equal(p, q) for p, q in zip(before, body.parameters()))


def test_end_to_end_table_and_command(tmp_path, capsys):
    command(depth=18, size=16, batch=3, rounds=1, workers=0, end_to_end=True, out=tmp_path/"speed.csv")
    table, printed = pd.read_csv(tmp_path/"speed.csv").set_index("loop"), capsys.readouterr().out
    assert [*table.index] == ["HPL paper", "HPL release", "HPL paper, one batch", "like the release's"]
    assert all(name in printed for name in table.index)
    assert table.loc["like the release's", "speedup"] == 1 and (table.drop(columns="loader_share") > 0).all(axis=None)
    assert table["loader_share"].between(0, 1).all() and table.loc["like the release's", "loader_share"] > 0
    assert np.allclose(table["images_per_second"]*table["ms"], 2*3*1000, rtol=.01)


@pytest.mark.parametrize("settings, says", [
    (dict(methods="Baseline"), "'Baseline'.*Supervised"), (dict(rounds=0), "rounds is 0"),
    (dict(end_to_end=True, root="nowhere"), "nowhere"), (dict(end_to_end=True, pixels="gpu"), "gpu")])
def test_what_is_wrong_is_said(settings, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as error: command(depth=18, size=16, batch=3, out=tmp_path/"out.csv", **settings)
    assert re.search(says, f"{error.value} {capsys.readouterr().err}", re.S) and not list(tmp_path.iterdir())


# ---- profile

def test_profile_of_a_step(tmp_path, capsys, monkeypatch):
    "Tensor maths and what is outside make the whole; the operators that are named are part of the former."
    monkeypatch.setattr("hpl_nb.bench.alone", lambda threads, function, *arguments: function(*arguments))
    command(profile=True, batch=4, rounds=1, methods="MeanTeacher", out=tmp_path/"profile.csv")
    table, printed = pd.read_csv(tmp_path/"profile.csv"), capsys.readouterr().out
    assert [*table["method"].unique()] == ["PseudoLabel", "MeanTeacher"] and "a step" in printed
    for _, rows in table.set_index("part").groupby("method"):
        operators = rows[rows.index.str.startswith("aten::")]
        assert rows.loc[["tensor maths", "outside"], "share"].sum() == pytest.approx(1, abs=.01) and len(operators)
        assert operators["us"].sum() < rows.loc["tensor maths", "us"] and rows.loc["tensor maths", "share"] < 1
        assert operators["calls"].sum() < rows.loc["tensor maths", "calls"]
