"""Widgets for a notebook: the playground, where a pipeline is tried by hand."""
