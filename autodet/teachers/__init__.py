"""Teachers: an elastic detector, its space of members, and how all of them are trained at once."""

from autodet.teachers.elastic import ElasticDetector
from autodet.teachers.schedule import Phase, Schedule, ScheduleError
from autodet.teachers.space import Member, PoolSpace, Range, SpaceError, StageSpace
from autodet.teachers.trainer import PoolSettings, PoolTrainer

__all__ = [
    "ElasticDetector",
    "Member",
    "Phase",
    "PoolSettings",
    "PoolSpace",
    "PoolTrainer",
    "Range",
    "Schedule",
    "ScheduleError",
    "SpaceError",
    "StageSpace",
]
