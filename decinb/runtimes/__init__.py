"""Runtimes other than PyTorch for a pipeline's U-Net."""
