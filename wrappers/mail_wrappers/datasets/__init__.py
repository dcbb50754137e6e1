"""Adapters between foreign dataset formats and :class:`~mail_agents.data.episode.Episode`."""
