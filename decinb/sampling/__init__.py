"""Denoise many images together, or one after the other, through one adapter a pipeline."""
