"""autodet: give it your object detector and your COCO-format data; it hands back a better and faster one.

The names here are those that a user's own script needs; each room of the package has more.
"""

from autodet.data import read_dataset, write_shapes
from autodet.detectors import Arch, DetectorSpec, adapt, build, detect, load_detector, save_detector
from autodet.distill import PUBLISHED, Formula
from autodet.teachers import Member, TeacherPool, best_member
from autodet.training import Task, TrainSettings, Workbench

__version__ = "0.1.0"

__all__ = [
    "PUBLISHED",
    "Arch",
    "DetectorSpec",
    "Formula",
    "Member",
    "Task",
    "TeacherPool",
    "TrainSettings",
    "Workbench",
    "adapt",
    "best_member",
    "build",
    "detect",
    "load_detector",
    "read_dataset",
    "save_detector",
    "write_shapes",
]
