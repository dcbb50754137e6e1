"""Measurements behind ``scripts/benchmark.py``: ours against named alternatives, taking turns.

One module per subject has ``run(arguments) -> Report``. Rules that hold for all of them: candidates
of a comparison are timed in turn within one run; alternatives are checked to compute the same as
ours before they are timed; what is not installed is listed with the command that installs it.
"""
