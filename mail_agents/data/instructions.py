"""What the names of tasks say, for people and for language models."""

import re

#: What LIBERO puts before the instruction in a task's name, e.g. "LIVING_ROOM_SCENE2_".
_SCENE = re.compile(r"^[A-Z]+(_[A-Z]+)*_SCENE\d+_")


def instruction(task: str) -> str:
    """Returns what a task's name says, as text for a language model.

    Follows LIBERO's own rule (``libero/libero/benchmark/__init__.py`` of
    Lifelong-Robot-Learning/LIBERO): a leading scene is left out, underscores are spaces. The
    ``:language`` entries of its BDDL files differ in wording; LIBERO's own training and evaluation
    use this form.

    Args:
        task: For example ``"KITCHEN_SCENE3_turn_on_the_stove"``.
    """
    return _SCENE.sub("", task).replace("_", " ")
