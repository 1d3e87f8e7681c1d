"""An app in the shape of Flower's quickstart."""
