"""The subject ``ops``: kernels alone, forward and backward."""

import dataclasses

import torch

from mail_agents.benchmarks import alternatives, conv, scan, ssd
from mail_agents.benchmarks.arguments import Ops
from mail_agents.benchmarks.report import Report
from mail_agents.benchmarks.timing import describe


def run(arguments: Ops) -> Report:
    """Measures scans, convolutions and state space duality."""
    torch.set_num_threads(arguments.threads)
    conditions = f"{describe(arguments.device, arguments.threads)}, minimum of {arguments.rounds}"
    report = Report("ops", dataclasses.asdict(arguments), f"{conditions} rounds")
    report.absent += alternatives.absences(
        alternatives.mambapy(), alternatives.transformers(), alternatives.official()
    )
    scan.time_scans(arguments, report)
    conv.time_convolutions(arguments, report)
    ssd.time_duality(arguments, report)
    scan.measure_memory(arguments, report)
    scan.measure_accuracy(arguments, report)
    report.absent = list(dict.fromkeys(report.absent))
    return report
