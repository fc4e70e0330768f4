"""Teachers: an elastic detector, its space of members, how all of them are trained at once, and the trained pool."""

from autodet.teachers.elastic import ElasticDetector
from autodet.teachers.pool import PoolError, TeacherPool, best_member
from autodet.teachers.schedule import Phase, Schedule, ScheduleError
from autodet.teachers.space import Member, PoolSpace, Range, SpaceError, StageSpace
from autodet.teachers.trainer import PoolSettings, PoolTrainer

__all__ = [
    "ElasticDetector",
    "Member",
    "Phase",
    "PoolError",
    "PoolSettings",
    "PoolSpace",
    "PoolTrainer",
    "Range",
    "Schedule",
    "ScheduleError",
    "SpaceError",
    "StageSpace",
    "TeacherPool",
    "best_member",
]
