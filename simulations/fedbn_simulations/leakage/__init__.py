"""Privacy attacks on messages and user states."""
