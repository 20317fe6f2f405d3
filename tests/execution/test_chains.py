"""Chains: equal to the stock calls by hand, latents passed on only between equal VAEs, replayed from their files."""

import json
from contextlib import suppress
from copy import deepcopy

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import decinb
from decinb import InputError, Link, ModelError, Stopped, SweepError, run_chain
from decinb.benchmark.counting import count_unet_calls
from decinb.checkpoints.dummies import SIZE, dummy
from decinb.execution.chains import latent_obstacle
from decinb.execution.provenance import record_key
from decinb.images import read_input, read_record, save_image
from decinb.sampling.adapters import adapter_of
from tests.helpers.sweeps import Stop, same

DAY, NIGHT, SKETCH = "a house on grass by day", "a red house on snow at night", "a pencil sketch of mountains"
QUICK = {"num_inference_steps": 4, "strength": 0.5}


@pytest.fixture(scope="module")
def image():
    return decinb.load_image("day")


@pytest.fixture(scope="module")
def text(tiny):
    pipe = decinb.load_pipeline(tiny, task="text-to-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def with_own_vae(tiny):
    """Return the same pipeline with a copy of the VAE."""
    parts = {**tiny.components, "vae": deepcopy(tiny.vae)}
    pipe = type(tiny)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(cls, pipe):
    """Return diffusers' own pipeline with the same components."""
    made = cls(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


# --- exactness ---


def test_from_text_equals_the_stock_calls_by_hand(tiny, text):
    links = [
        Link(text, DAY, num_inference_steps=3, guidance_rescale=0.5),
        Link(tiny, NIGHT, negative_prompt="trees", guidance_scale=3.0, **QUICK),
        Link(tiny, SKETCH, takes="picture", **QUICK),
    ]
    chain = run_chain(links, seed=7)
    first = stock(diffusers.StableDiffusionPipeline, tiny)
    then = stock(diffusers.StableDiffusionImg2ImgPipeline, tiny)
    generator = torch.Generator().manual_seed(7)
    shared = {"generator": generator, "output_type": "latent"}
    latents = first(DAY, num_inference_steps=3, guidance_scale=7.5, guidance_rescale=0.5, **shared).images
    state = generator.get_state()
    drawn = then(NIGHT, latents, negative_prompt="trees", guidance_scale=3.0, **QUICK, generator=generator).images[0]
    assert same(chain.images[1], drawn)
    last = then(SKETCH, drawn, **QUICK, guidance_scale=7.5, generator=generator).images[0]
    assert same(chain.images[2], last)
    assert not torch.equal(state, generator.get_state())
    shown = first.image_processor.postprocess(tiny.vae.decode(latents / tiny.vae.config.scaling_factor)[0].detach())[0]
    assert same(chain.images[0], shown)
    assert [record["chain"][-1]["takes"] for record in chain.records] == [None, "latent", "picture"]


def test_from_an_image_equals_the_stock_calls_by_hand(tiny, image):
    chain = run_chain([Link(tiny, NIGHT, **QUICK), Link(tiny, SKETCH, **QUICK)], image, seed=3)
    pipe, generator = stock(diffusers.StableDiffusionImg2ImgPipeline, tiny), torch.Generator().manual_seed(3)
    latents = pipe(NIGHT, image, **QUICK, generator=generator, output_type="latent").images
    assert same(chain.images[1], pipe(SKETCH, latents, **QUICK, generator=generator).images[0])


def test_a_scheduler_that_draws_at_each_step_uses_the_same_generator(tiny, text, monkeypatch):
    scheduler = diffusers.DDPMScheduler.from_config(tiny.scheduler.config)
    for pipe in (tiny, text):
        monkeypatch.setattr(pipe, "scheduler", scheduler)
    chain = run_chain([Link(text, DAY, num_inference_steps=3, guidance_rescale=0), Link(tiny, NIGHT, **QUICK)], seed=1)
    generator = torch.Generator().manual_seed(1)
    first, then = (
        stock(cls, tiny) for cls in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline)
    )
    latents = first(DAY, num_inference_steps=3, generator=generator, output_type="latent").images
    assert same(chain.images[1], then(NIGHT, latents, **QUICK, generator=generator).images[0])


def test_omitted_arguments_are_the_pipelines_defaults(tiny, text, image):
    chain = run_chain([Link(tiny, NIGHT, strength=0.1)], image)
    made = chain.records[0]["chain"][0]
    assert (made["guidance_scale"], made["num_inference_steps"], made["guidance_rescale"]) == (7.5, 30, None)
    with count_unet_calls(text) as count:
        made = run_chain([Link(text, DAY, num_inference_steps=2)]).records[0]["chain"][0]
    assert (made["guidance_rescale"], made["strength"], count.calls) == (0.7, None, 2)


# --- latents or images ---


def test_latents_and_images_lead_to_nearly_the_same(tiny, text):
    # At a low strength, only the loss of decoding and encoding and another draw of noise remain.
    first = Link(text, NIGHT, num_inference_steps=8)
    ways = [run_chain([first, Link(tiny, NIGHT, strength=0.1, takes=takes)]) for takes in ("latent", "picture")]
    assert same(ways[0].images[0], ways[1].images[0])
    assert 0 < decinb.mean_abs_difference(ways[0].images[1], ways[1].images[1]) < 0.03


def test_equal_vaes_pass_on_latents_and_different_ones_images(tiny, with_own_vae, image):
    links = [Link(tiny, NIGHT, **QUICK), Link(with_own_vae, SKETCH, **QUICK)]
    assert run_chain(links, image).records[1]["chain"][1]["takes"] == "latent"
    with_own_vae.vae.to(torch.float16)  # equal but for rounding
    assert latent_obstacle(adapter_of(tiny), adapter_of(with_own_vae)) is None
    with_own_vae.vae.to(torch.float32)
    with torch.no_grad():
        with_own_vae.vae.decoder.conv_out.bias += 1e-2
    assert run_chain(links, image).records[1]["chain"][1]["takes"] == "picture"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vae: vae.decoder.conv_out.bias.data.add_(1), "differ in decoder.conv_out.bias"),
        (lambda vae: vae.register_to_config(scaling_factor=0.5), "differ: scaling_factor is .* and 0.5"),
    ],
)
def test_latents_of_another_vae_are_refused_before_any_work(tiny, with_own_vae, image, change, message):
    change(with_own_vae.vae)
    links = [Link(tiny, NIGHT, **QUICK), Link(with_own_vae, SKETCH, takes="latent", **QUICK)]
    with count_unet_calls(tiny) as count, pytest.raises(InputError, match=message) as caught:
        run_chain(links, image)
    assert str(caught.value).startswith(
        "link 1: takes cannot be 'latent' from link 0: the VAEs of DeciDiffusionImg2Img"
    )
    assert str(caught.value).endswith("; 'picture' can be") and count.calls == 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast")  # diffusers, of itself
@pytest.mark.parametrize("name", ["sd-2-depth", "kandinsky-2-2", "sdxl-base"])
def test_any_pipeline_may_be_a_link(tiny, name):
    other = dummy(name)
    other.set_progress_bar_config(disable=True)
    links = [Link(one, NIGHT, num_inference_steps=2, strength=1.0) for one in (other, tiny, other)]
    chain = run_chain(links, decinb.load_image("day", size=SIZE))
    assert [link["takes"] for link in chain.records[-1]["chain"]] == ["picture"] * 3
    assert [made.size for made in chain.images] == [(SIZE, SIZE)] * 3
    with pytest.raises(InputError, match="takes cannot be 'latent' from link 0"):
        run_chain([Link(tiny, NIGHT), Link(other, NIGHT, takes="latent")], "day")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast")
@pytest.mark.parametrize("name", ["sd-2-depth", "kandinsky-2-2"])
def test_others_equal_their_own_calls_by_hand(name):
    pipe, generator = dummy(name), torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    image = decinb.load_image("day", size=SIZE)
    given = {"num_inference_steps": 2, "strength": 1.0}
    chain = run_chain([Link(pipe, NIGHT, **given), Link(pipe, DAY, **given)], image)
    size = {"height": SIZE, "width": SIZE} if name == "kandinsky-2-2" else {}
    first = pipe(NIGHT, image, **given, **size, generator=generator).images[0]
    assert same(chain.images[0], first)
    # An image passed on is rounded to 8 bits, and random weights amplify a difference of one level.
    again = pipe(DAY, chain.images[0], **given, **size, generator=generator).images[0]
    assert same(chain.images[1], again)


# --- input validation ---


@pytest.mark.parametrize(
    ("links", "image", "message"),
    [
        ([], "day", "^links must be a list of at least one decinb.Link, got \\[\\]$"),
        ("day", "day", "^links must be a list"),
        ([{"prompt": DAY}], "day", "^link 0 must be a decinb.Link\\(pipe, prompt, ...\\), got {"),
        ([("tiny", {})], "day", "^link 0: pipe must be a pipeline, as load_pipeline returns it, got 'tiny'"),
        ([("image", {})], None, "^image must be given: link 0, DeciDiffusionImg2ImgPipeline, is image to image"),
        ([("text", {})], "day", "^image must be left out: link 0, DeciDiffusionPipeline, is text to image"),
        ([("image", {}), ("text", {})], "day", "^link 1: DeciDiffusionPipeline is text to image and would ignore"),
        (
            [("text", {"strength": 0.5})],
            None,
            "^link 0: strength must be left out: DeciDiffusionPipeline, text-to-image",
        ),
        ([("text", {}), ("image", {"guidance_rescale": 0.5})], None, "^link 1: guidance_rescale must be left out"),
        ([("text", {}), ("image", {"strength": 0})], None, "^link 1: strength must be above 0 and at most 1, got 0"),
        ([("text", {}), ("image", {"strength": 0.01})], None, "^link 1: strength 0.01 of 30 steps leaves 0 steps"),
        ([("text", {"num_inference_steps": 1.5})], None, "^link 0: num_inference_steps must be an integer"),
        ([("text", {"guidance_rescale": 2})], None, "^link 0: guidance_rescale must be from 0 to 1, got 2"),
        ([("text", {"guidance_scale": "x"})], None, "^link 0: guidance_scale must be a number"),
        ([("text", {"prompt": [DAY]})], None, "^link 0: prompt must be a string, got "),
        ([("text", {"negative_prompt": 3})], None, "^link 0: negative_prompt must be a string, got 3"),
        ([("text", {"takes": "picture"})], None, "^link 0: takes must be left out, since no link comes before"),
        (
            [("image", {"takes": np.array([1, 2])})],
            "day",
            r"^link 0: takes must be left out, .*, got array\(\[1, 2\]\)$",
        ),
        ([("image", {"takes": "latent"})], "day", "^link 0: takes must be left out, since no link comes before"),
        ([("text", {}), ("image", {"takes": "pixels"})], None, "^link 1: takes must be one of latent, picture, got"),
        ([("text", {})], None, "^seed must be an integer"),
        ([("image", {})], "nowhere.png", "^image 'nowhere.png' is neither a file nor one of the samples"),
    ],
)
def test_a_bad_chain_is_refused_before_any_work(tiny, text, links, image, message, tmp_path):
    pipes = {"text": text, "image": tiny}
    made = [
        Link(pipes.get(one[0], one[0]), **{"prompt": DAY, **one[1]}) if isinstance(one, tuple) else one for one in links
    ]
    seed = -1 if "seed" in message else 0
    with count_unet_calls(tiny) as count, pytest.raises(InputError, match=message) as caught:
        run_chain(links if isinstance(links, str) else made, image, seed=seed, folder=tmp_path / "made")
    assert "\n" not in str(caught.value) and count.calls == 0 and not (tmp_path / "made").exists()


def test_an_unknown_argument_is_named(tiny):
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidence_scale'"):
        Link(tiny, DAY, guidence_scale=3)


# --- files ---


@pytest.mark.slow
def test_every_image_is_saved_and_can_be_replayed(tiny, text, image, tmp_path):
    ways = {
        "text": run_chain(
            [Link(text, DAY, num_inference_steps=2), Link(tiny, NIGHT, negative_prompt="trees", **QUICK)],
            seed=5,
            folder=tmp_path / "text",
        ),
        "image": run_chain(
            [Link(tiny, NIGHT, **QUICK), Link(tiny, SKETCH, takes="picture", **QUICK)],
            image,
            folder=tmp_path / "image",
        ),
    }
    for name, chain in ways.items():
        files = sorted((tmp_path / name).iterdir())
        assert [file.name.rpartition("_")[0] for file in files] == [
            f"link-{i}_seed-{5 * (name == 'text')}" for i in (0, 1)
        ]
        for file, made, record in zip(files, chain.images, chain.records, strict=True):
            assert decinb.mean_abs_difference(Image.open(file), made) == 0.0
            assert read_record(file) == record == json.loads(json.dumps(record))
            assert str(tmp_path) not in json.dumps(record)
            assert same(decinb.replay(file), made)
            assert same(decinb.replay(file, tiny), made)
            pipes = [text if link["task"] == "text-to-image" else tiny for link in record["chain"]]
            assert same(decinb.replay(file, pipes), made)
    assert read_input(files[1]).tobytes() == image.tobytes()


def test_replay_uses_the_scheduler_of_the_record(tiny, image, tmp_path, monkeypatch):
    other = tiny.scheduler.from_config(tiny.scheduler.config, timestep_spacing="leading")
    with monkeypatch.context() as there:
        there.setattr(tiny, "scheduler", other)
        made = run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path).images[0]
    before, file = tiny.scheduler, next(tmp_path.iterdir())
    assert same(decinb.replay(file, tiny), made) and tiny.scheduler is before
    assert not same(run_chain([Link(tiny, NIGHT, **QUICK)], image).images[0], made)


def test_different_chains_do_not_overwrite_each_other(tiny, image, tmp_path):
    for given in ({}, {"negative_prompt": "trees"}, {"guidance_scale": 3.0}):
        for seed in (0, 1):
            run_chain([Link(tiny, NIGHT, **QUICK, **given)], image, seed=seed, folder=tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(files) == 6
    run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files


def test_a_truncated_file_is_replaced(tiny, image, tmp_path):
    run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-200])
    run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path)
    assert read_record(file)["chain"]


def test_a_folder_that_cannot_be_written_to_loses_nothing(tiny, image, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written to .*the image of link 0 stays in memory"):
        chain = run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path / "file")
    assert len(chain) == 1


@pytest.mark.parametrize(
    ("top", "changed", "message"),
    [
        ({}, {"weights": "0"}, "pipe has other weights or settings than what made 'link 1 of "),
        (
            {},
            {"scheduler": "os.system"},
            "names the scheduler 'os.system', which .* cannot use",
        ),
        ({}, {"scheduler": ["x"]}, r"the record is damaged: scheduler is \['x'\]"),
        ({}, {"strength": 7}, "link 1: strength must be above 0"),
        ({}, {"takes": "code"}, "link 1: takes must be one of latent, picture"),
        ({}, {"task": "text-to-image", "strength": None}, "link 1: .* is text to image and would ignore"),
        ({}, {"task": "training"}, "task must be one of"),
        ({"seed": "x"}, {}, "seed must be an integer"),
        ({"chain": []}, {}, "chain must be a list of at least one dict"),
        ({"chain": [1]}, {}, "the record is damaged"),
        ({"chain": [{}]}, {}, "the record is damaged .*'task'"),
    ],
)
def test_replay_refuses_a_png_that_was_tampered_with(tiny, image, tmp_path, top, changed, message):
    chain = run_chain([Link(tiny, NIGHT, **QUICK), Link(tiny, DAY, **QUICK)], image)
    record = deepcopy(chain.records[1])
    record["chain"][1] |= changed
    record |= top
    save_image(chain.images[1], tmp_path / "made.png", record, image)
    with pytest.raises(InputError, match="was changed after decinb saved it: the record"):
        decinb.replay(tmp_path / "made.png", tiny)
    with suppress(KeyError, TypeError):
        record["key"] = record_key(record)
    save_image(chain.images[1], tmp_path / "made.png", record, image)
    with pytest.raises(InputError, match=message):
        decinb.replay(tmp_path / "made.png", tiny)


def test_replay_downloads_no_model(tiny, image, tmp_path):
    chain = run_chain([Link(tiny, NIGHT, **QUICK), Link(tiny, DAY, **QUICK)], image)
    chain.records[1]["chain"][1]["model"] = "someone/else"
    save_image(chain.images[1], tmp_path / "made.png", chain.records[1], image)
    with pytest.raises(InputError, match="made by 'someone/else'.*give the pipeline"):
        decinb.replay(tmp_path / "made.png")
    with pytest.raises(InputError, match="one for each of the 2 links"):
        decinb.replay(tmp_path / "made.png", [tiny])
    assert same(decinb.replay(tmp_path / "made.png", tiny), chain.images[1])


# --- interruptions and errors ---


def test_stopping_keeps_what_is_done_and_ends_the_cell(tiny, image, tmp_path):
    links = [Link(tiny, NIGHT, **QUICK), Link(tiny, DAY, **QUICK)]
    with (
        Stop(tiny, 3, KeyboardInterrupt()),
        pytest.raises(Stopped, match="1 of 2 links are done and saved in .*sys.last_value.done holds them") as caught,
    ):
        run_chain(links, image, folder=tmp_path)
    assert len(caught.value.done) == 1 == len(list(tmp_path.iterdir()))


def test_an_error_names_its_link(tiny, image):
    message = r"^link 1 failed: RuntimeError: broken; 1 of 2 links are done and are in this error's `chain`$"
    with Stop(tiny, 3, RuntimeError("broken")), pytest.raises(SweepError, match=message) as caught:
        run_chain([Link(tiny, NIGHT, **QUICK), Link(tiny, DAY, **QUICK)], image)
    assert caught.value.__cause__.__notes__ == ["in link 1 of the chain"]


def test_a_scheduler_that_a_pipeline_cannot_use_fails_as_in_a_sweep(tiny, image, tmp_path):
    other = stock(diffusers.LatentConsistencyModelImg2ImgPipeline, tiny)  # DDIM takes no original_inference_steps
    with pytest.raises(SweepError, match="^cell 0 .* failed: .*original_inference_steps"):
        decinb.run_sweep(other, image, DAY, [QUICK], progress=False)
    with pytest.raises(
        SweepError, match="^link 1 failed: .*original_inference_steps'; 1 of 2 links are done"
    ) as caught:
        run_chain([Link(tiny, NIGHT, **QUICK), Link(other, DAY, **QUICK)], image, folder=tmp_path)
    assert caught.value.chain is caught.value.sweep and len(caught.value.chain) == 1 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("of_decinb", [True, False])
def test_a_link_that_returns_nan_is_named(tiny, image, tmp_path, of_decinb):
    pipe = tiny if of_decinb else stock(diffusers.StableDiffusionImg2ImgPipeline, tiny)
    calls = []

    def poison(module, args, output):
        calls.append(1)
        if len(calls) > 2:
            output[0].fill_(float("nan"))

    hook = tiny.unet.register_forward_hook(poison)
    try:
        with pytest.raises(ModelError, match="^link 1: no image was made: the .* gave NaN or infinity") as caught:
            run_chain([Link(pipe, NIGHT, **QUICK), Link(pipe, DAY, **QUICK)], image, folder=tmp_path)
    finally:
        hook.remove()
    assert len(caught.value.chain) == 1, "the error holds what was finished"
    assert len(list(tmp_path.iterdir())) == 1


# --- display ---


def test_a_chain_is_plotted(tiny, text, image, tmp_path):
    chain = run_chain([Link(text, DAY, num_inference_steps=2), Link(tiny, "a painting of " * 9, **QUICK)])
    chain.plot(file=tmp_path / "text.png")
    run_chain([Link(tiny, NIGHT, **QUICK)], image).plot(file=tmp_path / "image.png")
    widths = [Image.open(tmp_path / f"{name}.png").width for name in ("text", "image")]
    assert widths[0] == widths[1] > np.asarray(image).shape[1], "two images each"
    with pytest.raises(InputError, match="no finished link"):
        decinb.Chain().plot()


@pytest.mark.parametrize("of_decinb", [True, False])
def test_a_truncated_prompt_is_warned_of_once(tiny, image, capfd, of_decinb):
    pipe = tiny if of_decinb else stock(diffusers.StableDiffusionImg2ImgPipeline, tiny)
    with pytest.warns(UserWarning, match="prompt is too long for the text encoder") as caught:
        run_chain([Link(pipe, "a red house and " * 20, **QUICK)], image)
    assert len(caught) == 1
    assert "truncated" not in capfd.readouterr().err
