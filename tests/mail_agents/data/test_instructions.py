"""What task names say is what LIBERO's own rule makes of its file names."""

import pytest

from mail_agents.data.instructions import instruction
from mail_wrappers.datasets import libero_names


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (
            "pick_up_the_milk_and_place_it_in_the_basket",
            "pick up the milk and place it in the basket",
        ),
        ("KITCHEN_SCENE10_close_the_top_drawer", "close the top drawer"),
        ("LIVING_ROOM_SCENE2_put_both_the_cans_in_the_basket", "put both the cans in the basket"),
        ("STUDY_SCENE1_pick_up_the_book", "pick up the book"),
        ("put it in the KITCHEN_SCENE1_box", "put it in the KITCHEN SCENE1 box"),
        ("reach-v3", "reach-v3"),
        ("turn_on_the_stove", "turn on the stove"),
        (
            "KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet",
            "close the top drawer of the cabinet",
        ),
        (
            "LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket",
            "put both the alphabet soup and the tomato sauce in the basket",
        ),
    ],
)
def test_instructions_are_what_names_say(task, text):
    assert instruction(task) == text


def upstream(name):
    """LIBERO finds the scene by position: seven letters for one digit, eight for SCENE10."""
    if name[0].isupper():
        start = name.find("SCENE") + (8 if "SCENE10" in name else 7)
        return " ".join(name[start:].split("_"))
    return " ".join(name.split("_"))


def test_all_libero_tasks_are_worded_as_upstream_does():
    tasks = [task for suite in libero_names.SUITES for task in libero_names.tasks_of(suite)]
    assert len(tasks) == 130
    assert [instruction(task) for task in tasks] == list(map(upstream, tasks))
