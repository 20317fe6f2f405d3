"""Distillation at toy size: the loss is that of a consistency model, it falls, and the student is an ordinary model."""

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

import decinb
from decinb import InputError
from decinb.tiny import networks, train_lcm
from decinb.unet_nas import UNetNAS
from tests.helpers.sweeps import same
from tests.helpers.training import needs_muon

CPU = torch.device("cpu")
SECONDS = 1 / 60  # of a minute
ROUNDING = 1e-5


class Text(torch.nn.Module):
    """A text encoder that gives every caption its first token as embedding."""

    def forward(self, tokens):
        return (tokens[:, :1, None].float(),)


def perfect(latents):
    """Return a denoiser that knows the image: its velocity leads to ``latents`` from any noise."""
    scheduler = networks.make_scheduler()

    def predict(noisy, timesteps, text):
        signal, spread = train_lcm.levels(scheduler, timesteps)
        image = latents.repeat(len(noisy) // len(latents), 1, 1, 1)
        return UNet2DConditionOutput(sample=(signal * noisy - image) / spread.clamp(min=1e-6))

    return predict


def test_a_student_that_always_sees_the_image_has_no_loss():
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    tokens, places = torch.ones(2, 3, dtype=torch.long), torch.tensor([10, 49])
    unet, scheduler = perfect(latents), networks.make_scheduler()
    loss = train_lcm.consistency_loss(
        unet, unet, Text(), scheduler, latents, noise, tokens, torch.zeros(3, dtype=torch.long), places
    )
    assert loss < 1e-3
    other = perfect(latents.flip(0))
    assert loss < train_lcm.consistency_loss(
        lambda noisy, t, text: UNet2DConditionOutput(
            sample=other(noisy, t, text).sample * (t % 2)[:, None, None, None]
        ),
        unet,
        Text(),
        scheduler,
        latents,
        noise,
        tokens,
        torch.zeros(3, dtype=torch.long),
        places,
    )


def test_steps_and_boundary_are_those_of_diffusers():
    torch.manual_seed(0)
    scheduler = networks.make_scheduler()
    noisy, velocity = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    scheduler.set_timesteps(train_lcm.TEACHER_STEPS)
    now = scheduler.timesteps[3:4]
    ours = train_lcm.ddim_step(scheduler, noisy, velocity, now, scheduler.timesteps[4:5])
    torch.testing.assert_close(ours, scheduler.step(velocity, now[0], noisy).prev_sample, atol=ROUNDING, rtol=0)

    lcm = train_lcm.make_lcm_scheduler()
    lcm.set_timesteps(1)
    image = lcm.step(velocity, lcm.timesteps[0], noisy).denoised
    unet = lambda noisy, timesteps, text: UNet2DConditionOutput(sample=velocity)  # noqa: E731
    seen = train_lcm.consistency(unet, scheduler, noisy, lcm.timesteps[:1], torch.zeros(1, 1, 1))
    torch.testing.assert_close(seen, image, atol=ROUNDING, rtol=0)
    at_zero = train_lcm.consistency(unet, scheduler, noisy, torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, 1))
    assert torch.equal(at_zero, noisy)


def test_sampling_uses_the_timesteps_of_training():
    scheduler = train_lcm.make_lcm_scheduler()
    skip = 1000 // train_lcm.TEACHER_STEPS
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps and all((int(t) + 1) % skip == 0 for t in scheduler.timesteps)


@needs_muon
@pytest.mark.slow
def test_a_student_is_distilled_resumed_and_swept_as_any_other(tmp_path):
    arguments = {"scenes": 4, "seed": 0, "device": CPU, "captions": 2, "batch": 2, "workers": 1, "dtype": torch.float32}
    for seconds in (1, 2):
        model = train_lcm.train(tmp_path, "tiny", minutes=seconds * SECONDS, **arguments)
    pipe = decinb.load_pipeline(model, "cpu")
    assert isinstance(pipe.unet, UNetNAS) and isinstance(pipe.scheduler, LCMScheduler)
    pipe.set_progress_bar_config(disable=True)
    image = decinb.load_image("day")
    cells = decinb.grid(strength=[0.5, 1.0], guidance_scale=[1.0], num_inference_steps=[4])
    sweep = decinb.run_sweep(pipe, image, "a red house", cells, seed=3)
    for cell, made in zip(cells, sweep.images, strict=True):  # its scheduler draws noise at each step
        alone = pipe("a red house", image, **cell, generator=torch.Generator().manual_seed(3)).images[0]
        assert same(made, alone)
    assert np.asarray(sweep.images[0]).std() > 0
    with pytest.raises(InputError, match="holds a run with"):
        train_lcm.train(tmp_path, "tiny", minutes=SECONDS, guidance=2.0, **arguments)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(InputError, match="minutes must be above 0 and guidance at least 1, got 0 and 4"):
        train_lcm.train(tmp_path, "tiny", 4, 0.0, 0, CPU)
