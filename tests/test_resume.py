"A run that is killed with SIGKILL, anywhere, and started again by the same call ends with the same bits."
import io
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import METHODS, SETTINGS, differences, digits, forked, make

from hpl_nb.training.loop import fit

KILLS = [2, pytest.param(6, marks=pytest.mark.slow)] # of each method: 108 in the long test


class Trap:
    "Counts the moments at which a run may die, and dies at moment number `at`."
    def __init__(self, at): self.at, self.moments = at, 0

    def __call__(self):
        self.moments += 1
        if self.moments == self.at: os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function):
        "The function, with a moment before it and one after it."
        def call(*args, **kwargs):
            self()
            result = function(*args, **kwargs)
            self()
            return result
        return call

    def torn(self, save):
        "`torch.save`, with a moment when only half of the file is written."
        def call(content, file):
            whole = io.BytesIO()
            save(content, whole)
            half = len(whole.getbuffer())//2
            file.write(whole.getbuffer()[:half])
            file.flush()
            self()
            file.write(whole.getbuffer()[half:])
        return call


def train(name, folder, every, at, out, epochs=SETTINGS.epochs):
    "What a command does, in a process of its own, which may be killed."
    torch.set_num_threads(1)
    trap, method = Trap(at), make(name)
    method.training_step = trap.around(method.training_step)
    os.fsync, os.replace, os.unlink = map(trap.around, (os.fsync, os.replace, os.unlink))
    torch.save = trap.torn(torch.save)
    run = fit(method, digits(), replace(SETTINGS, epochs=epochs), folder=folder, progress=False, checkpoint_seconds=every)
    moments, last = trap.moments, torch.load(Path(folder)/"checkpoints"/"last.pt", weights_only=True)
    torch.save({"method": method.state_dict(), "last": without_seconds(last), "metrics": without_seconds(run.metrics), "moments": moments,
                "log": without_seconds(run.log.to_dict("list")), "predictions": run.predictions.to_dict("list")}, out.open("wb"))


def without_seconds(value):
    "A nested value without its times."
    if isinstance(value, dict): return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def start():
    "A function that starts `train` in a process of its own."
    with forked(__name__) as context:
        def start(*args):
            process = context.Process(target=train, args=args)
            process.start()
            return process
        yield start


def finished(start, folder, name, every, at=0, epochs=SETTINGS.epochs):
    "The exit code of a run that may die at moment `at`, and what it left when it did not."
    out = folder.with_suffix(".pt")
    process = start(name, str(folder), every, at, out, epochs)
    process.join()
    return process.exitcode, torch.load(out, weights_only=False) if process.exitcode == 0 else None


def files(folder): return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("name", METHODS)
def test_killed_at_a_random_moment(name, kills, start, tmp_path):
    """In a step, before and after a file or its folder is synced, or renamed, or with half a checkpoint written.

    Every other run writes its checkpoints at the end of an epoch only."""
    whole = {every: finished(start, tmp_path/f"whole {every}", name, every)[1] for every in (0., 1e9)}
    assert not differences(whole[0.] | {"moments": 0}, whole[1e9] | {"moments": 0}) # how often does not matter
    draw = random.Random(f"{name} {kills}")
    for kill in range(kills):
        every, folder = (0., 1e9)[kill % 2], tmp_path/str(kill)
        at = draw.randint(1, whole[every]["moments"])
        assert finished(start, folder, name, every, at)[0] == -signal.SIGKILL, (kill, at)
        code, resumed = finished(start, folder, name, every)
        assert code == 0 and not differences(whole[every] | {"moments": 0}, resumed | {"moments": 0}), (kill, at)
        assert files(folder) == files(tmp_path/f"whole {every}") # nothing half-written stays


def test_killed_from_outside_again_and_again(start, tmp_path):
    "The parent kills without knowing what the run is doing, until it has ended."
    whole = finished(start, tmp_path/"whole", "HPL previous", 0.)[1]
    draw, codes, folder = random.Random(0), [], tmp_path/"killed"
    while not codes or codes[-1]:
        process = start("HPL previous", str(folder), 0., 0, tmp_path/"killed.pt")
        if len(codes) < 10:
            process.join(draw.uniform(.02, .2))
            process.kill()
        process.join()
        codes.append(process.exitcode)
        assert codes[-1] in (0, -signal.SIGKILL)
    assert len(codes) > 1
    assert not differences(whole | {"moments": 0}, torch.load(tmp_path/"killed.pt", weights_only=False) | {"moments": 0})
