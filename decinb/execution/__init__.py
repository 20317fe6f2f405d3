"""From cells to a plan, from a plan to images on disk, and from an image's file back to the same image."""
