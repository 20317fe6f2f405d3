"""Folders and files that a stranger made: each is refused in one line, or read at a bounded cost.

Nothing is fetched, written or run, whatever they say. ``make fuzz`` tries many more random changes than ``make test``.
"""

import json
import os
import random
import shutil
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import decinb
from decinb.checkpoints.dummies import dummy
from decinb.execution.provenance import image_hash, record_key
from decinb.images import INPUT, OUTPUT_HASH, RECORD, save_image
from decinb.utils.quiet import quiet
from tests.helpers.fake_hub import FORMAT, as_pickle, weights, write_json
from tests.helpers.fuzz import EXAMPLES
from tests.helpers.jail import Jail, check

MODELS, RECORDS = max(12, EXAMPLES // 10), max(24, EXAMPLES // 5)
MODEL_MB = 60  # the weights of the models below, and what loading them takes


@pytest.fixture(scope="module")
def jail():
    with Jail() as process:
        yield process


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tiny, tmp_path_factory) -> Path:
    """The folder of a small Stable Diffusion."""
    folder = tmp_path_factory.mktemp("template") / "model"
    text = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer),
        max_position_embeddings=tiny.tokenizer.model_max_length,
        eos_token_id=tiny.tokenizer.eos_token_id,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    blocks = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    with quiet():
        StableDiffusionImg2ImgPipeline(
            vae=AutoencoderKL(block_out_channels=(32, 32), down_block_types=blocks[0], up_block_types=blocks[1]),
            text_encoder=CLIPTextModel(text),
            tokenizer=tiny.tokenizer,
            unet=UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=16,
            ),
            scheduler=tiny.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


@pytest.fixture
def model(template, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(template, tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def pipe_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link_at(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def with_code(folder: Path) -> None:
    (folder / "decoy.py").write_text("raise SystemExit\n")
    (folder / "unet" / "decoy.py").write_text("raise SystemExit\n")


def header(file: Path, text: str | bytes, length: int | None = None) -> None:
    text = text.encode() if isinstance(text, str) else text
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64))


def retyped(file: Path, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, FORMAT)


U, V, T, K, S = (
    f"{name}.json"
    for name in (
        "unet/config",
        "vae/config",
        "text_encoder/config",
        "tokenizer/tokenizer_config",
        "scheduler/scheduler_config",
    )
)

MODEL_ATTACKS = {
    "nothing": lambda f: None,
    "vocabulary": lambda f: change(f / T, vocab_size=10**7),
    "hidden size": lambda f: change(f / T, hidden_size=10**5),
    "positions": lambda f: change(f / T, max_position_embeddings=10**9),
    "text layers": lambda f: change(f / T, num_hidden_layers=20_000),
    "negative layers": lambda f: change(f / T, num_hidden_layers=-1),
    "unet layers": lambda f: change(f / U, layers_per_block=10**6),
    "transformer layers": lambda f: change(f / U, transformer_layers_per_block=10**6),
    "unet blocks": lambda f: change(f / U, block_out_channels=[32] * 10**4, down_block_types=["DownBlock2D"] * 10**4),
    "unet channels": lambda f: change(f / U, block_out_channels=[10**6, 10**6]),
    "unet heads": lambda f: change(f / U, attention_head_dim=10**9),
    "class embedding": lambda f: change(f / U, num_class_embeds=10**9),
    "vae channels": lambda f: change(f / V, block_out_channels=[10**6] * 2),
    "vae levels": lambda f: change(f / V, block_out_channels=[32] * 40),
    "sample size": lambda f: change(f / V, sample_size=10**9),
    "timesteps": lambda f: change(f / S, num_train_timesteps=3 * 10**8),
    "cosine timesteps": lambda f: change(f / S, num_train_timesteps=3 * 10**7, beta_schedule="squaredcos_cap_v2"),
    "huge integer": lambda f: change(f / S, num_train_timesteps=10**400),
    "infinite betas": lambda f: (f / S).write_text('{"beta_start": -Infinity, "beta_end": NaN}'),
    "scheduler class": lambda f: change(f / S, _class_name="UNet2DConditionModel"),
    "token length": lambda f: change(f / K, model_max_length="x"),
    "tokenizer class": lambda f: change(
        f / K, tokenizer_class="../../decoy", auto_map={"AutoTokenizer": ["decoy.D", None]}
    ),
    "charsmap": lambda f: change(
        f / "tokenizer/tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "added tokens": lambda f: change(f / "tokenizer/tokenizer.json", added_tokens=[{"id": 10**9, "content": "x"}]),
    "deep tokenizer": lambda f: (f / "tokenizer/tokenizer.json").write_text("[" * 10**6),
    "deep index": lambda f: (f / "model_index.json").write_text('{"a":' * 10**5),
    "deep configuration": lambda f: (f / U).write_text("[" * 10**6),
    "large configuration": lambda f: (f / U).write_text("[" + "[]," * 3 * 10**6 + "[]]"),
    "list": lambda f: (f / U).write_text("[]"),
    "not utf-8": lambda f: (f / U).write_bytes(b"\xff\xfe{}"),
    "sparse index": lambda f: sparse(f / "model_index.json", 2**33),
    "sparse configuration": lambda f: sparse(f / T, 2**33, b"{"),
    "sparse tokenizer": lambda f: sparse(f / "tokenizer/tokenizer.json", 2**33),
    "sparse weights": lambda f: sparse(weights(f, "vae"), 2**33),
    "sparse header": lambda f: sparse(weights(f, "vae"), 2**31 + 8, (2**31).to_bytes(8, "little") + b"{"),
    "pipe": lambda f: pipe_at(weights(f, "unet")),
    "pipe as configuration": lambda f: pipe_at(f / V),
    "pipe beside": lambda f: pipe_at(f / "tokenizer" / "special_tokens_map.json"),
    "device": lambda f: link_at(weights(f, "unet"), "/dev/zero"),
    "device as index": lambda f: link_at(f / "model_index.json", "/dev/zero"),
    "link to itself": lambda f: link_at(f / V, "config.json"),
    "link to a secret": lambda f: link_at(f / V, "/etc/passwd"),
    "shards elsewhere": lambda f: write_json(
        f / "unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": "../../../../etc/passwd"}}
    ),
    "int8": lambda f: retyped(weights(f, "unet"), torch.int8),
    "int64": lambda f: retyped(weights(f, "text_encoder"), torch.int64),
    "bool": lambda f: retyped(weights(f, "vae"), torch.bool),
    "null offsets": lambda f: header(weights(f, "vae"), '{"a":{"dtype":"F32","shape":[1],"data_offsets":null}}'),
    "null offset": lambda f: header(weights(f, "vae"), '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,null]}}'),
    "huge shape": lambda f: header(
        weights(f, "vae"), '{"a":{"dtype":"F32","shape":[9999999999,9999999999],"data_offsets":[0,4]}}'
    ),
    "deep header": lambda f: header(weights(f, "vae"), "[" * 10**6),
    "long header": lambda f: header(weights(f, "vae"), b"{}", 2**63),
    "code in the index": lambda f: (with_code(f), change(f / "model_index.json", unet=["decoy", "Decoy"])),
    "code in a class": lambda f: (
        with_code(f),
        change(f / U, _class_name="Decoy", auto_map={"AutoModel": "decoy.Decoy"}),
    ),
    "pipeline class": lambda f: (with_code(f), change(f / "model_index.json", _class_name=["decoy", "Decoy"])),
    "path as a component": lambda f: change(f / "model_index.json", **{"../../vae": ["diffusers", "AutoencoderKL"]}),
    "text as a component": lambda f: change(f / "model_index.json", vae="x", safety_checker="x"),
    "attention kernel": lambda f: change(f / T, _attn_implementation="acme/kernel"),
    "internal attention kernel": lambda f: change(f / T, _attn_implementation_internal="acme/kernel"),
    "nested attention kernel": lambda f: change(f / T, attn_implementation={"": "acme/kernel"}),
    "experts kernel": lambda f: change(f / T, experts_implementation="acme/kernel"),
    "flash attention": lambda f: change(f / T, attn_implementation="flash_attention_2"),
    "fp8": lambda f: change(f / T, quantization_config={"quant_method": "fp8", "weight_block_size": [1, 1]}),
    "bitsandbytes": lambda f: change(f / U, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "adapter": lambda f: write_json(f / "text_encoder/adapter_config.json", {"base_model_name_or_path": "acme/base"}),
    "pickle": lambda f: as_pickle(f, "unet"),
    "labels": lambda f: change(f / T, num_labels=5 * 10**6),
    "configuration elsewhere": lambda f: (
        change(f / T, configuration_files=["config.4.0.0.json"]),
        write_json(f / "text_encoder/config.4.0.0.json", {"attn_implementation": "acme/kernel"}),
    ),
    "tokenizer elsewhere": lambda f: change(f / K, fast_tokenizer_files=["../../../outside/tokenizer.4.0.0.json"]),
    "special tokens": lambda f: change(f / K, extra_special_tokens=[f"<{i}>" for i in range(20_000)]),
    "special tokens map": lambda f: (f / "tokenizer/special_tokens_map.json").write_text("[" + "{}," * 10**6 + "{}]"),
    "tokenizer of bytes": lambda f: (
        change(f / "model_index.json", tokenizer=["transformers", "ByT5Tokenizer"]),
        change(f / K, extra_ids=20_000),
    ),
    "sparse template": lambda f: (
        (f / "tokenizer/additional_chat_templates").mkdir(),
        sparse(f / "tokenizer/additional_chat_templates/x.jinja", 2**33),
    ),
    "feature extractor for sound": lambda f: (
        change(f / "model_index.json", feature_extractor=["transformers", "WhisperFeatureExtractor"]),
        (f / "feature_extractor").mkdir(),
        write_json(f / "feature_extractor/preprocessor_config.json", {"feature_size": 20_000, "n_fft": 20_000}),
    ),
    "processor with code": lambda f: (
        with_code(f),
        change(f / "model_index.json", feature_extractor=["transformers", "CLIPProcessor"]),
        shutil.copytree(f / "tokenizer", f / "feature_extractor"),
        change(f / "feature_extractor/tokenizer_config.json", auto_map={"AutoTokenizer": ["decoy.D", "decoy.D"]}),
        write_json(f / "feature_extractor/preprocessor_config.json", {}),
    ),
    "layers of another encoder": lambda f: (
        change(f / "model_index.json", text_encoder=["transformers", "Qwen2Model"]),
        change(f / T, num_hidden_layers=3 * 10**7),
    ),
    "tables": lambda f: (
        change(f / "model_index.json", unet=["diffusers", "Lumina2Transformer2DModel"]),
        write_json(f / U, {"_class_name": "Lumina2Transformer2DModel", "axes_lens": [2 * 10**7, 8, 8]}),
    ),
    "empty tensors": lambda f: header(
        weights(f, "vae"),
        json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(140_000)}),
    ),
    "other name": lambda f: change(f / T, _name_or_path="acme/other", base_model_name_or_path="acme/other"),
}


CASES = {
    "H1": ("vocabulary", "text layers", "unet layers", "vae levels", "timesteps", "sparse header"),
    "H2": (
        *("code in the index", "attention kernel", "adapter", "shards elsewhere"),
        *("configuration elsewhere", "tokenizer elsewhere", "processor with code"),
    ),
    "H3": ("int8", "int64", "bool", "fp8"),
}


@pytest.mark.parametrize("attack", MODEL_ATTACKS)
def test_a_models_folder_costs_no_more_than_its_weights(jail, model, happened, attack):
    MODEL_ATTACKS[attack](model)
    answer = jail.ask("load", model)
    message = check(answer, MODEL_MB)
    for case, attacks in CASES.items():
        if attack in attacks:
            assert answer["error"] == "ModelError"
            happened(case, message)


def test_a_depth_estimators_backbone_is_not_looked_up(jail, tmp_path):
    with quiet():
        dummy("sd-2-depth").save_pretrained(tmp_path / "model")
    for changes in (
        {"backbone": "acme/other", "backbone_config": None},
        {"backbone": "acme/other", "use_timm_backbone": True, "use_pretrained_backbone": True},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"}},
    ):
        change(tmp_path / "model" / "depth_estimator" / "config.json", **changes)
        answer = jail.ask("load", tmp_path / "model")
        check(answer, MODEL_MB)
        assert answer["error"] == "ModelError"


HOSTILE_VALUES = (
    *(None, True, False, -1, 0, 1, 2, 3, 1.5, 10**5 + 1, 3 * 10**7, 10**12, 10**400, -(10**9)),
    *("", "x", "../../etc/passwd", "http://127.0.0.1:9/x", "acme/other", "\ud800", "a\0b", "x" * 10**5),
    *([], {}, [[]] * 1000, [10**9] * 4, {"a": {"b": 10**12}}, ["decoy", "Decoy"], float("nan"), float("inf")),
)
HOSTILE_KEYS = (
    *("auto_map", "backbone", "_class_name", "_name_or_path", "architectures", "quantization_config", "torch_dtype"),
    *("attn_implementation", "use_timm_backbone", "trust_remote_code", "custom_pipeline", "model_type", "num_layers"),
    *("tokenizer_class", "norm_num_groups", "act_fn", "num_train_timesteps", "trained_betas", "timestep_spacing"),
)


def mutate(value: Any, chance: random.Random) -> Any:
    """Return a JSON value with one entry, at any depth, replaced, removed or added."""
    places = []

    def walk(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(min(len(inner), 50)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                walk(inner[key])

    walk(value)
    inner, key = chance.choice(places) if places else (value, None)
    match chance.choice(["replace", "replace", "replace", "remove", "add"]):
        case "replace" if places:
            inner[key] = chance.choice(HOSTILE_VALUES)
        case "remove" if places:
            del inner[key]
        case _ if isinstance(value, dict):
            value[chance.choice(HOSTILE_KEYS)] = chance.choice(HOSTILE_VALUES)
    return value


def damage_weights(file: Path, chance: random.Random) -> None:
    """Change some bytes of a safetensors file, most of them in its header."""
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(min(end, len(data)) if chance.random() < 0.8 else len(data))
        data[at] = chance.choice([0, 255, *b'{}[]",:0123456789'])
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)) :]
    file.write_bytes(data)


@pytest.mark.parametrize("batch", range(4))
def test_random_changes_of_a_models_folder(jail, template, tmp_path, batch):
    for example in range(batch, MODELS, 4):
        chance = random.Random(example)
        folder = Path(shutil.copytree(template, tmp_path / str(example)))
        for _ in range(chance.randint(1, 3)):
            file = chance.choice(sorted([*folder.rglob("*.json"), *folder.rglob("*.safetensors")]))
            if file.suffix == ".json":
                file.write_text(json.dumps(mutate(json.loads(file.read_text()), chance)))
            else:
                damage_weights(file, chance)
        check(jail.ask("load", folder), MODEL_MB)
        shutil.rmtree(folder)


# --- PNGs with records ------------------------------------------------------------------------------------------------

SMALL = Image.new("RGB", (64, 64), "teal")


@pytest.fixture(scope="module")
def record(tiny) -> dict:
    """The record of an image that takes one step."""
    cells = [{"strength": 1.0, "num_inference_steps": 1, "guidance_scale": 1.0}]
    return decinb.run_sweep(tiny, SMALL, "a house", cells, progress=False).records[0]


@pytest.fixture(scope="module")
def chain(tiny) -> dict:
    """The record of a chain of two links."""
    settings = {"strength": 1.0, "num_inference_steps": 1, "guidance_scale": 1.0}
    return decinb.run_chain([decinb.Link(tiny, "a house", **settings)] * 2, SMALL).records[1]


def write(path: Path, record: Any, image: Image.Image = SMALL, inside: bytes | None = None) -> Path:
    """Write a PNG with any record and any bytes as its input, as ``save_image`` would not."""
    if inside is None and isinstance(record, dict):
        forged = {**record, OUTPUT_HASH: image_hash(image)}
        with suppress(Exception):  # what an attacker can compute as well as we can
            forged["key"] = record_key(forged)
        try:
            save_image(image, path, forged, SMALL)
            return path
        except ValueError:  # NaN
            pass
    info = PngInfo()
    info.add_itxt(RECORD, record if isinstance(record, str) else json.dumps(record))
    if inside is not None:
        info.add(INPUT, inside)
    image.save(path, pnginfo=info)
    return path


def webp_of(width: int, height: int) -> bytes:
    """Return the start of a lossless WebP that says it has this size."""
    bits = (width - 1) | (height - 1) << 14
    chunk = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + struct.pack("<I", bits) + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def bomb(path: Path) -> Path:
    """Write a PNG of one megabyte with a gigabyte of text in it."""
    text = zlib.compress(b"x" * 10**8, 9)
    info = PngInfo()
    info.add_itxt(RECORD, "{}")
    for i in range(10):
        info.add(b"zTXt", f"bomb{i}".encode() + b"\0\0" + text)
    SMALL.save(path, pnginfo=info)
    return path


RECORD_ATTACKS = {
    "nothing": lambda r: {},
    "another model": lambda r: {"model": "sdxl-base"},
    "unknown model": lambda r: {"model": "../../etc"},
    "model as a list": lambda r: {"model": ["tiny"]},
    "timesteps": lambda r: {"scheduler_config": {**r["scheduler_config"], "num_train_timesteps": 3 * 10**8}},
    "cosine": lambda r: {
        "scheduler_config": {
            **r["scheduler_config"],
            "num_train_timesteps": 3 * 10**7,
            "beta_schedule": "squaredcos_cap_v2",
            "trained_betas": None,
        }
    },
    "betas": lambda r: {"scheduler_config": {**r["scheduler_config"], "trained_betas": [[]]}},
    "spacing": lambda r: {"scheduler_config": {**r["scheduler_config"], "timestep_spacing": "odd"}},
    "scheduler as a list": lambda r: {"scheduler_config": []},
    "scheduler": lambda r: {"scheduler": "VQDiffusionScheduler"},
    "steps": lambda r: {"num_inference_steps": 10**9},
    "prompt": lambda r: {"prompt": "x" * 10**6},
    "prompt as a list": lambda r: {"prompt": ["a"] * 1000},
    "prompt as a number": lambda r: {"prompt": 5},
    "half of a character": lambda r: {"negative_prompt": "\ud800"},
    "many parts": lambda r: {"unused": [{}] * 200_000},
    "rescale": lambda r: {"guidance_rescale": "x"},
    "no image": lambda r: {"image": None},
}


MODEL_NAMES = (
    "another model",
    "unknown model",
    "model as a list",
)  # the name does not matter where a pipeline is given


@pytest.mark.parametrize("attack", RECORD_ATTACKS)
@pytest.mark.parametrize("action", ["replay", "replay without a pipeline"])
def test_a_record_costs_and_fetches_nothing(jail, tmp_path, record, happened, attack, action):
    path = write(tmp_path / "made.png", {**record, **RECORD_ATTACKS[attack](record)})
    answer = jail.ask(action, path)
    message = check(answer, MODEL_MB)
    harmless = ("nothing", "no image", *(MODEL_NAMES if action == "replay" else ()))
    assert answer["error"] == (None if attack in harmless else "InputError") or attack == "no image", answer
    if attack == "another model" and action != "replay":
        assert "was made by 'sdxl-base', which is not on this machine: give load_pipeline('sdxl-base')" in message
        happened("H4", message)
    if attack == "timesteps" and action == "replay":
        happened("H4", message)


def test_a_record_of_a_very_long_chain(jail, tmp_path, chain, happened):
    path = write(tmp_path / "made.png", {**chain, "chain": chain["chain"] * 250})
    message = check(jail.ask("replay", path))
    assert "500" in message and "at most 100" in message
    happened("H4", message)


def many_chunks(path: Path) -> None:
    """Write a PNG with a million and a half empty chunks."""
    SMALL.save(path)
    data = path.read_bytes()
    empty = bytes(4) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    path.write_bytes(data[:33] + empty * 1_500_000 + data[33:])


FILES = {
    "many chunks": many_chunks,
    "giant": lambda path: write(path, {}, Image.new("1", (13_000, 13_000)), b""),
    "long": lambda path: write(path, {}, Image.new("1", (2**20, 64)), b""),
    "deep": lambda path: write(path, "[" * 10**5, inside=b""),
    "number": lambda path: write(path, "1", inside=b""),
    "long record": lambda path: write(path, "[" + "[]," * 10**6 + "[]]", inside=b""),
    "huge integer": lambda path: write(path, '{"seed": ' + "9" * 10**5 + "}", inside=b""),
    "text": bomb,
    "giant inside": lambda path: write(path, {}, inside=webp_of(16_383, 16_383)),
    "nothing inside": lambda path: write(path, {}, inside=b""),
    "pipe": pipe_at,
    "device": lambda path: link_at(path, "/dev/zero"),
    "loop": lambda path: link_at(path, path.name),
    "folder": Path.mkdir,
    "sparse": lambda path: sparse(path, 2**40, b"\x89PNG\r\n\x1a\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_png_of_ours_costs_nothing(jail, tmp_path, record, happened, name):
    path = tmp_path / "strength-1_0.png"
    FILES[name](path)
    for action in ("record", "replay"):
        answer = jail.ask(action, path)
        message = check(answer)
        assert answer["error"] == "InputError"
    if name in ("giant", "pipe", "device", "sparse"):
        happened("H5", message)
    check(jail.ask("image", path))
    if name != "folder":  # a sweep's own folder with this file in it
        path.rename(path.with_name(f"strength-1_{record['key']}.png"))
        check(jail.ask("plan", tmp_path))


@pytest.mark.parametrize("batch", range(4))
def test_random_changes_of_records(jail, tmp_path, record, chain, batch):
    for example in range(batch, RECORDS, 4):
        chance = random.Random(example)
        changed = json.loads(json.dumps(chance.choice([record, chain])))
        for _ in range(chance.randint(1, 2)):
            changed = mutate(changed, chance)
        check(jail.ask("replay", write(tmp_path / "made.png", changed)), MODEL_MB)
