"""Run a sweep: from cells to a plan, from a plan to images on disk, and back again."""
