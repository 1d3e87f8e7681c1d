"""Integrations: scikit-learn, Lightning, export formats and pretrained weights."""
