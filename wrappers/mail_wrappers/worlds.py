"""Facts of simulated worlds that data and environments share, without importing a simulator."""

#: Steps after which an episode of LIBERO is truncated unless ``gymnasium.make(max_episode_steps=)``
#: says otherwise: the limit of LIBERO's own evaluation (``eval/default.yaml``), in every suite.
LIBERO_HORIZON = 600

#: The same for robosuite: what robomimic (Mandlekar et al. 2021) gives most of its tasks, at most.
ROBOSUITE_HORIZON = 500

#: Tasks of robosuite 1.4 (Zhu et al. 2020) for one arm.
ROBOSUITE_TASKS: tuple[str, ...] = (
    "Door",
    "Lift",
    "NutAssembly",
    "NutAssemblyRound",
    "NutAssemblySingle",
    "NutAssemblySquare",
    "PickPlace",
    "PickPlaceBread",
    "PickPlaceCan",
    "PickPlaceCereal",
    "PickPlaceMilk",
    "PickPlaceSingle",
    "Stack",
    "Wipe",
)

#: Velocities of robosuite's hand, and its further sensors of the robot, that robomimic's files of
#: low-dimensional observations hold besides positions.
ROBOSUITE_HAND_VELOCITIES: tuple[str, ...] = ("robot0_eef_vel_lin", "robot0_eef_vel_ang")
ROBOSUITE_FULL_STATE: tuple[str, ...] = (
    "robot0_gripper_qvel",
    "robot0_joint_pos_cos",
    "robot0_joint_pos_sin",
    "robot0_joint_vel",
)

#: Steps of robosuite per second, and its arm controller: ``controllers/config/osc_pose.json`` of
#: robosuite 1.4, as far as it says what an action does.
ROBOSUITE_CONTROL_HZ = 20
OSC_POSE = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "control_delta": True,
    "interpolation": None,
}
