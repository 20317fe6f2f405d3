"""The depth-to-image model: what its training does, and that its folder loads."""

import json

import numpy as np
import pytest
import torch

from decinb import InputError, ModelError
from decinb.loading import load_pipeline
from decinb.scenes import Scene, depth_map, render, tasks
from decinb.scenes.judge import Judge
from decinb.tiny import data, evaluate_depth, losses, networks, train, train_depth
from decinb.tiny.stage import Stage
from decinb.unet_nas import UNetNAS
from tests.helpers.small import SMALL
from tests.helpers.training import needs_muon

CPU = torch.device("cpu")
SECONDS = 1 / 60  # of a minute
ROUNDING = 1e-5


def small_unet() -> UNetNAS:
    torch.manual_seed(0)
    return UNetNAS(SMALL, in_channels=4, sample_size=8)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A handful of scenes with their images and depths, at 64 x 64 pixels."""
    scenes = data.draw_scenes(8, seed=0)
    images = data.draw_all(scenes, tmp_path_factory.mktemp("places") / "scenes.npy", size=64, workers=1)
    return scenes, images, np.stack([depth_map(scene, 64) for scene in scenes])


@pytest.fixture(scope="module")
def bundled():
    return load_pipeline("tiny-depth", device="cpu")


def test_depth_is_prepared_as_the_pipeline_does(bundled):
    depth = torch.tensor(depth_map(Scene(house="red", trees="pine", mountains=True, layout=5)))[None]
    image = [render(Scene())]
    theirs = bundled.prepare_depth_map(image, depth, 1, False, torch.float32, CPU)
    ours = train_depth.prepare(depth, 16)
    assert (ours - theirs).abs().max() < ROUNDING
    assert ours.min() == -1 and ours.max() == 1
    shown = data.to_input(data.draw(Scene())[None], CPU, torch.float32)
    assert (bundled.feature_extractor(image, return_tensors="pt").pixel_values - shown).abs().max() < ROUNDING


def test_a_new_channel_changes_nothing_until_it_is_trained():
    unet = small_unet().eval()
    grown = train_depth.with_depth(unet).eval()
    latent, depth, words = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        before, after = unet(latent, 500, words).sample, grown(torch.cat([latent, depth], 1), 500, words).sample
    assert grown.config.in_channels == 5 and (before - after).abs().max() < ROUNDING


@needs_muon
def test_an_estimator_learns_a_handful_of_scenes(places, tmp_path, monkeypatch):
    steps = 300  # a budget of time would be too short on a busy machine
    monkeypatch.setattr(Stage, "progress", property(lambda stage: min(stage.step / steps, 1.0)))
    _, images, depths = places
    torch.manual_seed(0)

    def error(estimator) -> float:
        return float(np.abs(train_depth.estimate(estimator, images, CPU).numpy() - depths).mean())

    before = error(train_depth.make_estimator(width=48, size=64))
    made = train_depth.train_estimator(
        images,
        depths,
        1.0,
        tmp_path,
        CPU,
        batch=4,
        begin=train_depth.make_estimator(width=48, size=64),
    )
    assert error(made) < 0.8 * before


@needs_muon
def test_a_unet_learns_to_see_depth_and_the_text_encoder_stays(places, tiny, tmp_path):
    scenes, images, depths = places
    moments = train.encode(tiny.vae, images, CPU)
    seen = train_depth.prepare(torch.tensor(depths), 8)[None]
    torch.manual_seed(0)
    text_encoder = networks.make_text_encoder(tiny.tokenizer, width=16).requires_grad_(False)
    before = [weight.clone() for weight in text_encoder.parameters()]
    tokens = data.draw_captions(scenes, tiny.tokenizer, 2, 0)
    empty = data.to_tokens(tiny.tokenizer, [""])[0]
    parts = train_depth.with_depth(small_unet()), text_encoder
    given = {"batch": 4, "learning_rate": 2e-3, "depths": seen}
    made, _ = train.train_unet(moments, tokens, parts, empty, 4 * SECONDS, tmp_path, CPU, **given)
    assert all(torch.equal(*pair) for pair in zip(before, text_encoder.parameters(), strict=True))
    assert made.conv_in.weight[:, 4].abs().max() > ROUNDING
    noise = torch.randn(len(scenes), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((len(scenes),), 800)
    rows = networks.make_scheduler(), moments[:, :4], noise, empty.expand(len(scenes), -1), timesteps

    def loss(net: UNetNAS) -> float:
        with torch.no_grad():
            return losses.diffusion_loss(net, text_encoder, *rows, depth=seen[0]).item()

    assert loss(made) < loss(train_depth.with_depth(small_unet()))


def test_the_parts_are_saved_without_a_trace_of_the_machine_and_load_again(tiny, bundled, tmp_path):
    folder = train_depth.save(
        tmp_path / "depth",
        train_depth.with_depth(tiny.unet),
        train_depth.make_estimator(),
        train_depth.make_feature_extractor(),
    )
    for file in [*folder.glob("*/*.json"), *evaluate_depth.BUNDLED.glob("*/*.json")]:
        assert "_name_or_path" not in json.loads(file.read_text()) and "/" not in file.read_text(), file
    made = evaluate_depth.load(folder)
    assert {part.dtype for part in (made.unet, made.depth_estimator, bundled.unet, bundled.depth_estimator)} == {
        torch.float32
    }
    image = made("a red house", render(Scene(house="red")), strength=1.0, num_inference_steps=1).images[0]
    assert image.size == (128, 128)
    (folder / "depth_estimator" / "model.safetensors").write_bytes(
        (evaluate_depth.BUNDLED / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    with pytest.raises(ModelError, match="missing keys"):
        evaluate_depth.load(folder)


def test_the_measurement_runs(bundled, tiny, monkeypatch):
    torch.manual_seed(0)
    untrained = Judge().eval()
    monkeypatch.setattr(Judge, "load", lambda: untrained)
    monkeypatch.setattr(tasks, "STEPS", 2)
    monkeypatch.setattr(evaluate_depth, "TASKS", ("day to night",))
    report = evaluate_depth.evaluate(bundled, tiny, 3)
    assert json.loads(json.dumps(report)) == report
    assert "depth 0.6" in evaluate_depth.table(report)


def test_a_stage_needs_minutes(tmp_path):
    with pytest.raises(InputError, match="must be above 0, got 0 and 1"):
        train_depth.train(tmp_path, 4, 0, 1, 0, CPU)
