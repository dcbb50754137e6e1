"""Trajectories: episodes, stores, windows and their statistics."""
