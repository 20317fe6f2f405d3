"""Drawn scenes: the data of the bundled models, and measurements against the ground truth."""
