"""Learn, run and measure image-to-image diffusion with DeciDiffusion's U-Net-NAS."""

import logging
import os
import warnings

import lazy_loader

from decinb.utils.threads import limit_spinning

limit_spinning()  # before torch is loaded
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")  # diffusers reads it when it is imported

# When diffusers imports image processors, transformers logs that torchvision is missing, which nothing here needs, and
# in some versions that diffusers uses old names.
_noise = ("torchvision", "suffix for image processors")
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: not any(words in record.getMessage() for words in _noise)
)

# Each name is imported when it is first used, so that `import decinb` is cheap: it loads neither torch nor diffusers.
_lazy_getattr, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "designs": ["grid", "one_at_a_time", "random_design", "zipped"],
        "errors": ["InputError", "ModelError", "Stopped", "SweepError"],
        "execution.chains": ["Chain", "Link", "run_chain"],
        "execution.plan": ["Plan", "plan"],
        "execution.replay": ["replay"],
        "figures.curves": ["plot_bars", "plot_curves", "plot_maps", "show_figure"],
        "execution.runner": ["State"],
        "images": ["SAMPLES", "load_image", "read_record"],
        "interactive.playground": ["Playground", "playground"],
        "lessons.answers": ["check"],
        "lessons.lab": ["Lab", "what_you_saw"],
        "loading": ["download", "load_pipeline"],
        "metrics": ["clipped_fraction", "mean_abs_difference", "oversaturated"],
        "models": ["MODELS", "Model", "example", "image_size"],
        "pipeline": [
            "DeciDiffusionDepth2ImgPipeline",
            "DeciDiffusionImg2ImgPipeline",
            "DeciDiffusionPipeline",
            "DeciDiffusionPipeline_img2img",
        ],
        "plotting": ["plot_grid", "plot_images", "show_gallery"],
        "scenes.adherence": ["adherence", "named_attributes"],
        "sweep": ["Steps", "Sweep", "load_sweep", "run_sweep", "steps"],
        "utils.environment": ["check_driver"],
        "unet_nas": ["ModelMixin", "UNetNAS"],  # diffusers looks for ModelMixin here when it loads a saved pipeline
    },
)

_RENAMED = {"change": "mean_abs_difference", "saturated": "clipped_fraction"}


def __getattr__(name: str) -> object:
    # Import before the warning: torch changes the warning filters, and Python would then show the warning twice.
    value = _lazy_getattr(_RENAMED.get(name, name))
    if name in _RENAMED:
        warnings.warn(f"decinb.{name} is deprecated: use decinb.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return value
