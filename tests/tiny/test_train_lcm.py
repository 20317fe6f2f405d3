"""Distillation at toy size: the student learns where its teacher arrives, and is an ordinary model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

import decinb
from decinb import InputError, ModelError
from decinb.benchmark.counting import count_unet_calls
from decinb.models import MODELS
from decinb.sampling.calls import defaults
from decinb.tiny import networks, train_lcm
from decinb.unet_nas import UNetNAS
from tests.helpers.sweeps import Stop, same
from tests.helpers.training import needs_muon

CPU = torch.device("cpu")
SECONDS = 1 / 60  # of a minute
ROUNDING = 1e-5


class Text(torch.nn.Module):
    """A text encoder that gives every caption its first token as embedding."""

    def forward(self, tokens):
        return (tokens[:, :1, None].float(),)


def denoiser(predict):
    """Return a function in the place of a U-Net."""
    return lambda noisy, timesteps, text: UNet2DConditionOutput(sample=predict(noisy, timesteps, text))


def perfect(latents):
    """Return a denoiser that knows the image: its velocity leads to ``latents`` from any noise."""
    scheduler = networks.make_scheduler()

    def predict(noisy, timesteps, text):
        signal, spread = train_lcm.levels(scheduler, timesteps)
        image = latents.repeat(len(noisy) // len(latents), 1, 1, 1)
        return (signal * noisy - image) / spread.clamp(min=1e-6)

    return denoiser(predict)


def loss_of(student, teacher, latents, **changed):
    given = {
        "noise": torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)),
        "tokens": torch.ones(2, 3, dtype=torch.long),
        "empty": torch.zeros(3, dtype=torch.long),
        "segments": torch.tensor([0, 3]),
        "points": torch.tensor([1, 3]),
    }
    scheduler = networks.make_scheduler()
    return train_lcm.segment_loss(student, teacher, Text(), scheduler, latents, **(given | changed))


def test_a_student_that_follows_a_straight_path_has_no_loss():
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 4, 4)
    knows = perfect(latents)  # all of its steps are on one line, so a long step lands where short ones do
    assert loss_of(knows, knows, latents) < 1e-6
    assert loss_of(perfect(latents.flip(0)), knows, latents) > 0.1


def test_the_target_is_where_the_guided_teacher_arrives():
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 4, 4)
    # A teacher that curves with the timestep and the text: the path has to be walked.
    teacher = denoiser(
        lambda noisy, t, text: (0.3 * noisy.roll(1, -1) + t[:, None, None, None] / 1000) * (1 + text[..., None])
    )
    scheduler = networks.make_scheduler()
    noise = torch.randn(2, 4, 4, 4)
    seen = {}

    def student(noisy, timesteps, text):
        seen.update(noisy=noisy, timesteps=timesteps)
        return torch.zeros_like(noisy)

    loss = loss_of(denoiser(student), teacher, latents, noise=noise, guidance=3.0)
    scheduler.set_timesteps(train_lcm.SEGMENTS * train_lcm.STEPS_OF_SEGMENT)
    targets = []
    for row, (segment, point) in enumerate([(0, 1), (3, 3)]):
        steps = scheduler.timesteps[segment * train_lcm.STEPS_OF_SEGMENT :][: train_lcm.STEPS_OF_SEGMENT]
        path = [scheduler.add_noise(latents[row : row + 1], noise[row : row + 1], steps[:1])]
        for t in steps:
            one, none = (teacher(path[-1], t[None], torch.full((1, 1, 1), text)).sample for text in (1.0, 0.0))
            path.append(scheduler.step(none + 3.0 * (one - none), t, path[-1]).prev_sample)
        for at, place in ((0, row), (point, 2 + row)):
            torch.testing.assert_close(seen["noisy"][place], path[at][0], atol=ROUNDING, rtol=ROUNDING)
            assert seen["timesteps"][place] == steps[at]
        # A student with this velocity is at the end of the segment after one step of an ordinary scheduler.
        end = torch.tensor([(999, 749, 499, 249, -1)[segment + 1]])
        velocity = train_lcm.velocity_to(scheduler, path[0], path[-1], steps[:1], end)
        coarse = networks.make_scheduler()
        coarse.set_timesteps(train_lcm.SEGMENTS)
        assert coarse.timesteps[segment] == steps[0]
        landed = coarse.step(velocity, coarse.timesteps[segment], path[0]).prev_sample
        torch.testing.assert_close(landed, path[-1], atol=1e-3, rtol=1e-3)
        targets += [velocity, train_lcm.velocity_to(scheduler, path[point], path[-1], steps[point : point + 1], end)]
    torch.testing.assert_close(loss, torch.cat(targets).square().mean(), atol=1e-4, rtol=1e-4)


def test_steps_are_those_of_diffusers_and_can_be_inverted():
    torch.manual_seed(0)
    scheduler = networks.make_scheduler()
    noisy, velocity = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    timesteps = train_lcm.teacher_timesteps(scheduler)
    assert len(timesteps) == train_lcm.SEGMENTS * train_lcm.STEPS_OF_SEGMENT + 1 and timesteps[0] == 999
    for place in (0, 3, len(timesteps) - 2):
        now, after = timesteps[place : place + 1], timesteps[place + 1 : place + 2]
        ours = train_lcm.ddim_step(scheduler, noisy, velocity, now, after)
        torch.testing.assert_close(ours, scheduler.step(velocity, now[0], noisy).prev_sample, atol=1e-4, rtol=0)
        found = train_lcm.velocity_to(scheduler, noisy, ours, now, after)
        torch.testing.assert_close(found, velocity, atol=1e-4, rtol=0)


def test_noise_levels_are_found_on_any_device():
    scheduler = networks.make_scheduler()
    latents, timesteps = torch.zeros(1, 4, 2, 2, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    scheduler.add_noise(latents, latents, timesteps)  # moves a part of the scheduler to the device
    assert all(one.device.type == "meta" for one in train_lcm.levels(scheduler, timesteps))


def test_the_bundled_student_is_what_the_texts_say():
    folder = Path(train_lcm.__file__).parent / "lcm"
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    card = (folder / "README.md").read_text()
    assert scheduler["_class_name"] == "DDIMScheduler" and scheduler["timestep_spacing"] == "trailing"
    assert f"guidance scale of {train_lcm.GUIDANCE:g} is built in" in card and "not measured yet" not in card
    assert json.loads((folder / "model_index.json").read_text()) == train_lcm.INDEX


def test_four_and_eight_steps_use_the_ends_of_the_segments():
    scheduler = networks.make_scheduler()
    ends = set(train_lcm.teacher_timesteps(scheduler)[: -1 : train_lcm.STEPS_OF_SEGMENT].tolist())
    for steps in (4, 8):
        scheduler.set_timesteps(steps)
        assert ends <= set(scheduler.timesteps.tolist())


def test_only_the_new_parts_are_saved_and_the_others_are_those_of_tiny(tiny, tiny_lcm):
    folder = MODELS["tiny-lcm"].source
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert files == {"model_index.json", "scheduler/scheduler_config.json", *unet}
    assert isinstance(tiny_lcm.unet, UNetNAS) and tiny_lcm.unet.dtype == torch.float32
    assert isinstance(tiny_lcm.scheduler, DDIMScheduler)
    for name in ("vae", "text_encoder"):
        ours, theirs = (getattr(pipe, name).state_dict() for pipe in (tiny_lcm, tiny))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(ModelError, match="has no text_encoder, tokenizer, vae, which"):
        decinb.load_pipeline(folder, device="cpu")


@pytest.mark.parametrize("task", decinb.models.TASKS)
def test_a_call_takes_four_steps_of_one_row_unless_told_otherwise(tiny_lcm, task):
    pipe = decinb.load_pipeline(tiny_lcm, task=task)
    given = {"prompt": "a red house", "strength": 1.0, "image": decinb.load_image("day")}
    if task == "text-to-image":
        given = {"prompt": "a red house"}
    assert defaults(pipe)["num_inference_steps"] == 4 and defaults(pipe)["guidance_scale"] == 1
    for changed, calls, rows in (
        ({}, 4, 4),
        ({"num_inference_steps": None}, 4, 4),
        ({"num_inference_steps": 2}, 2, 2),
        ({"guidance_scale": 3.0}, 4, 8),
    ):
        with count_unet_calls(pipe) as counted:
            pipe(**given, **changed)
        assert (counted.calls, counted.rows) == (calls, rows), changed


CELLS = [
    *decinb.grid(strength=[0.5, 0.75], num_inference_steps=[4, 8]),
    *decinb.grid(strength=[1.0], num_inference_steps=[1, 2, 4, 8]),
    {"guidance_scale": 3.0, "strength": 0.75},
    {"seed": 1, "strength": 1.0, "prompt": "a barn at night"},
]


def test_every_image_of_a_packed_sweep_is_that_of_its_own_call_also_when_resumed(tiny_lcm, tmp_path):
    image = decinb.load_image("day")
    sweep = (tiny_lcm, image, "a red house", CELLS)
    with pytest.raises(KeyboardInterrupt), Stop(tiny_lcm, 5, KeyboardInterrupt()):
        decinb.run_sweep(*sweep, folder=tmp_path / "sweep")
    made = list((tmp_path / "sweep").glob("*.png"))
    assert 0 < len(made) < len(CELLS)
    with count_unet_calls(tiny_lcm) as counted:
        images = decinb.run_sweep(*sweep, folder=tmp_path / "sweep").images
    assert counted.calls <= 8, "packed: as many calls as the longest cell has steps"
    for cell, shown in zip(CELLS, images, strict=True):
        arguments = {"prompt": "a red house", **cell}
        generator = torch.Generator().manual_seed(arguments.pop("seed", 0))
        assert same(shown, tiny_lcm(image=image, generator=generator, **arguments).images[0]), cell
    assert not same(images[-1], images[-2])


def test_a_sweep_without_steps_and_guidance_uses_those_of_the_model(tiny_lcm):
    sweep = decinb.run_sweep(tiny_lcm, decinb.load_image("day"), "a red house", [{"strength": 1.0}])
    alone = tiny_lcm(
        "a red house",
        decinb.load_image("day"),
        strength=1.0,
        guidance_scale=1.0,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert same(sweep.images[0], alone.images[0])


@needs_muon
@pytest.mark.slow
def test_a_student_is_distilled_resumed_and_swept_as_any_other(tmp_path, monkeypatch):
    arguments = {"scenes": 4, "seed": 0, "device": CPU, "captions": 2, "batch": 2, "workers": 1, "dtype": torch.float32}
    for seconds in (1, 2):
        model = train_lcm.train(tmp_path, "tiny", minutes=seconds * SECONDS, **arguments)
    assert "## " not in (card := (model / "README.md").read_text()) and "guidance scale of 7.5 is built in" in card
    monkeypatch.setitem(MODELS, "tiny-lcm", replace(MODELS["tiny-lcm"], source=model))
    pipe = decinb.load_pipeline("tiny-lcm", "cpu")
    assert isinstance(pipe.unet, UNetNAS) and isinstance(pipe.scheduler, DDIMScheduler)
    pipe.set_progress_bar_config(disable=True)
    image = decinb.load_image("day")
    cells = decinb.grid(strength=[0.5, 1.0], guidance_scale=[1.0], num_inference_steps=[4])
    sweep = decinb.run_sweep(pipe, image, "a red house", cells, seed=3)
    for cell, made in zip(cells, sweep.images, strict=True):
        alone = pipe("a red house", image, **cell, generator=torch.Generator().manual_seed(3)).images[0]
        assert same(made, alone)
    assert np.asarray(sweep.images[0]).std() > 0
    with pytest.raises(InputError, match="holds a run with"):
        train_lcm.train(tmp_path, "tiny", minutes=SECONDS, guidance=2.0, **arguments)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(InputError, match="minutes must be above 0 and guidance at least 1, got 0 and 7.5"):
        train_lcm.train(tmp_path, "tiny", 4, 0.0, 0, CPU)
