"""Pipeline parallelism: schedules as lists of instructions that can be printed, checked, simulated and run.

make_schedule -> lower (split_head, add_communication or add_rendezvous, add_reduce) -> check, simulate, a runtime
"""

from train.pipeline.checker import Report, check
from train.pipeline.costs import Costs, HeadCost, StageCost
from train.pipeline.generators import SCHEDULES, make_schedule
from train.pipeline.head import split_head
from train.pipeline.instructions import Instruction, PipelineSchedule
from train.pipeline.passes import add_communication, add_reduce, lower
from train.pipeline.rendezvous import add_rendezvous, batch_ends
from train.pipeline.simulator import simulate
from train.pipeline.timeline import Timeline

__all__ = [
    "SCHEDULES",
    "Costs",
    "HeadCost",
    "Instruction",
    "PipelineSchedule",
    "Report",
    "StageCost",
    "Timeline",
    "add_communication",
    "add_reduce",
    "add_rendezvous",
    "batch_ends",
    "check",
    "lower",
    "make_schedule",
    "simulate",
    "split_head",
]
