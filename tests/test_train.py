"""The training recipe at toy size: it learns, it is killed, it goes on, and it leaves a folder that loads."""

import json
import random

import pytest
import torch

import decinb
from decinb import InputError
from decinb.tiny import train
from decinb.tiny.scenes import caption, random_scene

CPU = torch.device("cpu")
SECONDS = 1 / 60  # of a minute
LATENT_ROUNDING = 1e-4  # float32 sums in another order


def quadratic(folder, minutes, watch=None):
    """A stage that brings one weight from 0 to 3."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    stage = train.Stage("toy", {"toy": module}, minutes, 0.05, folder, CPU, average=0.9)
    stage.run(lambda step: (module.weight.float() - 3).square().sum(), watch)
    return stage, module


def test_a_stage_learns_and_leaves_its_average_in_float32(tmp_path):
    stage, module = quadratic(tmp_path, 1 * SECONDS)
    assert module.weight.item() == pytest.approx(3, abs=0.2)
    assert module.weight.dtype == torch.float32 and not module.training
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == stage.step


def test_a_stage_goes_on_where_it_was_stopped(tmp_path):
    first, before = quadratic(tmp_path, 0.5 * SECONDS)
    second, after = quadratic(tmp_path, 0.5 * SECONDS)
    assert second.step == first.step and after.weight.item() == before.weight.item()
    third, _ = quadratic(tmp_path, 1 * SECONDS)
    assert third.step > first.step


def test_the_latent_is_brought_to_mean_0_and_deviation_1_and_decodes_the_same():
    torch.manual_seed(0)
    vae = train.make_vae().eval()
    pictures = torch.rand(8, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        decoded = vae.decode(before.mean).sample
        train.normalise_latent(vae, before.mean)
        after = vae.encode(pictures).latent_dist
        assert after.mean.mean(dim=(0, 2, 3)).abs().max() < LATENT_ROUNDING
        assert (after.mean.std(dim=(0, 2, 3)) - 1).abs().max() < LATENT_ROUNDING
        assert (vae.decode(after.mean).sample - decoded).abs().max() < LATENT_ROUNDING
        share = (before.std / before.mean.std(dim=(0, 2, 3), keepdim=True)) / after.std
        assert (share - 1).abs().max() < LATENT_ROUNDING


def test_the_tokenizer_writes_every_caption_and_any_text(tmp_path):
    tokenizer = train.make_tokenizer(tmp_path)
    rng = random.Random(99)
    for _ in range(50):
        said = caption(random_scene(rng), rng)
        ids = tokenizer(said).input_ids
        assert len(ids) <= train.TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == said
    assert tokenizer.decode(tokenizer("Häuschen 漢字 🙂").input_ids, skip_special_tokens=True) == "häuschen 漢字 🙂"


def test_the_whole_recipe_leaves_a_folder_that_loads_and_may_be_run_again(tmp_path):
    given = {"scenes": 16, "vae_minutes": 1 * SECONDS, "seed": 0, "device": CPU}
    model = train.train(tmp_path, unet_minutes=1 * SECONDS, **given)
    made = decinb.load_pipeline(model, device="cpu")
    assert made.image_size == 128
    steps = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]
    used = torch.load(tmp_path / "unet.pt", weights_only=True)["seconds"]
    train.train(tmp_path, unet_minutes=(used + 1) * SECONDS, **given)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] > steps
    with pytest.raises(InputError, match="holds a run with"):
        train.train(tmp_path, unet_minutes=1 * SECONDS, **{**given, "scenes": 17})
