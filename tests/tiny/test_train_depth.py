"""Tests of the depth-to-image model: its training, its folder, and that it keeps shapes and follows prompts."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from decinb import InputError, ModelError
from decinb.loading import load_pipeline
from decinb.scenes.adherence import named_attributes
from decinb.scenes.scenes import Scene, depth_map, differing, render
from decinb.tiny import evaluate, evaluate_depth, networks, stage, train, train_depth
from decinb.tiny.data import draw, to_input, to_tokens
from decinb.tiny.evaluate import draw_pairs, measure_changes
from decinb.unet_nas import UNetNAS
from tests.helpers.small import SMALL

RESULTS = Path(__file__).parents[2] / "results" / "tiny" / "depth.json"
CPU = torch.device("cpu")
SECONDS = 1 / 60  # of a minute
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def cpu_clock(monkeypatch):
    """Count the budget of a stage in CPU time, which does not depend on the load of the machine."""
    monkeypatch.setattr(stage, "monotonic", time.process_time)


def small_unet() -> UNetNAS:
    torch.manual_seed(0)
    return UNetNAS(SMALL, in_channels=4, sample_size=8)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return a few scenes with their images and depths, at 64 x 64 pixels."""
    scenes = train_depth.draw_scenes(6, seed=0)
    images = train.draw_all(scenes, tmp_path_factory.mktemp("places") / "scenes.npy", size=64)
    return scenes, images, np.stack([depth_map(scene, 64) for scene in scenes])


@pytest.fixture(scope="module")
def bundled():
    return load_pipeline("tiny-depth", device="cpu")


def test_twins_have_the_same_depth():
    scenes = train_depth.draw_scenes(200, seed=3)
    assert scenes == train_depth.draw_scenes(200, seed=3) != train_depth.draw_scenes(200, seed=4)
    changed = set()
    for scene, other in zip(scenes[::2], scenes[1::2], strict=True):
        assert np.array_equal(depth_map(scene, 32), depth_map(other, 32))
        changed |= differing(scene, other)
    assert changed == {"style", "time", "ground", "house"}


def test_captions_are_false_about_shapes_only():
    rng, false = random.Random(0), 0
    for scene in train_depth.draw_scenes(300, seed=0):
        named, true = named_attributes(train_depth.partly_false_caption(scene, rng)), scene.visible()
        wrong = {name for name, value in named.items() if true.get(name) != value}
        assert wrong <= {"trees", "mountains", "house"}
        assert not ("house" in wrong and scene.house), "the colour of an existing house is true"
        false += bool(wrong)
    assert 120 < false < 300  # half of 600 captions, minus those that are true by chance


def test_depth_is_prepared_as_in_the_pipeline(bundled):
    depth = torch.tensor(depth_map(Scene(house="red", trees="pine", mountains=True, layout=5)))[None]
    image = [render(Scene())]
    theirs = bundled.prepare_depth_map(image, depth, 1, False, torch.float32, CPU)
    ours = train_depth.prepare(depth, 16)
    assert (ours - theirs).abs().max() < ROUNDING
    assert ours.min() == -1 and ours.max() == 1
    pixels = to_input(draw(Scene())[None], CPU, torch.float32)
    assert (bundled.feature_extractor(image, return_tensors="pt").pixel_values - pixels).abs().max() < ROUNDING


def test_a_new_channel_has_no_effect_before_training():
    unet = small_unet().eval()
    extended = train_depth.with_depth(unet).eval()
    latent, depth, text = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        before, after = unet(latent, 500, text).sample, extended(torch.cat([latent, depth], 1), 500, text).sample
    assert extended.config.in_channels == 5 and (before - after).abs().max() < ROUNDING


def test_an_estimator_learns_a_few_scenes(places, tmp_path):
    _, images, depths = places
    torch.manual_seed(0)

    def error(estimator) -> float:
        return float(np.abs(train_depth.estimate(estimator, images, CPU).numpy() - depths).mean())

    before = error(train_depth.make_estimator(width=48, size=64))
    made = train_depth.train_estimator(
        images,
        depths,
        8 * SECONDS,
        tmp_path,
        CPU,
        batch=4,
        begin=train_depth.make_estimator(width=48, size=64),
        dtype=torch.float32,
    )
    assert error(made) < 0.7 * before


def test_a_unet_learns_to_use_depth_with_a_frozen_text_encoder(places, tiny, tmp_path):
    scenes, images, depths = places
    moments = train.encode(tiny.vae, images, CPU)
    prepared = train_depth.prepare(torch.tensor(depths), 8)[None]
    tokenizer = tiny.tokenizer
    text_encoder = networks.make_text_encoder(tokenizer, width=16)
    before = [weight.clone() for weight in text_encoder.parameters()]
    unet = train_depth.with_depth(small_unet())
    parts, given = (unet, text_encoder, tokenizer), {"batch": 4, "learning_rate": 2e-3, "dtype": torch.float32}
    made = train_depth.train_unet(scenes, moments, prepared, parts, 4 * SECONDS, tmp_path, CPU, **given)
    assert all(torch.equal(*pair) for pair in zip(before, text_encoder.parameters(), strict=True))
    assert made.conv_in.weight[:, 4].abs().max() > ROUNDING
    scheduler = networks.make_scheduler()
    noise = torch.randn(len(scenes), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = to_tokens(tokenizer, [""] * len(scenes))
    timesteps = torch.full((len(scenes),), 800)

    def loss(net: UNetNAS) -> float:
        with torch.no_grad():
            given = (net, text_encoder, scheduler, moments[:, :4], noise, tokens, timesteps)
            return train.unet_loss(*given, depth=prepared[0]).item()

    assert loss(made) < loss(train_depth.with_depth(small_unet()))


def test_the_parts_are_saved_without_local_paths_and_load_again(tiny, bundled, tmp_path):
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


def test_the_bundled_estimator_is_accurate(bundled):
    report = evaluate_depth.evaluate_estimator(bundled, 40)
    assert max(report["painting"], report["sketch"]) < 0.08  # of a range of 2


def test_at_strength_1_shapes_are_kept_and_the_prompt_is_followed(bundled, tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "STEPS", 12)
    pairs = list(draw_pairs(8))
    with_depth, without = (measure_changes(pipe, pairs, strength=1.0)["all"] for pipe in (bundled, tiny))
    assert with_depth["overlap"] > without["overlap"] + 0.3
    assert with_depth["changed"] > 0.8


def test_depth_decides_where_the_prompt_names_another_shape(bundled, monkeypatch):
    monkeypatch.setattr(evaluate, "STEPS", 12)
    fractions = evaluate_depth.evaluate_disagreement(bundled, list(draw_pairs(24)))
    assert fractions["trees of the input"] > fractions["trees of the prompt"]
    assert fractions["mountains only in the prompt"] < 0.5


def test_the_commands_train_a_model_and_measure_it(tmp_path, monkeypatch):
    train_depth.main(
        f"--folder {tmp_path} --places 4 --estimator-minutes {SECONDS} --unet-minutes {SECONDS} --batch 2".split()
    )
    with pytest.raises(InputError, match="must be above 0, got 0 and 1"):
        train_depth.main(f"--folder {tmp_path} --estimator-minutes 0 --unet-minutes 1".split())
    monkeypatch.setattr(evaluate, "STEPS", 2)
    monkeypatch.setattr(evaluate_depth, "QUICK", {"estimator": 4, "changes": 4})
    evaluate_depth.main(f"--folder {tmp_path / 'depth'} --results {tmp_path} --quick".split())
    report = json.loads((tmp_path / "depth-quick.json").read_text())
    stored = json.loads(RESULTS.read_text())
    assert report.keys() == stored.keys()
    assert evaluate_depth.table(report).count("\n") == evaluate_depth.table(stored).count("\n")


def test_the_card_shows_the_stored_results():
    stored = json.loads(RESULTS.read_text())
    assert stored["settings"]["pairs"] == 100
    assert evaluate_depth.table(stored) in (evaluate_depth.BUNDLED / "README.md").read_text(encoding="utf-8")
