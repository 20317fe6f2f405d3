"""Compare the few-step student with its teacher: ``python -m decinb.tiny.evaluate_lcm``.

Images from prompts alone, and image to image at two strengths, at several numbers of steps, on the same prompts, inputs
and seeds. Every value has a 95% confidence interval.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from decinb.loading import load_pipeline
from decinb.models import MODELS
from decinb.scenes.tasks import GUIDANCE, draw_trials, measure, reference
from decinb.tiny import train_lcm
from decinb.tiny.evaluate import FULL, SAMPLERS, columns, evaluate_prompts, fill_card
from decinb.utils.environment import describe_pipeline

STUDENT_STEPS = (1, 2, 4, 8)
TEACHER_STEPS = (4, 20)
STRENGTHS = (0.5, 0.75)
TASKS = ("day to night", "strokes to painting")
STUDENT, TEACHER = "tiny-lcm", "tiny"
RESULTS = Path("results/tiny/few_steps.json")

ASKED = (4, 20)
"""Steps of the student, and those of the teacher with its own scheduler that it should equal."""


def evaluate(
    student: DiffusionPipeline, teacher: DiffusionPipeline, count: int = FULL, guidance: float = train_lcm.GUIDANCE
) -> dict[str, Any]:
    """Measure both models on fixed seeds.

    Args:
        student: a pipeline with guidance built in.
        teacher: the pipeline that it was distilled from.
        count: images for each point; at least 20 for intervals of Fréchet distances.
        guidance: the guidance scale that is built in; the teacher is measured with it too.

    Returns:
        The settings, the environment, ``from prompts``, by way and steps what ``evaluate_prompts`` returns, and
        ``image to image``, by task, strength and way what ``decinb.scenes.tasks.measure`` returns by steps. A way is
        such as ``"tiny, DDIM"``.
    """
    for pipe in (student, teacher):
        pipe.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {
        "settings": {"images": count, "guidance_scale": GUIDANCE, "built-in guidance_scale": guidance},
        "environment": describe_pipeline(teacher),
        "from prompts": {},
        "image to image": {task: {f"{strength:g}": {} for strength in STRENGTHS} for task in TASKS},
    }
    trials = {task: (draw_trials(task, count), reference(task, count)) for task in TASKS}

    def run(way: str, pipe: DiffusionPipeline, numbers: Sequence[int], scale: float, only_prompts: bool) -> None:
        started = time.monotonic()
        report["from prompts"][way] = {
            str(steps): evaluate_prompts(pipe, count, guidance_scale=scale, num_inference_steps=steps)
            for steps in numbers
        }
        for task, by_strength in {} if only_prompts else report["image to image"].items():
            for strength in STRENGTHS:
                enough = [steps for steps in numbers if int(steps * strength)]
                by_strength[f"{strength:g}"][way] = {
                    str(steps): measure(pipe, trials[task][0], strength, trials[task][1], steps) for steps in enough
                }
        print(f"{way}: {time.monotonic() - started:.0f} s", flush=True)

    run(STUDENT, student, STUDENT_STEPS, 1.0, False)
    own = teacher.scheduler
    try:
        for name, make in SAMPLERS.items():
            teacher.scheduler = make(own.config) or own
            run(f"{TEACHER}, {name}", teacher, TEACHER_STEPS, GUIDANCE, only_prompts=name != "DDIM")
    finally:
        teacher.scheduler = own
    if guidance != GUIDANCE:
        run(f"{TEACHER}, DDIM, guidance {guidance:g}", teacher, TEACHER_STEPS, guidance, True)
    return report


def compare(report: dict[str, Any]) -> dict[str, bool]:
    """Return by measure whether the student's few steps are no worse than the teacher's many.

    No worse means: as good as the teacher's value, or within its interval.
    """
    few, many = map(str, ASKED)
    student, teacher = report["from prompts"][STUDENT][few], report["from prompts"][f"{TEACHER}, DDIM"][many]
    return {
        "frechet": student["frechet"]["value"] <= teacher["frechet"]["high"],
        "adherence": student["adherence"]["value"] >= teacher["adherence"]["low"],
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as text; a value is followed by half the width of its 95% interval."""
    settings = report["settings"]
    lines = [
        f"{settings['images']} images a point; tiny with guidance {settings['guidance_scale']:g} unless said otherwise"
    ]
    for way, rows in report["from prompts"].items():
        lines += [f"from prompts, {way}", *columns("steps", rows)]
    for task, by_strength in report["image to image"].items():
        for strength, ways in by_strength.items():
            for way, rows in ways.items():
                lines += [f"{task}, strength {strength}, {way}", *columns("steps", rows)]
    few, many = ASKED
    for name, met in compare(report).items():
        lines.append(f"{STUDENT} at {few} steps no worse than {TEACHER} at {many}, {name}: {'yes' if met else 'NO'}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m decinb.tiny.evaluate_lcm", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=FULL, help="images for each point (default %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default %(default)s)")
    given = parser.parse_args(arguments)
    student, teacher = (load_pipeline(name, device=given.device, dtype="float32") for name in (STUDENT, TEACHER))
    report = evaluate(student, teacher, given.count)
    print(table(report))
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {given.results.name}")
    card = Path(MODELS[STUDENT].source) / "README.md"
    if card.is_file() and given.count >= FULL:
        fill_card(table(report), card)


if __name__ == "__main__":
    main()
