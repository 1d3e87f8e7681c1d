"""The demo page of the service."""
