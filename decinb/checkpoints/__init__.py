"""The files of a model: locate and download them, check them, and load its components."""
