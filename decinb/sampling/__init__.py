"""Turn jobs into images, through one adapter for each pipeline."""
