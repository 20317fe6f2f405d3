"""Lay out and draw labelled grids."""
