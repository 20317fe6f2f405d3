"""The models that decinb knows by name: where each is published, what it needs and what it can do.

To add a model, add an entry to ``MODELS``; no other file names one. To use another copy of a known model, change its
``source`` here, or for one session: ``MODELS["sd-v1-5"] = replace(MODELS["sd-v1-5"], source="owner/name")``.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusers import DiffusionPipeline

from decinb.errors import InputError
from decinb.utils import validation

IMAGE_TO_IMAGE = "image-to-image"
TEXT_TO_IMAGE = "text-to-image"
TASKS = (IMAGE_TO_IMAGE, TEXT_TO_IMAGE)

ASTRONAUT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"
"""The prompt for the models that the guide compares with DeciDiffusion."""


@dataclass(frozen=True)
class Model:
    """A known model.

    Args:
        source: a folder as a ``Path``, or an id on the hub.
        about: a short description.
        image_size: height and width in pixels of the images that it was trained on.
        example_image, example_prompt: a sample and a prompt that suit it.
        revision: a branch, tag or commit of ``source`` on the hub; None is the main branch. A commit keeps a model
            as it was tried, whatever its publisher changes. Mirrors and extra sources are taken from their main branch.
        licence: as its publisher names it.
        pipelines: the name of the pipeline class for each task, in decinb or diffusers.
        depth: whether it takes the depth of the input image.
        negative_prompt: whether it takes a negative prompt.
        draws_scenes: whether it was trained on drawn scenes, so that the judge can tell what its images show.
        variant: the variant of the weights to load if it exists; ``"fp16"`` halves the download.
        memory: GB (10^9 bytes) of its weights as float16; float32 takes twice as much.
        mirrors: ids of copies on the hub, tried in this order if the source is gone.
        extra_sources: pairs of a prefix and a source for components that ``source`` lacks; the prefix begins their
            names in the pipeline.
        defaults: arguments of a call, such as ``guidance_scale``, whose defaults differ from those of its pipelines.
        allow_pickle: as in ``load_pipeline``, for a model that is known to need it.
    """

    source: Path | str
    about: str
    image_size: int
    example_image: str = "valley"
    example_prompt: str = ASTRONAUT
    revision: str | None = None
    licence: str = "unknown"
    pipelines: dict[str, str] = field(
        default_factory=lambda: {
            IMAGE_TO_IMAGE: "DeciDiffusionImg2ImgPipeline",
            TEXT_TO_IMAGE: "DeciDiffusionPipeline",
        }
    )
    depth: bool = False
    negative_prompt: bool = True
    draws_scenes: bool = False
    variant: str | None = None
    memory: float = 0.0
    mirrors: tuple[str, ...] = ()
    extra_sources: tuple[tuple[str, Path | str], ...] = ()
    defaults: dict[str, float] = field(default_factory=dict)
    allow_pickle: bool = False

    @property
    def is_bundled(self) -> bool:
        """Whether it is part of decinb."""
        return isinstance(self.source, Path) and self.source.is_relative_to(TINY)


TINY = Path(__file__).parent / "tiny"

_BUNDLED = Model(
    TINY / "model",
    "small U-Net-NAS for drawn scenes, bundled",
    128,
    "day",
    "a painting of a blue house, round trees and mountains on snow at night",
    licence="Apache-2.0",
    draws_scenes=True,
    memory=0.03,
)

MODELS: dict[str, Model] = {
    "tiny": _BUNDLED,
    "tiny-depth": replace(
        _BUNDLED,
        source=TINY / "depth",
        about="tiny, with a U-Net that also takes the depth of the input image, bundled",
        example_prompt="a painting of a yellow house, round trees and mountains on sand at sunset",
        pipelines={IMAGE_TO_IMAGE: "DeciDiffusionDepth2ImgPipeline"},
        depth=True,
        extra_sources=(("", TINY / "model"),),  # VAE, text encoder, tokenizer, scheduler
    ),
    "tiny-lcm": replace(
        _BUNDLED,
        source=TINY / "lcm",
        about="tiny, distilled into a student of four steps: as good as 20, with a tenth of the rows; bundled",
        extra_sources=(("", TINY / "model"),),  # VAE, text encoder, tokenizer
        defaults={"num_inference_steps": 4, "guidance_scale": 1.0},  # guidance is built in: one row a step
    ),
    "decidiffusion-v1-0": Model(
        "Deci/DeciDiffusion-v1-0",
        "the published checkpoint, 1.02 billion parameters",
        512,
        "valley",
        "A cute baby dragon with blue and green scales, artstation painting",  # from the guide
        revision="99d0c312e8e00e1bfb1aa89ad52b2a34f5829c2d",
        licence="CreativeML Open RAIL++-M",
        memory=2.0,
        allow_pickle=True,  # its U-Net and VAE are safetensors, other parts may be .bin only
    ),
    "decidiffusion-v2-0": Model(
        "Deci/DeciDiffusion-v2-0",
        "the publisher's second version, 732 million parameters; untested: nobody has run it with decinb yet",
        512,
        "valley",
        "A cute baby dragon with blue and green scales, artstation painting",
        licence="CreativeML Open RAIL++-M",
        memory=1.5,
        allow_pickle=True,
    ),
    "sd-v1-5": Model(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",  # runwayml deleted the original in August 2024
        "Stable Diffusion v1.5, 1.07 billion parameters",
        512,
        revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        licence="CreativeML Open RAIL-M",
        pipelines={IMAGE_TO_IMAGE: "StableDiffusionImg2ImgPipeline", TEXT_TO_IMAGE: "StableDiffusionPipeline"},
        variant="fp16",
        memory=2.7,
        mirrors=("sd-legacy/stable-diffusion-v1-5", "benjamin-paine/stable-diffusion-v1-5"),
    ),
    "sdxl-base": Model(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "Stable Diffusion XL, 3.5 billion parameters, two text encoders",
        1024,
        revision="462165984030d82259a11f4367a4eed129e94a7b",
        licence="CreativeML Open RAIL++-M",
        pipelines={IMAGE_TO_IMAGE: "StableDiffusionXLImg2ImgPipeline", TEXT_TO_IMAGE: "StableDiffusionXLPipeline"},
        variant="fp16",
        memory=6.9,
    ),
    "sdxl-refiner": Model(
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        "the second stage of Stable Diffusion XL, which adds detail to an image",
        1024,
        revision="5d4cfe854c9a9a87939ff3653551c2b3c99a4356",
        licence="CreativeML Open RAIL++-M",
        pipelines={IMAGE_TO_IMAGE: "StableDiffusionXLImg2ImgPipeline"},
        variant="fp16",
        memory=6.1,
    ),
    "kandinsky-2-2": Model(
        "kandinsky-community/kandinsky-2-2-decoder",
        "Kandinsky 2.2: a prior turns the prompt into an image embedding first",
        512,
        licence="Apache-2.0",
        pipelines={
            IMAGE_TO_IMAGE: "KandinskyV22Img2ImgCombinedPipeline",
            TEXT_TO_IMAGE: "KandinskyV22CombinedPipeline",
        },
        memory=9.8,
        extra_sources=(("prior_", "kandinsky-community/kandinsky-2-2-prior"),),
    ),
    "sd-2-depth": Model(
        "sd2-community/stable-diffusion-2-depth",  # stabilityai removed the original in November 2025
        "Stable Diffusion 2 that also takes the depth of the input image",
        512,
        licence="CreativeML Open RAIL++-M",
        pipelines={IMAGE_TO_IMAGE: "StableDiffusionDepth2ImgPipeline"},
        depth=True,
        variant="fp16",
        memory=2.8,
        mirrors=("radames/stable-diffusion-2-depth-img2img",),
    ),
}

PUBLISHED = "decidiffusion-v1-0"
"""The model that ``load_pipeline`` takes by default on a GPU."""


def line_of(source: str) -> str:
    """Return the file and line of a source, to be edited if the model has moved."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    found = next((i for i, line in enumerate(lines, 1) if f'"{source}"' in line), None)
    return f"decinb/models.py, line {found}" if found else "its entry in decinb.MODELS"


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Raise an ``InputError`` for anything that is not a diffusers pipeline."""
    if not isinstance(pipe, DiffusionPipeline):
        raise InputError(f"pipe must be a pipeline, as load_pipeline returns it, got {validation.short_repr(pipe)}")


class KnownName(str):
    """The name of a known model, as ``load_pipeline`` writes it into a pipeline's configuration.

    diffusers writes there whatever a pipeline was loaded from, such as a folder called "tiny", as an ordinary string.
    """


def known_model(pipe: DiffusionPipeline) -> Model | None:
    """Return the entry of the known model that ``load_pipeline`` loaded a pipeline from, or None.

    Pipelines made from it, by ``from_pipe`` or as a copy, count too. What was saved and loaded again does not.
    """
    name = pipe.config.get("_name_or_path")
    return MODELS.get(name) if isinstance(name, KnownName) else None


def image_size(pipe: DiffusionPipeline) -> int:
    """Return the height and width in pixels of the images that a pipeline's model was trained on.

    Of images that are not square, the larger of the two.

    Raises:
        InputError: ``pipe`` is not a pipeline.
    """
    return max(height_and_width(pipe))


def height_and_width(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Return the size in pixels of the images that a pipeline's model was trained on, and makes from text.

    Raises:
        InputError: ``pipe`` is not a pipeline.
    """
    check_pipeline(pipe)
    if known := known_model(pipe):
        return known.image_size, known.image_size
    networks = [getattr(pipe, name, None) for name in ("unet", "transformer")]
    # Compared with None, because a compiled network has no truth value.
    network = next((network for network in networks if network is not None), None)
    sample = None if network is None else getattr(network.config, "sample_size", None)
    if sample is None:
        sample = getattr(pipe, "default_sample_size", 64)
    sides = sample if isinstance(sample, (list, tuple)) else (sample,)
    scale = getattr(pipe, "vae_scale_factor", 8)
    return sides[0] * scale, sides[-1] * scale


def example(pipe: DiffusionPipeline) -> tuple[str, str]:
    """Return a sample's name and a prompt for a pipeline: of its model, or of the known model nearest in image size."""
    side = image_size(pipe)
    known = known_model(pipe) or min(MODELS.values(), key=lambda model: abs(model.image_size - side))
    return known.example_image, known.example_prompt


def draws_scenes(pipe: DiffusionPipeline) -> bool:
    """Return whether a pipeline's model is known to draw scenes, so that the judge can tell what its images show."""
    known = known_model(pipe)
    return known is not None and known.draws_scenes


def defaults_of(pipe: DiffusionPipeline) -> dict[str, float]:
    """Return the ``defaults`` of a pipeline's model, empty if it is not known."""
    known = known_model(pipe)
    return dict(known.defaults) if known is not None else {}
