"""A world that fails in a way of one's choice, for what must survive it."""

import os
import sys
import threading
import time

import gymnasium
import numpy as np

from mail_agents.errors import InvalidInputError

ENV_ID = "toybox.faults:toybox/Faulty-v0"
#: Initial states of a world that has some.
STATES = 3


class FaultyEnv(gymnasium.Env):
    """Looks like ``PointEnv``; the reward is the initial state it was told to start in, else -1.

    Args:
        fault: What goes wrong, or None.
        parallel: What it says of itself in ``metadata["parallel"]``, or None.
        init_states: The same for ``metadata["init_states"]``.
        render_mode: None.
    """

    def __init__(self, fault=None, parallel=None, init_states=0, render_mode=None):
        self.fault, self.render_mode = fault, render_mode
        self.metadata = {"render_modes": []}
        if parallel is not None:
            self.metadata["parallel"] = parallel
        if init_states:
            self.metadata["init_states"] = init_states
        self.observation_space = gymnasium.spaces.Box(-4.0, 4.0, (4,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._fail("make")
        if fault == "explained":
            raise InvalidInputError("no such camera")
        if fault == "modules":
            main = "yes" if hasattr(sys.modules["__main__"], "__file__") else "no"
            raise ArithmeticError(f"torch is loaded: {'torch' in sys.modules}, main: {main}")

    def _fail(self, where):
        if self.fault == where:
            raise ArithmeticError(f"a fault in {where}")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._fail("reset")
        self.state = (options or {}).get("init_state", -1)
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self._fail("step")
        if self.fault == "slow":
            time.sleep(0.05)
        elif self.fault == "exit":
            os._exit(3)
        elif self.fault == "killed":
            os.kill(os.getpid(), 9)
        elif self.fault == "crash":
            os.kill(os.getpid(), 11)
        info = {}
        observation = np.zeros(4, np.float32)
        if self.fault == "unsendable":
            observation = {"state": observation, "unsendable": threading.Lock()}
        return observation, float(self.state), False, False, info


gymnasium.register("toybox/Faulty-v0", entry_point=FaultyEnv, max_episode_steps=12)
