"""Tests of the training of the bundled model at toy size: it learns, resumes, and saves a folder that loads."""

import json
import random
import time

import pytest
import torch

import decinb
from decinb import InputError, named_attributes
from decinb.scenes.scenes import caption, differing, random_scene
from decinb.tiny import networks, stage, train
from decinb.tiny.data import EDIT_THRESHOLD, Example
from decinb.tiny.stage import Stage

CPU = torch.device("cpu")
SECONDS = 1 / 60  # of a minute
LATENT_ROUNDING = 1e-4  # float32 sums in another order


@pytest.fixture(autouse=True)
def cpu_clock(monkeypatch):
    """Count the budget of a stage in CPU time, which does not depend on the load of the machine."""
    monkeypatch.setattr(stage, "monotonic", time.process_time)


def quadratic(folder, minutes, watch=None):
    """Run a stage that brings one weight from 0 to 3."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    toy = Stage("toy", {"toy": module}, minutes, 0.05, folder, CPU, average=0.9)
    toy.run(lambda step: (module.weight.float() - 3).square().sum(), watch)
    return toy, module


def test_a_stage_learns_and_ends_with_the_average_in_float32(tmp_path):
    toy, module = quadratic(tmp_path, 1 * SECONDS)
    assert module.weight.item() == pytest.approx(3, abs=0.2)
    assert module.weight.dtype == torch.float32 and not module.training
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == toy.step


def test_a_stage_resumes_from_its_checkpoint(tmp_path):
    first, before = quadratic(tmp_path, 0.5 * SECONDS)
    second, after = quadratic(tmp_path, 0.5 * SECONDS)
    assert second.step == first.step and after.weight.item() == before.weight.item()
    third, _ = quadratic(tmp_path, 1 * SECONDS)
    assert third.step > first.step


def test_normalising_the_latent_does_not_change_reconstructions():
    torch.manual_seed(0)
    vae = networks.make_vae().eval()
    images = torch.rand(8, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        train.normalise_latent(vae, before.mean)
        after = vae.encode(images).latent_dist
        assert after.mean.mean(dim=(0, 2, 3)).abs().max() < LATENT_ROUNDING
        assert (after.mean.std(dim=(0, 2, 3)) - 1).abs().max() < LATENT_ROUNDING
        assert (vae.decode(after.mean).sample - decoded).abs().max() < LATENT_ROUNDING
        ratio = (before.std / before.mean.std(dim=(0, 2, 3), keepdim=True)) / after.std
        assert (ratio - 1).abs().max() < LATENT_ROUNDING


def test_the_tokenizer_encodes_every_caption_and_any_text(tmp_path):
    tokenizer = networks.make_tokenizer(tmp_path)
    rng = random.Random(99)
    for _ in range(50):
        text = caption(random_scene(rng), rng)
        ids = tokenizer(text).input_ids
        assert len(ids) <= networks.TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == text
    assert tokenizer.decode(tokenizer("Häuschen 漢字 🙂").input_ids, skip_special_tokens=True) == "häuschen 漢字 🙂"


def test_every_second_scene_is_the_twin_of_the_one_before():
    scenes = train.draw_scenes(50, seed=3)
    assert len(scenes) == 100 and scenes == train.draw_scenes(50, seed=3) != train.draw_scenes(50, seed=4)
    for scene, other in zip(scenes[::2], scenes[1::2], strict=True):
        assert scene.layout == other.layout and differing(scene, other)


def test_edits_follow_the_prompt_above_the_threshold_and_keep_the_source_below():
    scenes, rng, steps = train.draw_scenes(100, seed=0), random.Random(0), 1000
    examples = [Example.draw(scenes, rng, steps) for _ in range(3000)]
    edits = [example for example in examples if example.target != example.source]
    contradicted = 0
    for example in examples:
        target, source, named = scenes[example.target], scenes[example.source], named_attributes(example.prompt)
        followed = named.items() <= target.visible().items()
        assert example.timestep <= example.start < steps
        assert example.target in (example.source, example.source ^ 1)
        if example.start < EDIT_THRESHOLD[0]:
            assert example.target == example.source
            contradicted += not followed
        elif example.start > EDIT_THRESHOLD[1]:
            assert followed
        if example.target != example.source and example.prompt:
            assert named.keys() >= differing(target, source) & target.visible().keys(), "the prompt names what changes"
    assert len(edits) > 600 and contradicted > 40  # of about 1,300 edits, few start so low
    assert 200 < sum(not example.prompt for example in examples) < 400  # one in ten, for guidance


def test_the_command_trains_a_folder_that_loads_and_resumes(tmp_path):
    def run(unet_seconds: float, places: int = 8) -> int:
        minutes = f"--vae-minutes {SECONDS} --unet-minutes {unet_seconds * SECONDS}"
        train.main(f"--folder {tmp_path} --places {places} {minutes} --batch 4 --device cpu".split())
        return json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]

    steps = run(1)
    assert decinb.load_pipeline(tmp_path / "model", device="cpu").image_size == 128
    used = torch.load(tmp_path / "unet.pt", weights_only=True)["seconds"]
    assert run(used + 1) > steps
    with pytest.raises(InputError, match="holds a run with"):
        run(1, places=9)
    with pytest.raises(InputError, match="vae_minutes and unet_minutes must be above 0"):
        run(0)


def test_training_can_start_from_a_model_and_keeps_its_vae_and_tokenizer(tmp_path, tiny):
    folder = decinb.MODELS["tiny"].source
    model = train.train(
        tmp_path, places=8, vae_minutes=0, unet_minutes=SECONDS, seed=0, device=CPU, begin=folder, batch=4
    )
    made = decinb.load_pipeline(model, device="cpu")
    assert made.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    for part, changed in {"vae": False, "unet": True, "text_encoder": True}.items():
        pairs = zip(getattr(made, part).parameters(), getattr(tiny, part).parameters(), strict=True)
        assert any(not torch.equal(mine, theirs) for mine, theirs in pairs) == changed, part


def test_a_smaller_model_is_trained_watched_and_loaded(tmp_path):
    table = {
        **networks.CONFIGURATIONS,
        "down_blocks_in_channels": [32, 32],
        "down_blocks_out_channels": [32, 64],
        "down_blocks_num_resnets": [1, 1],
        "down_blocks_num_attentions": [0, 1],
        "add_downsample": [True, True],
        "prev_output_channels": [64, 64],
        "up_blocks_num_resnets": [2, 2],
        "up_blocks_num_attentions": [1, 0],
        "add_upsample": [True, False],
        "cross_attention_dim": 32,
        "sample_size": 16,
    }
    scenes = train.draw_scenes(8, seed=0)
    images = train.draw_all(scenes, tmp_path / "scenes.npy", size=64)
    assert images.shape == (16, 3, 64, 64)
    given = {"minutes": 1 * SECONDS, "folder": tmp_path, "device": CPU, "dtype": torch.float32}
    vae = train.train_vae(images, begin=networks.make_vae((8, 8, 16), size=64), **given)
    tokenizer = networks.make_tokenizer(tmp_path / "tokenizer")
    seen = []

    def watch(unet, text_encoder, progress):
        again = [train.sample(vae, text_encoder, tokenizer, unet, ["a red house", "snow"], steps=2) for _ in range(2)]
        assert [image.tobytes() for image in again[0]] == [image.tobytes() for image in again[1]]
        seen.append((progress, [image.size for image in again[0]]))

    moments = train.encode(vae, images, CPU)
    parts = networks.make_unet(table), networks.make_text_encoder(tokenizer, width=32)
    unet, text_encoder = train.train_unet(scenes, moments, tokenizer, batch=4, begin=parts, watch=watch, **given)
    assert seen == [(1.0, [(64, 64), (64, 64)])]
    made = decinb.load_pipeline(train.save(tmp_path / "model", vae, text_encoder, tokenizer, unet), device="cpu")
    assert made.image_size == 64 and made.unet.config.configurations == table
