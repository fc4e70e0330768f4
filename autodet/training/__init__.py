"""Training: the one loop, its settings, and the task of training one student."""

from autodet.training.loop import Diverged, Epoch, Trainer
from autodet.training.settings import TrainSettings
from autodet.training.task import Outcome, Task, Workbench, train_plain

__all__ = [
    "Diverged",
    "Epoch",
    "Outcome",
    "Task",
    "TrainSettings",
    "Trainer",
    "Workbench",
    "train_plain",
]
