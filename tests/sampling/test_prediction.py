"""The clean latents that a prediction implies, against what schedulers themselves return."""

import diffusers
import pytest
import torch

from decinb.sampling.prediction import predict_clean


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_it_is_the_prediction_that_the_scheduler_returns(name, kind):
    if kind == "sample" and name.startswith("Euler"):
        pytest.skip("these schedulers do not take it, or scale it in another way")
    options = {"clip_sample": False} if name.startswith("DD") else {}
    scheduler = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, prediction_type=kind, **options)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 8, 8) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = torch.randn(1, 4, 8, 8)
        found = predict_clean(scheduler, scheduler.scale_model_input(latents, timestep), output, timestep)
        stepped = scheduler.step(output, timestep, latents)
        assert torch.allclose(found, stepped.pred_original_sample, rtol=1e-3, atol=1e-3)
        latents = stepped.prev_sample


def test_schedules_that_start_with_pure_noise_or_are_of_another_kind():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ones = torch.ones(1, 4, 2, 2)
    assert torch.allclose(predict_clean(scheduler, ones, ones, torch.tensor(999)), -ones, atol=1e-3)
    assert predict_clean(diffusers.FlowMatchEulerDiscreteScheduler(), ones, ones, torch.tensor(500.0)) is None
