"""Progress bars and experiment trackers."""
