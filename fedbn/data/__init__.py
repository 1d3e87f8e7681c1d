"""Loading, partitioning, shifting and measuring data."""
