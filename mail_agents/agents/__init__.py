"""The agents that are this project's reason to exist; made by name through the registry."""
