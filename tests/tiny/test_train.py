"""The training recipe at toy size: it learns, it is killed, it goes on, and it leaves a folder that loads."""

import json
import random

import pytest
import torch

import decinb
from decinb import InputError, named_attributes
from decinb.scenes.scenes import caption, differing, random_scene
from decinb.tiny import networks, train
from decinb.tiny.stage import Stage

CPU = torch.device("cpu")
SECONDS = 1 / 60  # of a minute
LATENT_ROUNDING = 1e-4  # float32 sums in another order


def quadratic(folder, minutes, watch=None):
    """A stage that brings one weight from 0 to 3."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    stage = Stage("toy", {"toy": module}, minutes, 0.05, folder, CPU, average=0.9)
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
    vae = networks.make_vae().eval()
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
    tokenizer = networks.make_tokenizer(tmp_path)
    rng = random.Random(99)
    for _ in range(50):
        said = caption(random_scene(rng), rng)
        ids = tokenizer(said).input_ids
        assert len(ids) <= networks.TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == said
    assert tokenizer.decode(tokenizer("Häuschen 漢字 🙂").input_ids, skip_special_tokens=True) == "häuschen 漢字 🙂"


def test_each_second_scene_is_the_twin_of_the_one_before_it():
    scenes = train.draw_scenes(50, seed=3)
    assert len(scenes) == 100 and scenes == train.draw_scenes(50, seed=3) != train.draw_scenes(50, seed=4)
    for scene, other in zip(scenes[::2], scenes[1::2], strict=True):
        assert scene.layout == other.layout and differing(scene, other)


def test_an_edit_begun_in_much_noise_obeys_its_words_and_one_begun_in_little_keeps_what_it_sees():
    scenes, rng, steps = train.draw_scenes(100, seed=0), random.Random(0), 1000
    lessons = [train.Lesson.draw(scenes, rng, steps) for _ in range(3000)]
    edits = [lesson for lesson in lessons if lesson.target != lesson.seen]
    disobeyed = 0
    for lesson in lessons:
        target, seen, said = scenes[lesson.target], scenes[lesson.seen], named_attributes(lesson.words)
        obeyed = said.items() <= target.visible().items()
        assert lesson.timestep <= lesson.start < steps
        assert lesson.target in (lesson.seen, lesson.seen ^ 1)
        if lesson.start < train.EDIT_THRESHOLD[0]:
            assert lesson.target == lesson.seen
            disobeyed += not obeyed
        elif lesson.start > train.EDIT_THRESHOLD[1]:
            assert obeyed
        if lesson.target != lesson.seen and lesson.words:
            assert said.keys() >= differing(target, seen) & target.visible().keys(), "the words say what changes"
    assert len(edits) > 600 and disobeyed > 40  # of some 1,300 lessons that are no plain diffusion, few begin so low
    assert 200 < sum(not lesson.words for lesson in lessons) < 400  # a tenth, for guidance


def test_the_whole_recipe_leaves_a_folder_that_loads_and_may_be_run_again(tmp_path):
    given = {"places": 16, "vae_minutes": 1 * SECONDS, "seed": 0, "device": CPU}
    model = train.train(tmp_path, unet_minutes=1 * SECONDS, **given)
    made = decinb.load_pipeline(model, device="cpu")
    assert made.image_size == 128
    steps = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]
    used = torch.load(tmp_path / "unet.pt", weights_only=True)["seconds"]
    train.train(tmp_path, unet_minutes=(used + 1) * SECONDS, **given)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] > steps
    with pytest.raises(InputError, match="holds a run with"):
        train.train(tmp_path, unet_minutes=1 * SECONDS, **{**given, "places": 17})


def test_a_run_may_begin_with_a_model_whose_vae_and_tokenizer_it_keeps(tmp_path, tiny):
    folder = decinb.MODELS["tiny"].source
    model = train.train(tmp_path, places=8, vae_minutes=0, unet_minutes=1 * SECONDS, seed=0, device=CPU, begin=folder)
    made = decinb.load_pipeline(model, device="cpu")
    assert made.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    for part, changed in {"vae": False, "unet": True, "text_encoder": True}.items():
        pairs = zip(getattr(made, part).parameters(), getattr(tiny, part).parameters(), strict=True)
        assert any(not torch.equal(mine, theirs) for mine, theirs in pairs) == changed, part


def test_a_smaller_model_is_trained_watched_and_loaded_as_the_large_one_is(tmp_path):
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
    pictures = train.draw_all(scenes, tmp_path / "scenes.npy", size=64)
    assert pictures.shape == (16, 3, 64, 64)
    given = {"minutes": 1 * SECONDS, "folder": tmp_path, "device": CPU, "dtype": torch.float32}
    vae = train.train_vae(pictures, begin=networks.make_vae((8, 8, 16), size=64), **given)
    tokenizer = networks.make_tokenizer(tmp_path / "tokenizer")
    seen = []

    def watch(unet, text_encoder, progress):
        again = [train.sample(vae, text_encoder, tokenizer, unet, ["a red house", "snow"], steps=2) for _ in range(2)]
        assert [image.tobytes() for image in again[0]] == [image.tobytes() for image in again[1]]
        seen.append((progress, [image.size for image in again[0]]))

    moments = train.encode(vae, pictures, CPU)
    parts = networks.make_unet(table), networks.make_text_encoder(tokenizer, width=32)
    unet, text_encoder = train.train_unet(scenes, moments, tokenizer, batch=4, begin=parts, watch=watch, **given)
    assert seen == [(1.0, [(64, 64), (64, 64)])]
    made = decinb.load_pipeline(train.save(tmp_path / "model", vae, text_encoder, tokenizer, unet), device="cpu")
    assert made.image_size == 64 and made.unet.config.configurations == table
