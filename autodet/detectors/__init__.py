"""Detectors: architectures, specs, and one file per family behind common steps."""

from autodet.detectors.arch import Arch
from autodet.detectors.build import adapt, build, detect, is_detector_file, load_detector, save_detector, steps_of
from autodet.detectors.foreign import detector_of_state_dict, load_any_detector
from autodet.detectors.spec import DetectorSpec, SpecError, standard_spec
from autodet.detectors.steps import Dense, Detector, Features, Inputs, Masked, Regions, Target, TwoStage

__all__ = [
    "Arch",
    "Dense",
    "Detector",
    "DetectorSpec",
    "Features",
    "Inputs",
    "Masked",
    "Regions",
    "SpecError",
    "Target",
    "TwoStage",
    "adapt",
    "build",
    "detect",
    "detector_of_state_dict",
    "is_detector_file",
    "load_any_detector",
    "load_detector",
    "save_detector",
    "standard_spec",
    "steps_of",
]
