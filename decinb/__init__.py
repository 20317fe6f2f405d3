"""Learn, run and measure image-to-image diffusion with DeciDiffusion's U-Net-NAS."""

import os

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")  # diffusers reads it once, when it is first imported

from decinb.designs import grid, one_at_a_time, random_design, zipped
from decinb.errors import InputError, ModelError
from decinb.images import SAMPLES, load_image, read_record
from decinb.metrics import adherence, change, named_attributes, oversaturated, saturated
from decinb.pipeline import (
    MODELS,
    DeciDiffusionImg2ImgPipeline,
    DeciDiffusionPipeline_img2img,
    download,
    example,
    load_pipeline,
)
from decinb.planning import Plan, plan
from decinb.plotting import plot_grid, plot_images
from decinb.sweep import Sweep, SweepError, load_sweep, replay, run_sweep
from decinb.unet_nas import ModelMixin, UNetNAS  # noqa: F401  diffusers looks for ModelMixin here as well

__all__ = [
    "MODELS",
    "SAMPLES",
    "DeciDiffusionImg2ImgPipeline",
    "DeciDiffusionPipeline_img2img",
    "InputError",
    "ModelError",
    "Plan",
    "Sweep",
    "SweepError",
    "UNetNAS",
    "adherence",
    "change",
    "download",
    "example",
    "grid",
    "load_image",
    "load_pipeline",
    "load_sweep",
    "named_attributes",
    "one_at_a_time",
    "oversaturated",
    "plan",
    "plot_grid",
    "plot_images",
    "random_design",
    "read_record",
    "replay",
    "run_sweep",
    "saturated",
    "zipped",
]
