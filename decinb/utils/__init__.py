"""Small helpers, each file with one purpose."""
