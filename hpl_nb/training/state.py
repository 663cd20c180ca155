from __future__ import annotations
from dataclasses import dataclass, field, asdict
from typing import Literal
from hpl_nb.core import *
from hpl_nb.settings import Settings
from hpl_nb.data.core import StreamSettings
from hpl_nb.trainer import Clock, Trainable, epoch_length
@dataclass(frozen=True)
class OptimizerSettings(Settings):
    "Adam for body and head, and a step schedule for all of a method's optimisers."
    lr_body:float=1e-4 # B.3
    lr_head:float=1e-3 # B.3
    weight_decay_body:float=0. # release: 1e-3 (UTKFace), 1e-5 (IMDB-WIKI, STS-B)
    weight_decay_head:float=0. # release: 1e-3, 0, 1e-5
    decay_every:int|None=None # epochs after which all learning rates are multiplied by `decay`; release: 10 on images
    decay:float=.1 # that factor

    def check(self):
        for name in ("lr_body", "lr_head", "weight_decay_body", "weight_decay_head", "decay"):
            not_negative(name, getattr(self, name))
        if self.decay_every is not None: whole_number("decay_every", self.decay_every)

# %% ../nbs/50_trainer.ipynb #75bf5923
@dataclass(frozen=True)
class Train(Settings):
    "How long, how fast, and what is kept."
    epochs:int=30 # B.3
    epoch_of:Literal["unlabelled", "labelled"]="unlabelled" # an epoch is one pass over these rows (D13)
    iterations_per_epoch:int|None=None # overrides `epoch_of`
    streams:StreamSettings=field(default_factory=StreamSettings) # batch sizes and order
    optimizer:OptimizerSettings=field(default_factory=OptimizerSettings) # rates and decay
    precision:Literal["no", "bf16", "fp16"]="no" # of the body; head, losses and hypergradient are always float32
    accumulate:int=1 # micro-batches per step: each step's batches are cut into so many
    patience:int|None=None # stop after so many epochs without a better validation MSE
    record_every:int=0 # keep the predictions of each so-manieth epoch; 0: of the selected and the last epoch only

    def check(self):
        for name in ("epochs", "accumulate", "iterations_per_epoch", "patience"):
            if (value := getattr(self, name)) is not None: whole_number(name, value)
        if self.record_every < 0: raise HplError(f"record_every is {self.record_every}; give 0 (never) or a number of epochs.")
        for name, allowed in (("precision", ("no", "bf16", "fp16")), ("epoch_of", ("unlabelled", "labelled"))):
            if (value := getattr(self, name)) not in allowed:
                raise HplError(f"{name} is {value!r}; choose {', '.join(map(repr, allowed))}.")

