"""Compare the images of sweeps and interrupt a sweep."""

import numpy as np
from PIL import Image

ONE_LEVEL = 1  # of 255: batches of other cells add in another order, so a rounded value may differ by one


def same(made: Image.Image, other: Image.Image) -> bool:
    """Return whether two images are the same but for rounding."""
    return np.abs(np.asarray(made, int) - np.asarray(other, int)).max() <= ONE_LEVEL


def levels(one, other) -> int:
    """Return the largest difference of two images, in levels of 255."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def as_ours(hook):
    """Let a hook pass for one of decinb's own: with a hook of the user's, a sweep would not be packed."""
    hook.__module__ = "decinb"
    return hook


class Stop:
    """Raise an error in place of a pipeline's U-Net after some calls."""

    __module__ = "decinb"  # see ``as_ours``

    def __init__(self, pipe, calls: int, error: BaseException):
        self.left, self.error = calls, error
        self.hook = pipe.unet.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()
