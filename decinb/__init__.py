"""Learn, run and measure image-to-image diffusion with DeciDiffusion's U-Net-NAS."""

import os

import lazy_loader

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")  # diffusers reads it once, when it is first imported

# A name is looked for where it is first used, so that `import decinb` costs next to nothing: torch, diffusers and
# matplotlib come when there is work for them.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chains": ["Chain", "Link", "run_chain"],
        "designs": ["grid", "one_at_a_time", "random_design", "zipped"],
        "errors": ["InputError", "ModelError"],
        "images": ["SAMPLES", "load_image", "read_record"],
        "loading": ["download", "load_pipeline"],
        "metrics": ["adherence", "change", "named_attributes", "oversaturated", "saturated"],
        "models": ["MODELS", "Model"],
        "pipeline": [
            "DeciDiffusionDepth2ImgPipeline",
            "DeciDiffusionImg2ImgPipeline",
            "DeciDiffusionPipeline",
            "DeciDiffusionPipeline_img2img",
            "example",
            "image_size",
        ],
        "planning": ["Plan", "plan"],
        "plotting": ["plot_grid", "plot_images", "show_gallery"],
        "sweep": ["Sweep", "SweepError", "load_sweep", "replay", "run_sweep"],
        "unet_nas": ["ModelMixin", "UNetNAS"],  # diffusers looks for ModelMixin here, when it loads a saved pipeline
    },
)
