"""Means and variances as values: moments, robust estimates, recalibration, consensus between clients."""
