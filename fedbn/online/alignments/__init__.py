"""Alignments of the input of a network, one file per kind. New files are discovered automatically."""
