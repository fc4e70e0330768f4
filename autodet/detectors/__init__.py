"""Detectors: architectures, specs, and one file per family behind common steps."""

from autodet.detectors.arch import Arch
from autodet.detectors.build import adapt, build, detect, load_detector, save_detector
from autodet.detectors.spec import DetectorSpec, SpecError
from autodet.detectors.steps import Dense, Detector, DetectorOutput, Features, Inputs, Regions, Target

__all__ = [
    "Arch",
    "Dense",
    "Detector",
    "DetectorOutput",
    "DetectorSpec",
    "Features",
    "Inputs",
    "Regions",
    "SpecError",
    "Target",
    "adapt",
    "build",
    "detect",
    "load_detector",
    "save_detector",
]
