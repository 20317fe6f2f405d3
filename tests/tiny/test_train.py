"""The training at toy size: it learns, it is stopped, it resumes, and it leaves a folder that loads."""

import json
import random
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch

import decinb
from decinb import InputError
from decinb.scenes import caption, random_scene, render
from decinb.tiny import data, losses, networks, train, train_depth, train_lcm
from decinb.tiny.stage import Stage
from tests.helpers.training import needs_muon

CPU = torch.device("cpu")
SECONDS = 1 / 60  # of a minute
LATENT_ROUNDING = 1e-4  # float32 sums in another order

SMALL = {
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


def quadratic(folder, minutes, watch=None):
    """A stage that brings one weight from 0 to 3."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    stage = Stage("toy", {"toy": module}, minutes, 0.05, folder, CPU, average=0.9)
    stage.run(lambda step: (module.weight.float() - 3).square().sum(), watch)
    return stage, module


@needs_muon
def test_a_stage_learns_and_leaves_its_average_in_float32(tmp_path):
    stage, module = quadratic(tmp_path, 1 * SECONDS)
    assert module.weight.item() == pytest.approx(3, abs=0.2)
    assert module.weight.dtype == torch.float32 and not module.training
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == stage.step


@needs_muon
def test_a_stage_resumes_where_it_was_stopped(tmp_path):
    first, before = quadratic(tmp_path, 0.5 * SECONDS)
    second, after = quadratic(tmp_path, 0.5 * SECONDS)
    assert second.step == first.step and after.weight.item() == before.weight.item()
    third, _ = quadratic(tmp_path, 1 * SECONDS)
    assert third.step > first.step


def test_an_older_torch_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    given = {"scenes": 4, "seed": 0, "device": CPU}
    for run in (
        lambda folder: train.train(folder, vae_minutes=1, unet_minutes=1, **given),
        lambda folder: train_depth.train(folder, estimator_minutes=1, unet_minutes=1, **given),
        lambda folder: train_lcm.train(folder, "tiny", minutes=1, **given),
        lambda folder: Stage("toy", {"toy": torch.nn.Linear(1, 1)}, 1, 0.1, folder, CPU),
    ):
        with pytest.raises(InputError, match=r"torch must be 2.9 or newer for training, .* this is torch \d"):
            run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_normalised_latent_has_mean_0_and_deviation_1_and_decodes_the_same():
    torch.manual_seed(0)
    vae = networks.make_vae((8, 8, 8, 16)).eval()
    images = torch.rand(8, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        train.normalise_latent(vae, before.mean)
        after = vae.encode(images).latent_dist
        assert after.mean.mean(dim=(0, 2, 3)).abs().max() < LATENT_ROUNDING
        assert (after.mean.std(dim=(0, 2, 3)) - 1).abs().max() < LATENT_ROUNDING
        assert (vae.decode(after.mean).sample - decoded).abs().max() < LATENT_ROUNDING
        share = (before.std / before.mean.std(dim=(0, 2, 3), keepdim=True)) / after.std
        assert (share - 1).abs().max() < LATENT_ROUNDING


def test_the_tokenizer_knows_every_caption_and_any_text(tmp_path):
    tokenizer = networks.make_tokenizer(tmp_path)
    rng = random.Random(99)
    for _ in range(50):
        said = caption(random_scene(rng), rng, left_out=0)
        ids = tokenizer(said).input_ids
        assert len(ids) <= networks.TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == said.lower()
    assert tokenizer.decode(tokenizer("Häuschen 漢字 🙂").input_ids, skip_special_tokens=True) == "häuschen 漢字 🙂"


@needs_muon
def test_the_watcher_sees_averaged_weights(tmp_path):
    seen = []
    module = torch.nn.Linear(1, 1, bias=False)
    stage = Stage("toy", {"toy": module}, 0.2 * SECONDS, 0.05, tmp_path, CPU, average=0.99)
    stage.run(lambda step: (module.weight - 3).square().sum(), lambda progress: seen.append(module.weight.item()))
    assert seen == [stage.averages[0].item()] == [module.weight.item()]


# --- data -------------------------------------------------------------------------------------------------------------


def test_scenes_and_captions_depend_on_the_seed_alone(tmp_path):
    scenes = data.draw_scenes(6, seed=3)
    assert scenes == data.draw_scenes(6, seed=3) != data.draw_scenes(6, seed=4)
    tokenizer = networks.make_tokenizer(tmp_path)
    tokens = data.draw_captions(scenes, tokenizer, each=5, seed=1)
    assert tokens.shape == (6, 5, networks.TOKENS) and tokens.dtype == torch.int16
    assert torch.equal(tokens, data.draw_captions(scenes, tokenizer, each=5, seed=1))
    assert len(tokens.flatten(0, 1).unique(dim=0)) > 20, "captions of one scene vary"


def test_images_are_drawn_once(tmp_path):
    scenes, file = data.draw_scenes(3, seed=0), tmp_path / "scenes.npy"
    images = data.draw_all(scenes, file, size=64, workers=1)
    assert np.array_equal(images[1], np.asarray(render(scenes[1], 64)).transpose(2, 0, 1))
    written = file.stat().st_mtime_ns
    data.draw_all(scenes, file, size=64)
    assert file.stat().st_mtime_ns == written


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small U-Net and text encoder, four latents, and the tokens of two distinct captions."""
    torch.manual_seed(0)
    tokenizer = networks.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    parts = networks.make_unet(SMALL).eval(), networks.make_text_encoder(tokenizer, width=32).eval()
    tokens = data.to_tokens(tokenizer, ["a red house", "", "a red house", ""])
    return *parts, networks.make_scheduler(), torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), tokens


def test_the_loss_is_that_of_the_velocity_of_each_row(toy):
    unet, text_encoder, scheduler, latents, noise, tokens = toy
    timesteps = torch.tensor([10, 500, 900, 999])
    with torch.no_grad():
        together = losses.diffusion_loss(unet, text_encoder, scheduler, latents, noise, tokens, timesteps)
        alone = []
        for i in range(4):
            rows = (x[i : i + 1] for x in (latents, noise, tokens, timesteps))
            alone.append(losses.diffusion_loss(unet, text_encoder, scheduler, *rows).item())
    assert together.item() == pytest.approx(np.mean(alone), rel=1e-4)
    signal = scheduler.alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    weights = ((snr + 1).clamp(max=losses.SNR_LIMIT + 1) / (snr + 1)).tolist()
    assert weights == pytest.approx(((losses.SNR_LIMIT + 1) * (1 - signal)).clamp(max=1).tolist(), rel=1e-3)


def test_latents_turn_as_images_do():
    values = torch.arange(4 * 8 * 8, dtype=torch.float32).reshape(1, 4, 8, 8)
    assert losses._turn(values, 0, 1.0) is not None and torch.equal(losses._turn(values, 0, 1.0), values)
    assert torch.equal(losses._turn(losses._turn(values, 1, 1.0), 3, 1.0), values)
    assert losses._turn(values, 1, 0.5).shape == (1, 4, 4, 4)


def test_a_turned_vae_loss_is_finite_and_differs():
    torch.manual_seed(0)
    vae, images = networks.make_vae((8, 8, 8, 16)), torch.rand(2, 3, 64, 64) * 2 - 1
    plain, turned = (
        losses.vae_loss(vae, images, torch.Generator().manual_seed(0), rng) for rng in (None, random.Random(1))
    )
    assert plain.isfinite() and turned.isfinite() and plain != turned


# --- stages -----------------------------------------------------------------------------------------------------------


@needs_muon
def test_the_loss_of_a_small_unet_falls(toy, tmp_path):
    torch.manual_seed(0)
    tokenizer = networks.make_tokenizer(tmp_path / "tokenizer")
    scenes = data.draw_scenes(8, seed=0)
    tokens = data.draw_captions(scenes, tokenizer, each=2, seed=0)
    moments = torch.cat([torch.randn(8, 4, 8, 8), torch.full((8, 4, 8, 8), -20.0)], dim=1)
    empty = data.to_tokens(tokenizer, [""])[0]
    parts = networks.make_unet(SMALL), networks.make_text_encoder(tokenizer, width=32)

    def loss() -> float:
        unet, text_encoder = (part.eval() for part in parts)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(8, 4, 8, 8, generator=generator)
        timesteps = torch.arange(8) * 120
        with torch.no_grad():
            scheduler = networks.make_scheduler()
            rows = moments[:, :4], noise, tokens[:, 0].long(), timesteps
            return losses.diffusion_loss(unet, text_encoder, scheduler, *rows).item()

    before = loss()
    train.train_unet(moments, tokens, parts, empty, 8 * SECONDS, tmp_path, CPU, batch=8)
    assert loss() < 0.9 * before  # less on a fast machine


@needs_muon
def test_a_small_vae_learns(tmp_path):
    images = data.draw_all(data.draw_scenes(8, seed=0), tmp_path / "scenes.npy", size=64, workers=1)
    torch.manual_seed(0)
    vae = networks.make_vae((8, 8, 16), size=64)

    def error() -> float:
        shown = data.to_input(images, CPU, torch.float32)
        with torch.no_grad():
            return (vae(shown).sample - shown).abs().mean().item()

    before = error()
    train.train_vae(images, 8 * SECONDS, tmp_path, CPU, batch=4, begin=vae)
    assert error() < 0.85 * before


@pytest.fixture
def small(monkeypatch):
    """A whole run trains small networks."""
    monkeypatch.setattr(train, "make_vae", lambda: networks.make_vae((8, 8, 8, 16)))
    monkeypatch.setattr(train, "make_unet", lambda: networks.make_unet(SMALL))
    monkeypatch.setattr(train, "make_text_encoder", lambda tokenizer: networks.make_text_encoder(tokenizer, width=32))


@needs_muon
def test_the_whole_run_leaves_a_folder_that_loads_and_resumes(small, tmp_path):
    given = {"scenes": 16, "vae_minutes": 0.5 * SECONDS, "seed": 0, "device": CPU, "batch": 4, "workers": 1}
    model = train.train(tmp_path, unet_minutes=0.5 * SECONDS, **given)
    made = decinb.load_pipeline(model, device="cpu")
    assert made.image_size == 128
    assert (tmp_path / "samples" / "100.png").exists() and "Captions: 8 a scene" in (model / "README.md").read_text()
    steps = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]
    used = torch.load(tmp_path / "unet.pt", weights_only=True)["seconds"]
    train.train(tmp_path, unet_minutes=(used + 0.5) * SECONDS, **given)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] > steps
    with pytest.raises(InputError, match="holds a run with"):
        train.train(tmp_path, unet_minutes=SECONDS, **{**given, "scenes": 17})
    with pytest.raises(InputError, match="vae_minutes and unet_minutes must be above 0"):
        train.train(tmp_path, unet_minutes=0, **given)


@needs_muon
def test_a_compiled_run_draws_samples_and_leaves_a_folder_that_loads(small, tmp_path, monkeypatch):
    # `aot_eager` traces forward and backward passes as the default does, and needs no compiler
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    graphs, before = torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters["stats"]["unique_graphs"]
    given = {"scenes": 8, "seed": 0, "device": CPU, "vae_batch": 2, "batch": 2, "workers": 1, "dtype": torch.float32}
    model = train.train(tmp_path, vae_minutes=SECONDS, unet_minutes=SECONDS, compiled=True, **given)
    assert graphs["unique_graphs"] - before == 3, "encoder, decoder and U-Net, each for one size"
    assert (tmp_path / "samples" / "100.png").exists() and decinb.load_pipeline(model, device="cpu").image_size == 128
    torch._dynamo.reset()


@needs_muon
def test_a_run_may_begin_with_a_model_whose_vae_and_tokenizer_it_keeps(tmp_path, tiny):
    folder = Path(decinb.MODELS["tiny"].source)
    given = {"scenes": 4, "vae_minutes": 0, "unet_minutes": SECONDS / 10, "seed": 0, "device": CPU, "batch": 2}
    model = train.train(tmp_path, begin=folder, workers=1, **given)
    made = decinb.load_pipeline(model, device="cpu")
    assert made.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    for part, changed in {"vae": False, "unet": True, "text_encoder": True}.items():
        pairs = zip(getattr(made, part).parameters(), getattr(tiny, part).parameters(), strict=True)
        assert any(not torch.equal(mine, theirs) for mine, theirs in pairs) == changed, part
