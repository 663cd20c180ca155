"One run is one value: what is wrong is refused where it is typed, and an experiment survives JSON."
import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpl_nb.core import HplError
from hpl_nb.data.core import DataSettings
from hpl_nb.data.rotated_digits import RotatedDigits
from hpl_nb.data.stsb import STSB
from hpl_nb.data.utkface import UTKFace
from hpl_nb.experiment import DATASETS, MODELS, Experiment, read_experiment, run_path, text_schedule, with_values
from hpl_nb.methods.core import MethodSettings, PseudoLabel, Supervised
from hpl_nb.methods.hpl import HPL, JointUncertainty
from hpl_nb.methods.known import METHODS, known_methods, method_named
from hpl_nb.methods.mean_teacher import MeanTeacher
from hpl_nb.methods.pim import PIM
from hpl_nb.models import MLP, BiLSTM, ResNet, SmallCNN
from hpl_nb.settings import Settings, as_json, change, differences, digest, setting_names
from hpl_nb.training.state import Train

EVERY = [Experiment(known.data, method) for known in DATASETS for method in known_methods().values()]


@pytest.mark.parametrize("experiment", EVERY, ids=lambda each: f"{each.data.short}-{each.method.title}")
def test_json_both_ways(experiment):
    again = read_experiment(json.loads(json.dumps(as_json(experiment))))
    assert again == experiment and hash(again) == hash(experiment) and run_path(again) == run_path(experiment)
    assert again.method.label == experiment.method.label


def test_paths_are_different():
    "Every method on every dataset has a folder of its own, and so has every change of a setting."
    assert len({run_path(each) for each in EVERY}) == len(EVERY)
    base = Experiment(UTKFace("a"), HPL.paper())
    others = [replace(base, method=HPL.paper(outer_every=5)), replace(base, train=change(base.train, lr_head=.1)), replace(base, seed=1),
              replace(base, data=UTKFace("a", label_ratio=.1)), replace(base, model=ResNet(18, dropout=.05))]
    assert len({run_path(each) for each in (base, *others)}) == 6
    same = [replace(base, data=UTKFace("b", cache="c")), replace(base, method=HPL.paper(label="mine"))]
    assert all(digest(each) == digest(base) and each == base for each in same)


@pytest.mark.parametrize("make, says", [
    (lambda: UTKFace(roots="a"), "did you mean 'root'"), (lambda: HPL.paper(outer_evry=5), "did you mean 'outer_every'"),
    (lambda: MeanTeacher(decays=.9), "did you mean 'decay'"), (lambda: Train(epoch=3), "did you mean 'epochs'"),
    (lambda: ResNet(deep=18), "ResNet has no setting 'deep'"), (lambda: ResNet(51), "depth is 51; choose 18 or 34"),
    (lambda: Train(epochs="many"), "epochs is 'many'; give a whole number"), (lambda: Train(epochs=0), "epochs is 0"),
    (lambda: Train(epochs=True), "epochs is True"), (lambda: HPL.paper(outer="later"), "'fresh' or 'previous'"),
    (lambda: HPL.paper(outer_every=2.5), "outer_every is 2.5; give a whole number"), (lambda: SmallCNN(dropout=1.5), "below 1"),
    (lambda: UTKFace(label_ratio=5), "give a share between 0 and 1"), (lambda: PIM(passes=2.5), "passes is 2.5; give a whole number"),
    (lambda: MeanTeacher(decay="high"), "decay is 'high'; give a number"),
    (lambda: UTKFace(pixels="gpu"), "'memory' or 'disk' or 'device'"),
    (lambda: HPL.paper(outer="previous", outer_batch=64), "outer_batch is the size of a fresh outer batch"),
    (lambda: Experiment(RotatedDigits(), PIM(), SmallCNN(dropout=0.)), "dropout is 0"),
    (lambda: Experiment(RotatedDigits(), seed="0"), "seed is '0'"), (lambda: Experiment("utkface"), "data is 'utkface'; give DataSettings"),
    (lambda: method_named("mean_teecher"), "did you mean 'mean_teacher'")])
def test_what_is_wrong_is_refused_where_it_is_made(make, says):
    with pytest.raises(HplError, match=says): make()


@given(st.sampled_from([*METHODS, *MODELS, Train]), st.data())
def test_any_wrong_type_is_refused(kind, data):
    "No field of any settings takes a value of another kind."
    name = data.draw(st.sampled_from([field.name for field in fields(kind)]))
    with pytest.raises(HplError, match=f"{name} is"): kind(**{name: object()})


def test_constants_of_the_release():
    "Lambda follows the dataset, twice as large where the weight is exp(-z)/2; what is given stays."
    def weight(data, method): return Experiment(data, method).method.unlabelled_weight
    methods = HPL.paper(), HPL.release(), HPL.paper(half_weight=True), HPL.release(half_weight=False), PseudoLabel(), JointUncertainty()
    assert [weight(UTKFace(), method) for method in methods] == [5, 10, 10, 5, 5, 5]
    assert [weight(STSB(), method) for method in methods] == [.5, 1, 1, .5, .5, .5]
    assert weight(UTKFace(), HPL.paper(unlabelled_weight=3)) == 3 and weight(UTKFace(), PseudoLabel(unlabelled_weight=0)) == 0
    look_ahead, learner = Experiment(STSB(), HPL.release()).method.look_ahead, Experiment(STSB(), HPL.release()).method.learner
    assert (look_ahead.outer_regularizer, learner.learner_weight_decay) == (1., 1e-5)
    assert Experiment(UTKFace(), HPL.release(outer_regularizer=0)).method.look_ahead.outer_regularizer == 0


def test_what_is_left_out_is_the_datasets_own():
    assert Experiment(STSB()).model == BiLSTM(dropout=.2) and Experiment(STSB()).train.epochs == 200
    assert Experiment(RotatedDigits(), PIM()).model.dropout == .05 and Experiment(RotatedDigits()).model.dropout == 0
    text = text_schedule(Experiment(UTKFace()).train)
    assert (text.optimizer.decay_every, text.optimizer.weight_decay_body, text.streams.labelled_copies) == (None, 0, 1)


def test_titles():
    titles = {each.title for each in known_methods().values()}
    assert {"HPL (paper)", "HPL (release)", "RankUp", "RankUp (arc)", "Supervised", "UPSReg"} <= titles and len(titles) == 18
    assert HPL.paper(outer="previous").title == "HPL (paper, outer=previous)"
    assert change(HPL.paper(), outer="previous").title == "HPL (paper)"


def test_with_values_is_the_inverse_of_differences():
    base = Experiment(RotatedDigits(), HPL.paper())
    other = replace(change(base, outer_every=5, lr_body=.01), seed=7)
    changes = {name: value for name, (_, value) in differences(base, other).items()}
    assert changes == {"method.look_ahead.outer_every": 5, "train.optimizer.lr_body": .01, "seed": 7}
    assert with_values(base, changes) == other


def test_setting_names_are_unique():
    "`change` and the command line call a setting by its own name, so that no two parts may share one."
    for each in EVERY:
        parts = each.data, each.model, each.train, each.method
        for names in [setting_names(part) for part in parts] + [sum((setting_names(part) for part in parts[:3]), ["seed"])]:
            assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


def test_a_name_of_two_parts_is_refused():
    "Which part was meant cannot be known; each part still takes it."
    experiment = Experiment(RotatedDigits(), HPL.paper())
    for name, value in {"outer_overlap": True, "outer_batch": 37}.items():
        with pytest.raises(HplError, match=f"{name} is a setting of method and of train"): change(experiment, **{name: value})
        for part in (experiment.method, experiment.train): assert change(part, **{name: value}) != part
    assert change(HPL.paper(), evaluate="teacher", teacher_decay=.9).teacher.evaluate == "teacher" # together, in any order


def test_json_of_strangers():
    content = as_json(Experiment(RotatedDigits()))
    with pytest.raises(HplError, match="kind is 'os.system'"): read_experiment(content | {"data": {"kind": "os.system"}})
    with pytest.raises(HplError, match="no setting 'extra'"): read_experiment(content | {"extra": 1})
    with pytest.raises(HplError, match="seed is 'x'"): read_experiment(content | {"seed": "x"})


def test_own_classes():
    "A dataset and a method that the package does not know, with a network of its own choice."
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Mine(DataSettings): short = "mine"

    @dataclass(frozen=True)
    class Own(MethodSettings): short = "own"

    with pytest.raises(HplError, match="Mine is not among the known datasets"): Experiment(Mine(), Own())
    experiment = Experiment(Mine(), Own(), MLP())
    assert experiment.train == Train() and read_experiment(as_json(experiment), Mine, Own) == experiment
    assert run_path(experiment).as_posix().startswith("runs/mine/0.05/own-") and isinstance(experiment, Settings)
    assert Supervised() != Own()
