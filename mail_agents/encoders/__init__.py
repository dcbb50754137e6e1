"""Encoders: from one kind of observation to a feature vector per time step."""
