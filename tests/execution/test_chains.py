"""Chains: equal to the stock calls by hand, latents handed on only where that is right, made again from their files."""

import json
from copy import deepcopy

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import decinb
from decinb import InputError, Link, ModelError, run_chain
from decinb.benchmark.counting import count_unet_calls
from decinb.checkpoints.dummies import SIZE, dummy
from decinb.images import read_input, read_record, save_image
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
def elsewhere(tiny):
    """The same pipeline with a VAE of its own."""
    parts = {**tiny.components, "vae": deepcopy(tiny.vae)}
    pipe = type(tiny)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(cls, pipe):
    """diffusers' own pipeline of the same parts."""
    made = cls(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


# --- exactness ---


def test_from_words_equals_the_stock_calls_by_hand(tiny, text):
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


def test_from_a_picture_equals_the_stock_calls_by_hand(tiny, image):
    chain = run_chain([Link(tiny, NIGHT, **QUICK), Link(tiny, SKETCH, **QUICK)], image, seed=3)
    pipe, generator = stock(diffusers.StableDiffusionImg2ImgPipeline, tiny), torch.Generator().manual_seed(3)
    latents = pipe(NIGHT, image, **QUICK, generator=generator, output_type="latent").images
    assert same(chain.images[1], pipe(SKETCH, latents, **QUICK, generator=generator).images[0])


def test_a_scheduler_that_draws_at_each_step_draws_from_the_same_generator(tiny, text, monkeypatch):
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


def test_what_is_left_out_is_the_pipelines_own(tiny, text, image):
    chain = run_chain([Link(tiny, NIGHT, strength=0.1)], image)
    made = chain.records[0]["chain"][0]
    assert (made["guidance_scale"], made["num_inference_steps"], made["guidance_rescale"]) == (7.5, 30, None)
    with count_unet_calls(text) as count:
        made = run_chain([Link(text, DAY, num_inference_steps=2)]).records[0]["chain"][0]
    assert (made["guidance_rescale"], made["strength"], count.calls) == (0.7, None, 2)


# --- handing on ---


def test_latents_and_pictures_lead_to_nearly_the_same(tiny, text):
    # At a low strength what is left is the loss of decoding and encoding, and another draw of noise.
    first = Link(text, NIGHT, num_inference_steps=8)
    ways = [run_chain([first, Link(tiny, NIGHT, strength=0.1, takes=takes)]) for takes in ("latent", "picture")]
    assert same(ways[0].images[0], ways[1].images[0])
    assert 0 < decinb.mean_abs_difference(ways[0].images[1], ways[1].images[1]) < 0.03


def test_equal_vaes_hand_latents_on_and_others_pictures(tiny, elsewhere, image):
    links = [Link(tiny, NIGHT, **QUICK), Link(elsewhere, SKETCH, **QUICK)]
    assert run_chain(links, image).records[1]["chain"][1]["takes"] == "latent"
    elsewhere.vae.to(torch.float16)  # the same numbers, but for their rounding
    assert decinb.execution.chains._apart(tiny, elsewhere) is None
    elsewhere.vae.to(torch.float32)
    with torch.no_grad():
        elsewhere.vae.decoder.conv_out.bias += 1e-2
    assert run_chain(links, image).records[1]["chain"][1]["takes"] == "picture"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vae: vae.decoder.conv_out.bias.data.add_(1), "differ: decoder.conv_out.bias is another"),
        (lambda vae: vae.register_to_config(scaling_factor=0.5), "differ: scaling_factor is .* and 0.5"),
    ],
)
def test_latents_of_another_vae_are_refused_before_any_work(tiny, elsewhere, image, change, message):
    change(elsewhere.vae)
    links = [Link(tiny, NIGHT, **QUICK), Link(elsewhere, SKETCH, takes="latent", **QUICK)]
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
    # A picture handed on is rounded to 8 bits, and one level may be another: random weights make more of it.
    again = pipe(DAY, chain.images[0], **given, **size, generator=generator).images[0]
    assert same(chain.images[1], again)


# --- the door ---


@pytest.mark.parametrize(
    ("links", "image", "message"),
    [
        ([], "day", "^links must be a list of at least one decinb.Link, got \\[\\]$"),
        ("day", "day", "^links must be a list"),
        ([{"prompt": DAY}], "day", "^link 0 must be a decinb.Link\\(pipe, prompt, ...\\), got {"),
        ([("tiny", {})], "day", "^link 0: pipe must be a pipeline, as load_pipeline gives it, got 'tiny'"),
        ([("image", {})], None, "^image must be given: link 0, DeciDiffusionImg2ImgPipeline, is image to image"),
        ([("text", {})], "day", "^image must be left out: link 0, DeciDiffusionPipeline, is text to image"),
        ([("image", {}), ("text", {})], "day", "^link 1: DeciDiffusionPipeline is text to image, which would forget"),
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
        ([("text", {"takes": "picture"})], None, "^link 0: takes must be left out, since nothing came before"),
        ([("image", {"takes": "latent"})], "day", "^link 0: takes must be left out, since nothing came before"),
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


def test_every_picture_is_on_disk_and_makes_itself_again(tiny, text, image, tmp_path):
    ways = {
        "words": run_chain(
            [Link(text, DAY, num_inference_steps=2), Link(tiny, NIGHT, negative_prompt="trees", **QUICK)],
            seed=5,
            folder=tmp_path / "words",
        ),
        "picture": run_chain(
            [Link(tiny, NIGHT, **QUICK), Link(tiny, SKETCH, takes="picture", **QUICK)],
            image,
            folder=tmp_path / "picture",
        ),
    }
    for name, chain in ways.items():
        files = sorted((tmp_path / name).iterdir())
        assert [file.name.rpartition("_")[0] for file in files] == [
            f"link-{i}_seed-{5 * (name == 'words')}" for i in (0, 1)
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


def test_a_chain_is_made_again_with_the_scheduler_it_had(tiny, image, tmp_path, monkeypatch):
    other = tiny.scheduler.from_config(tiny.scheduler.config, timestep_spacing="leading")
    with monkeypatch.context() as there:
        there.setattr(tiny, "scheduler", other)
        made = run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path).images[0]
    before, file = tiny.scheduler, next(tmp_path.iterdir())
    assert same(decinb.replay(file, tiny), made) and tiny.scheduler is before
    assert not same(run_chain([Link(tiny, NIGHT, **QUICK)], image).images[0], made)


def test_nothing_is_overwritten_by_another(tiny, image, tmp_path):
    for given in ({}, {"negative_prompt": "trees"}, {"guidance_scale": 3.0}):
        for seed in (0, 1):
            run_chain([Link(tiny, NIGHT, **QUICK, **given)], image, seed=seed, folder=tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(files) == 6
    run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files


def test_a_cut_file_is_written_anew(tiny, image, tmp_path):
    run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-200])
    run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path)
    assert read_record(file)["chain"]


def test_a_folder_that_cannot_be_written_to_loses_nothing(tiny, image, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written to .*the picture of link 0 stays in memory"):
        chain = run_chain([Link(tiny, NIGHT, **QUICK)], image, folder=tmp_path / "file")
    assert len(chain) == 1


@pytest.mark.parametrize(
    ("top", "changed", "message"),
    [
        ({}, {"weights": "0"}, "pipe has other weights than those that made 'link 1 of "),
        ({}, {"scheduler": "os.system"}, "names the scheduler 'os.system', which this pipeline cannot have"),
        ({}, {"scheduler": ["x"]}, "names the scheduler .*, which this pipeline cannot have"),
        ({}, {"strength": 7}, "link 1: strength must be above 0"),
        ({}, {"takes": "code"}, "link 1: takes must be one of latent, picture"),
        ({}, {"task": "text-to-image", "strength": None}, "link 1: .* is text to image, which would forget"),
        ({}, {"task": "training"}, "task must be one of"),
        ({"seed": "x"}, {}, "seed must be an integer"),
        ({"chain": []}, {}, "tells of no chain"),
        ({"chain": [1]}, {}, "tells of no chain"),
        ({"chain": [{}]}, {}, "unknown argument 'task'"),
    ],
)
def test_a_png_that_was_tampered_with_is_refused(tiny, image, tmp_path, top, changed, message):
    chain = run_chain([Link(tiny, NIGHT, **QUICK), Link(tiny, DAY, **QUICK)], image)
    record = deepcopy(chain.records[1])
    record["chain"][1] |= changed
    save_image(chain.images[1], tmp_path / "made.png", record | top, image)
    with pytest.raises(InputError, match=message):
        decinb.replay(tmp_path / "made.png", tiny)


def test_a_png_fetches_no_model(tiny, image, tmp_path):
    chain = run_chain([Link(tiny, NIGHT, **QUICK), Link(tiny, DAY, **QUICK)], image)
    chain.records[1]["chain"][1]["model"] = "someone/else"
    save_image(chain.images[1], tmp_path / "made.png", chain.records[1], image)
    with pytest.raises(InputError, match="made by 'someone/else'.*give its pipe"):
        decinb.replay(tmp_path / "made.png")
    with pytest.raises(InputError, match="one for each of the 2 links"):
        decinb.replay(tmp_path / "made.png", [tiny])
    assert same(decinb.replay(tmp_path / "made.png", tiny), chain.images[1])


# --- when something goes wrong ---


def test_stopping_keeps_and_returns_what_is_done(tiny, image, tmp_path, capsys):
    links = [Link(tiny, NIGHT, **QUICK), Link(tiny, DAY, **QUICK)]
    with Stop(tiny, 3, KeyboardInterrupt()):
        chain = run_chain(links, image, folder=tmp_path)
    assert len(chain) == 1 == len(list(tmp_path.iterdir()))
    assert "1 of 2 links are done" in capsys.readouterr().out


def test_a_fault_names_its_link(tiny, image):
    with Stop(tiny, 3, RuntimeError("a loose wire")), pytest.raises(RuntimeError, match="a loose wire") as caught:
        run_chain([Link(tiny, NIGHT, **QUICK), Link(tiny, DAY, **QUICK)], image)
    assert caught.value.__notes__ == ["in link 1 of the chain"]


@pytest.mark.parametrize("of_decinb", [True, False])
def test_a_link_that_turns_to_nan_is_named(tiny, image, tmp_path, of_decinb):
    pipe = tiny if of_decinb else stock(diffusers.StableDiffusionImg2ImgPipeline, tiny)
    calls = []

    def poison(module, args, output):
        calls.append(1)
        if len(calls) > 2:
            output[0].fill_(float("nan"))

    hook = tiny.unet.register_forward_hook(poison)
    try:
        with pytest.raises(
            ModelError, match="^link 1: no (picture|image) was made, only NaN or infinity, by the "
        ) as caught:
            run_chain([Link(pipe, NIGHT, **QUICK), Link(pipe, DAY, **QUICK)], image, folder=tmp_path)
    finally:
        hook.remove()
    assert len(caught.value.chain) == 1, "what was finished is in the error"
    assert len(list(tmp_path.iterdir())) == 1


# --- to be seen ---


def test_a_chain_is_drawn(tiny, text, image, tmp_path):
    chain = run_chain([Link(text, DAY, num_inference_steps=2), Link(tiny, "a painting of " * 9, **QUICK)])
    chain.plot(file=tmp_path / "words.png")
    run_chain([Link(tiny, NIGHT, **QUICK)], image).plot(file=tmp_path / "picture.png")
    widths = [Image.open(tmp_path / f"{name}.png").width for name in ("words", "picture")]
    assert widths[0] == widths[1] > np.asarray(image).shape[1], "two pictures each: the second with its input"
    with pytest.raises(InputError, match="no finished link"):
        decinb.Chain().plot()


@pytest.mark.parametrize("of_decinb", [True, False])
def test_a_prompt_that_is_cut_off_is_told_once(tiny, image, capfd, of_decinb):
    pipe = tiny if of_decinb else stock(diffusers.StableDiffusionImg2ImgPipeline, tiny)
    with pytest.warns(UserWarning, match="prompt is too long for the text encoder") as caught:
        run_chain([Link(pipe, "a red house and " * 20, **QUICK)], image)
    assert len(caught) == 1
    assert "truncated" not in capfd.readouterr().err
