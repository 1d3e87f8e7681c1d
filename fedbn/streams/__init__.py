"""Streams: the order in which a user's windows arrive. One stream type per file."""

from fedbn.streams.base import FOREIGN, Event, Stream, StreamSpec, stream, streams

__all__ = ["FOREIGN", "Event", "Stream", "StreamSpec", "stream", "streams"]
