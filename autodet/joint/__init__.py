"""Derived students: what a child would be and cost, and what becomes of it when it is trained with its teacher."""

from autodet.joint.bench import JointBench, JointTask
from autodet.joint.examine import Examiner

__all__ = ["Examiner", "JointBench", "JointTask"]
