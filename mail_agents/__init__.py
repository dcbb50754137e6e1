"""Sequence-policy agents for offline reinforcement learning and imitation learning."""
