"""Gymnasium wrappers, and adapters from every dataset format to episodes."""

from mail_wrappers.record import RecordEpisodes

__all__ = ["RecordEpisodes"]
