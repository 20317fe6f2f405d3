"""What the sweep of ``tests/fixtures/sweep_v0`` was made from, by the first version of decinb."""

from pathlib import Path

OLD = Path(__file__).parents[1] / "fixtures" / "sweep_v0"
PROMPT = "a red house on snow at night"
CELLS = [
    {"strength": 0.5, "num_inference_steps": 4},
    {"strength": 1.0, "num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "trees", "seed": 7},
    {"strength": 0.7, "num_inference_steps": 3, "guidance_scale": 1.0, "prompt": "a sketch of mountains"},
]
TEXT_CELLS = [{"num_inference_steps": 2, "guidance_scale": 4.0}]
