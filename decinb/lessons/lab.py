"""The lab of a notebook: an input and a prompt that suit the model, and the measures that apply to its images."""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from PIL import Image

from decinb.images import SAMPLES, Source, load_image
from decinb.metrics import clipped_fraction, oversaturated
from decinb.models import draws_scenes, example, image_size
from decinb.scenes import caption, estimates, random_scene, render
from decinb.scenes.adherence import adherence, named_attributes
from decinb.scenes.estimates import Estimate
from decinb.scenes.judge import Judge
from decinb.scenes.tasks import draw_trials, house_kept, measure, reference, run_in_batches
from decinb.utils.environment import in_notebook

T = TypeVar("T")

UNKNOWN = Estimate(value=math.nan, low=math.nan, high=math.nan)
"""What is returned where nothing can be measured. ``plot_curves`` leaves it out."""

COUNT, STEPS = 32, 20
"""Images for each point of a curve, and the ``num_inference_steps`` that they are made with."""

THINGS = ("building", "trees", "mountains", "lake", "path", "fence")
"""The attributes of a scene that every style shows."""


class Lab:
    """A loaded pipeline with an input, a prompt that suits it, and the measures that hold for its images.

    The judge works only for models that draw scenes. For any other model, ``can_judge`` is False, and measures that
    need the judge return ``UNKNOWN``. The pipeline's own progress bar is turned off.

    Args:
        pipe: any pipeline.
        image: as in ``load_image``; None for the model's example.
        prompt: None for the model's example.
        can_judge: whether its images are scenes; None to decide by the name of the model.

    Attributes:
        image: the input, a square of the size that the model was trained on.
        prompt: the prompt.
        is_example: whether image and prompt are those of the model's example.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        image: Source | None = None,
        prompt: str | None = None,
        can_judge: bool | None = None,
    ):
        sample, example_prompt = example(pipe)
        self.pipe, self.size = pipe, image_size(pipe)
        self.image = self.load(sample if image is None else image)
        self.prompt = prompt or example_prompt
        self.is_example = image is None and prompt is None
        self.can_judge = draws_scenes(pipe) if can_judge is None else can_judge
        pipe.set_progress_bar_config(disable=True)
        print("prompt:", self.prompt)
        if self.can_judge and not (image is None or (isinstance(image, str) and image in SAMPLES)):
            print("This model knows only drawn landscapes: it will turn your image into one.")

    def load(self, image: Source) -> Image.Image:
        """Load an image in the size of the model."""
        return load_image(image, size=self.size)

    def choose(self, scenes: T, photos: T) -> T:
        """Return ``scenes`` for a model that draws scenes, ``photos`` for any other."""
        return scenes if self.can_judge else photos

    def adherence(self, images: Sequence[Image.Image], prompt: str | None = None) -> Estimate:
        """Return the mean fraction of what a prompt (by default the lab's own) names that images show."""
        prompt = prompt or self.prompt
        if not self._can_check(prompt):
            return UNKNOWN
        return estimates.mean_fraction(adherence(list(images), prompt))

    def shows(self, images: Sequence[Image.Image], words: str) -> Estimate:
        """Return the fraction of images that show everything some words name."""
        if not self._can_check(words):
            return UNKNOWN
        return estimates.fraction([fraction == 1 for fraction in adherence(list(images), words)])

    def distance(self, images: Sequence[Image.Image], prompt: str | None = None) -> Estimate:
        """Return the Fréchet distance of images to equally many new renders of scenes that fit a prompt.

        It depends on the number of images: compare only distances of equally many.
        """
        prompt = prompt or self.prompt
        if not self._can_check(prompt):
            return UNKNOWN
        rng = random.Random(f"distance {prompt}")
        named: dict[str, Any] = {name: value for name, value in named_attributes(prompt).items() if value != "plain"}
        renders = [render(replace(random_scene(rng), **named)) for _ in images]
        return estimates.frechet(Judge.load().features(list(images)), Judge.load().features(renders))

    def prompts(self, count: int = COUNT) -> list[str]:
        """Return prompts of different scenes that name all that is in them; the own one where there are no scenes."""
        rng = random.Random("lesson prompts")
        return [caption(random_scene(rng)) if self.can_judge else self.prompt for _ in range(count)]

    def quality(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Estimate]:
        """Return how good images of different prompts are, one image for each prompt.

        Returns:
            ``distance``, the Fréchet distance to renders of as many other scenes (compare only equally many images),
            and ``adherence``, the mean fraction of what its prompt names that an image shows.
        """
        if not self.can_judge:
            return {"distance": UNKNOWN, "adherence": UNKNOWN}
        rng, judge = random.Random("lesson renders"), Judge.load()
        renders = judge.features([render(random_scene(rng)) for _ in images])
        shown = [adherence(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        distance = estimates.frechet(judge.features(list(images)), renders)
        return {"distance": distance, "adherence": estimates.mean_fraction(shown)}

    def spread(self, images: Sequence[Image.Image]) -> Estimate:
        """Return the mean difference of any two images."""
        return estimates.spread(list(images))

    def mean(self, function: Callable[[Image.Image], float], images: Sequence[Image.Image]) -> Estimate:
        """Return the mean of a measure over images."""
        values = [function(image) for image in images]
        is_fraction = function in (clipped_fraction, oversaturated)
        return estimates.mean_fraction(values) if is_fraction else estimates.mean(values)

    def kept(self, images: Sequence[Image.Image], originals: Sequence[Image.Image]) -> Estimate:
        """Return which fraction of ``THINGS`` the judge reads alike in an image and in its original, on average.

        Args:
            images: at least one.
            originals: what each image was made from, in the same order.
        """
        if not self.can_judge:
            return UNKNOWN
        pairs = zip(*(Judge.load().classify(list(each)) for each in (images, originals)), strict=True)
        kept = [sum(seen[name] == was[name] for name in THINGS) / len(THINGS) for seen, was in pairs]
        return estimates.mean_fraction(kept)

    def style_chain(
        self, styles: Sequence[str], strength: float, count: int = COUNT, num_inference_steps: int = STEPS
    ) -> dict[str, list[Estimate]]:
        """Run a chain of styles on many paintings, all of them together in each link, and measure every link.

        Each prompt names all that its scene shows, in the style of the link.

        Args:
            styles: one for each link, such as "watercolour".
            strength: of every link, above 0, at most 1.
            count: paintings, at least 2 for ``chance``.

        Returns:
            A list with one estimate for each link, by measure: ``before`` and ``after``, the fraction of the images
            given to the link, and made by it, in which the judge reads the style of the link; ``things``, the fraction
            of things read as in the painting; ``layout``, how well the building stayed in its place; ``chance``, the
            same for buildings that have nothing to do with each other.
        """
        if not self.can_judge:
            return {name: [UNKNOWN] * len(styles) for name in ("before", "after", "things", "layout", "chance")}
        scenes = [trial.target for trial in draw_trials("strokes to painting", count)]
        paintings = images = [render(scene) for scene in scenes]
        rows = []
        for link, style in enumerate(styles):
            targets = [replace(scene, style=style) for scene in scenes]
            prompts = [caption(target) for target in targets]
            steps, given = num_inference_steps, images
            images = run_in_batches(self.pipe, given, prompts, strength, num_inference_steps=steps, seed=link * count)
            before, after = (
                estimates.fraction([seen["style"] == style for seen in Judge.load().classify(each)])
                for each in (given, images)
            )
            stayed, chance = (
                estimates.mean_fraction([house_kept(*pair) for pair in zip(images, each, strict=True)])
                for each in (targets, targets[1:] + targets[:1])
            )
            kept = {"things": self.kept(images, paintings), "layout": stayed, "chance": chance}
            rows.append({"before": before, "after": after, **kept})
        return {name: [row[name] for row in rows] for name in rows[0]}

    def trial(self, task: str, number: int = 0) -> tuple[Image.Image, str]:
        """Return the input and the prompt of one trial of a task; for a model without scenes, those of the lab."""
        if not self.can_judge:
            return self.image, self.prompt
        trial = draw_trials(task, number + 1)[number]
        return trial.image, trial.prompt

    def curves(
        self, task: str, strengths: Sequence[float], count: int = COUNT, num_inference_steps: int = STEPS
    ) -> dict[str, list[Estimate]]:
        """Run a task at several strengths, each on the same inputs.

        Args:
            task: one of ``decinb.scenes.tasks.TASKS``. A model without scenes runs the lab's own image and prompt with
                ``count`` seeds instead.
            strengths: above 0, at most 1.
            count: inputs; at least 20 for an interval of ``frechet``.

        Returns:
            A list with one estimate for each strength, by measure: ``changed``, the fraction of images with every
            attribute that the input lacked; ``adherence``; ``layout``, how well the building stayed in its place;
            ``detail``, beside that of a render; ``change``, the mean difference from the input; ``frechet``, the
            distance to renders.
        """
        if not self.can_judge:
            images, prompts = [self.image] * count, [self.prompt] * count
            rows = []
            for strength in strengths:
                made = run_in_batches(self.pipe, images, prompts, strength, num_inference_steps=num_inference_steps)
                unknown = dict.fromkeys(("changed", "adherence", "layout", "detail", "frechet"), UNKNOWN)
                rows.append({"change": estimates.change(made, images), **unknown})
        else:
            trials, renders = draw_trials(task, count), reference(task, count)
            rows = [measure(self.pipe, trials, strength, renders, num_inference_steps) for strength in strengths]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _can_check(self, words: str) -> bool:
        return self.can_judge and bool(named_attributes(words))


def what_you_saw(*lines: str) -> None:
    """Show lines as a list, without those with a value that is not known (nan)."""
    known = [f"- {line}" for line in lines if not re.search(r"\bnan\b", line)]
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown("\n".join(known)))
    else:
        print("\n".join(known))
