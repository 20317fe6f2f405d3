"""The clean latents that a U-Net's prediction implies, for showing the progress of an image."""

import torch
from diffusers import SchedulerMixin
from torch import Tensor

SMALLEST = 1e-4  # of the share of the image in noisy latents: schedules that end in pure noise would divide by zero


def predict_clean(scheduler: SchedulerMixin, model_input: Tensor, output: Tensor, timestep: Tensor) -> Tensor | None:
    """Return the clean latents that the output of a U-Net implies (Song et al. (2021), arXiv:2010.02502, eq. 9).

    Whatever the scheduler, a Stable Diffusion U-Net sees ``alpha * clean + sigma * noise``, where ``alpha² + sigma²``
    is 1. So what it saw is enough, and the scheduler's own step is not needed.

    Args:
        scheduler: its schedule and ``prediction_type`` are used.
        model_input: the noisy latents as the U-Net saw them, (1, channels, height, width).
        output: what it predicted, with guidance, of the same shape.
        timestep: the timestep, which may lie between two integers.

    Returns:
        The latents, of the same shape; None if the scheduler has another kind of schedule.
    """
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if alphas_cumprod is None or kind not in ("epsilon", "v_prediction", "sample"):
        return None
    position = min(max(float(timestep), 0.0), len(alphas_cumprod) - 1.0)
    below = int(position)
    above = min(below + 1, len(alphas_cumprod) - 1)
    kept = torch.lerp(alphas_cumprod[below].float(), alphas_cumprod[above].float(), position - below)
    alpha, sigma = max(float(kept.sqrt()), SMALLEST), float((1 - kept).sqrt())
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return alpha * model_input - sigma * output
    return (model_input - sigma * output) / alpha
