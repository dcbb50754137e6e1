"""How LIBERO is evaluated by its authors, by MaIL and by OpenVLA: episodes, limits, settling.

Objects hang a little above the table in LIBERO's initial states, so every evaluation lets them
settle for some steps before the agent acts. The three in use differ in how long, in what the
gripper does meanwhile, and in how many steps and episodes follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from mail_agents.errors import unknown_name
from mail_wrappers.datasets.libero_names import SUITES

ProtocolName = Literal["mail", "libero", "openvla"]


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate LIBERO.

    Attributes:
        name: Key of :data:`PROTOCOLS`.
        source: Where its numbers come from.
        episodes: Episodes per task; episode ``i`` starts from stored initial state ``i``.
        settle_steps: Steps before the agent acts.
        settle_gripper: Gripper command in these steps: -1 opens, 0 leaves it half open.
        image_size: Height and width of observed images in pixels.
        orientation: Which way up observed images are.
        default_max_steps: Steps of the agent in an episode.
        suite_max_steps: Suites that have another limit.
    """

    name: str
    source: str
    episodes: int
    settle_steps: int
    settle_gripper: float
    image_size: int
    orientation: str
    default_max_steps: int = 600
    suite_max_steps: Mapping[str, int] = field(default_factory=dict)

    def max_steps(self, suite: str) -> int:
        """Steps after which an episode of a suite is truncated.

        Raises:
            UnknownNameError: There is no such suite.
        """
        if suite not in SUITES:
            raise unknown_name("LIBERO suite", suite, SUITES)
        return self.suite_max_steps.get(suite, self.default_max_steps)

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """Keyword arguments that make a LIBERO world follow this protocol."""
        return {
            "protocol": self.name,
            "orientation": self.orientation,
            "image_size": self.image_size,
            "initial": "stored",
        }


_OPENVLA_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}

#: Protocols by name.
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                "mail", "MaIL, simulation/benchmark_sim_new.py and config", 20, 5, -1.0, 128, "raw"
            ),
            Protocol(
                "libero", "LIBERO, lifelong/metric.py and eval/default.yaml", 20, 5, 0.0, 128, "raw"
            ),
            Protocol(
                "openvla",
                "OpenVLA, experiments/robot/libero/run_libero_eval.py",
                *(50, 10, -1.0, 256, "rot180"),
                suite_max_steps=MappingProxyType(_OPENVLA_STEPS),
            ),
        )
    }
)


def protocol_named(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in PROTOCOLS:
        raise unknown_name("LIBERO protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
