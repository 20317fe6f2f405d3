"""Find, verify and read the files of a model."""
