"""Studies, one per module: functions that train one arm with one seed, and ``CLAIMS``."""
