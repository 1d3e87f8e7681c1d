"""Interfaces to scikit-learn, Lightning, export formats and pre-trained weights."""
