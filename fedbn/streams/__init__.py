"""Streams: in which order a user's windows arrive. One kind of stream per file."""

from fedbn.streams.base import FOREIGN, Event, Stream, StreamSpec, stream, streams

__all__ = ["FOREIGN", "Event", "Stream", "StreamSpec", "stream", "streams"]
