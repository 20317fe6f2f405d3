"""Train the bundled model from nothing: ``python -m decinb.tiny.train``.

Scenes are drawn, a tokenizer learns their captions, a VAE learns to draw them again from a latent of 4 x 16 x 16, and a
text encoder and a U-Net-NAS learn together to turn noise into such latents. Each stage has a budget of minutes that its
learning rate follows, writes a checkpoint twice a minute, and goes on from it when the same command is given again.

Random numbers depend on the seed and the step alone, so a run that was killed goes on as if it had not been.
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from decinb.errors import InputError
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.quiet import quiet
from decinb.tiny.scenes import IMAGE_SIZE, Scene, caption, random_scene, render
from decinb.unet_nas import UNetNAS

CONFIGURATIONS = {
    "down_blocks_in_channels": [96, 96, 96],
    "down_blocks_out_channels": [96, 96, 128],
    "down_blocks_num_resnets": [2, 2, 1],
    "down_blocks_num_attentions": [0, 1, 2],
    "add_downsample": [True, True, True],
    "mid_num_resnets": 1,
    "mid_num_attentions": 1,
    "add_upsample_mid_block": True,
    "prev_output_channels": [128, 128, 96],
    "up_blocks_num_resnets": [2, 3, 3],
    "up_blocks_num_attentions": [2, 2, 0],
    "add_upsample": [True, True, False],
    "mix_block_in_forward": True,
    "num_attention_heads": 4,
    "cross_attention_dim": 128,
    "temb_dim": 256,
    "resnet_eps": 1e-5,
    "resnet_act_fn": "silu",
    "sample_size": IMAGE_SIZE // 8,
}
"""The U-Net-NAS of ``tiny``: the published plan (no Transformer at the finest resolution) at a tenth of the width."""

TOKENS = 40  # a full caption takes about 20, the prompt of the guide 34

# Noise in training also gets a random amount of slow variation, over the whole picture and over quarters of its sides.
# Plain noise hides the overall colours of a picture only very late; a model that has seen slow noise lets the prompt
# decide about them earlier, so that day can become night while houses stay where they are.
SLOW_NOISE = 0.6

# Below this timestep a caption is sometimes another scene's: the less noise there is, the more often, at last every
# second time. A model that has only seen true captions believes them against any picture; so it learns to believe what
# it can see.
TRUSTED = 400


@dataclass
class Stage:
    """A training run against the clock: fp32 masters of the weights, AdamW, an average of the weights, checkpoints.

    Args:
        name: of the checkpoint file and of the lines in the log.
        modules: what is trained, moved to ``device`` and ``dtype`` by this class.
        minutes: the budget; the learning rate rises for its first 3% and falls to zero as a cosine over the rest.
        folder: where ``NAME.pt`` and ``log.jsonl`` are kept; a checkpoint found there is gone on from.
        average: the decay of the running average of the weights, which is what the stage leaves behind.
    """

    name: str
    modules: dict[str, nn.Module]
    minutes: float
    learning_rate: float
    folder: Path
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    average: float = 0.999
    step: int = 0
    seconds: float = 0.0
    masters: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.masters = [p.detach().to(self.device, torch.float32).clone() for p in self._parameters()]
        for module in self.modules.values():
            module.to(self.device, self.dtype).train()
        self.averages = [master.clone() for master in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.file = self.folder / f"{self.name}.pt"
        if self.file.exists():
            self._restore()

    def run(self, loss_of: Callable[[int], Tensor], watch: Callable[[float], None] | None = None) -> None:
        """Call ``loss_of(step)`` and step down its gradient until the minutes are used up."""
        losses: list[float] = []
        saved = said = time.monotonic()
        while self.progress < 1:
            started = time.monotonic()
            loss = loss_of(self.step)
            loss.backward()
            self._descend()
            losses.append(loss.item())
            self.step += 1
            self.seconds += time.monotonic() - started
            if time.monotonic() - said > 15 or self.progress >= 1:
                self._log(sum(losses) / len(losses))
                if watch:
                    watch(self.progress)
                losses, said = [], time.monotonic()
            if time.monotonic() - saved > 30:
                self._save()
                saved = time.monotonic()
        self._save()
        self._write(self.averages)
        for module in self.modules.values():
            module.float().eval()

    @property
    def progress(self) -> float:
        """From 0 to 1, the part of the budget that is used up."""
        return min(self.seconds / (60 * self.minutes), 1.0)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return itertools.chain.from_iterable(module.parameters() for module in self.modules.values())

    @torch.no_grad()
    def _descend(self) -> None:
        for master, parameter in zip(self.masters, self._parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        warm, done = min(1.0, self.progress / 0.03 + 1e-3), self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, self.masters, 1 - min(self.average, (1 + self.step) / (10 + self.step)))
        self._write(self.masters)

    @torch.no_grad()
    def _write(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self._parameters(), weights, strict=True):
            parameter.copy_(weight)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "masters": self.masters,
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.file)

    def _restore(self) -> None:
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        for mine, saved in zip(self.masters + self.averages, state["masters"] + state["averages"], strict=True):
            mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self._write(self.masters)

    def _log(self, loss: float) -> None:
        line = {"stage": self.name, "step": self.step, "minutes": round(self.seconds / 60, 2), "loss": round(loss, 5)}
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        print(
            f"{self.name}: step {self.step}, {line['minutes']} of {self.minutes:g} minutes, loss {loss:.4f}", flush=True
        )


# --- what is trained --------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn a byte-pair tokenizer of CLIP's kind from captions; every byte is in it, so any text can be written."""
    rng = random.Random(0)
    captions = [caption(random_scene(rng), rng) for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.pre_tokenizer = words
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = alphabet + [letter + "</w>" for letter in alphabet]
    pieces = letters + ["".join(pair) for pair in merges if "".join(pair) not in set(letters)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    made = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    made.save_pretrained(folder)
    return made


def make_vae() -> AutoencoderKL:
    """A VAE of factor 8 with 4 latent channels, as the published one, at an eighth of the width."""
    widths = (16, 32, 64, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,  # the latent is brought to unit deviation by `normalise_latent`
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of two layers."""
    width = CONFIGURATIONS["cross_attention_dim"]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNetNAS:
    """The U-Net-NAS of ``tiny``."""
    return UNetNAS(configurations=CONFIGURATIONS, sample_size=CONFIGURATIONS["sample_size"])


def make_scheduler() -> DDIMScheduler:
    """DDIM over Stable Diffusion's noise, made to end in nothing but noise, so that strength 1 forgets the image.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), arXiv:2305.08891.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # what diffusers expects to read; trailing spacing does not use it
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


# --- what they learn from ---------------------------------------------------------------------------------------------


def draw(scene: Scene) -> np.ndarray:
    """Render a scene to (3, height, width) bytes."""
    return np.asarray(render(scene)).transpose(2, 0, 1)


def draw_all(scenes: list[Scene], file: Path) -> np.ndarray:
    """Render many scenes on all cores into a memory-mapped array (scenes, 3, height, width); done only once."""
    if not file.exists():
        part = file.with_suffix(".part")
        pictures = np.lib.format.open_memmap(part, "w+", np.uint8, (len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE))
        with ProcessPoolExecutor() as pool:
            for i, picture in enumerate(pool.map(draw, scenes, chunksize=64)):
                pictures[i] = picture
        pictures.flush()
        del pictures  # Windows renames no file that is open
        os.replace(part, file)
    return np.load(file, mmap_mode="r")


def to_input(pictures: np.ndarray | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bytes to the [-1, 1] that a VAE takes."""
    return torch.tensor(np.ascontiguousarray(pictures)).to(device, dtype) / 127.5 - 1


# --- the two losses ---------------------------------------------------------------------------------------------------


def vae_loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator, kl_weight: float = 5e-4) -> Tensor:
    """How far a picture comes back changed: its values, its edges, and a little for a latent that is not round."""
    posterior = vae.encode(pictures).latent_dist
    back = vae.decode(posterior.sample(generator)).sample.float()
    pictures = pictures.float()
    values = F.l1_loss(back, pictures)
    edges = F.l1_loss(back.diff(dim=-1), pictures.diff(dim=-1)) + F.l1_loss(back.diff(dim=-2), pictures.diff(dim=-2))
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return values + 0.5 * edges + kl_weight * kl


def noise_like(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Plain noise plus a random amount of slow noise (see ``SLOW_NOISE``)."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, channels, height, width = latents.shape
    noise = normal(batch, channels, height, width)
    amount = SLOW_NOISE * torch.rand((2, batch, 1, 1, 1), generator=generator)
    noise += amount[0] * normal(batch, channels, 1, 1)
    noise += amount[1] * F.interpolate(normal(batch, channels, 4, 4), size=(height, width), mode="bilinear")
    return noise.to(latents)


def unet_loss(
    unet: UNetNAS,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    tokens: Tensor,
    timesteps: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The error of the predicted velocity, at one timestep a row; nearly clean rows count less.

    ``latents`` are float32: in fewer digits a little noise would be none.

    Source: Salimans & Ho (2022), arXiv:2202.00512 (velocity); Hang et al. (2023), arXiv:2303.09556 (the weight).
    """
    noise = noise_like(latents, generator)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    predicted = unet(noisy.to(unet.dtype), timesteps.to(latents.device), text_encoder(tokens)[0]).sample
    error = (predicted.float() - velocity).square().mean(dim=(1, 2, 3))
    clean = scheduler.alphas_cumprod[timesteps]
    weight = (6 * (1 - clean)).clamp(max=1).to(error)  # min(snr + 1, 6) / (snr + 1)
    return (weight * error).mean()


@torch.no_grad()
def normalise_latent(vae: AutoencoderKL, latents: Tensor) -> None:
    """Bring every channel of the latent to mean 0 and deviation 1, by changing the 1 x 1 convolutions around it.

    Args:
        latents: latents of many pictures, (pictures, channels, height, width), as the VAE gives them now.
    """
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out_of, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= deviation[None, :, None, None]
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()


# --- the stages, one after another ------------------------------------------------------------------------------------


def train_vae(
    pictures: np.ndarray, minutes: float, folder: Path, device: torch.device, seed: int = 0, batch: int = 8
) -> AutoencoderKL:
    """Train the VAE on pictures (bytes), and bring its latent to unit deviation."""
    torch.manual_seed(seed)
    vae = make_vae()
    stage = Stage("vae", {"vae": vae}, minutes, 1.5e-3, folder, device)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        chosen = pictures[rng.integers(len(pictures), size=batch)]
        mirrored = chosen[..., ::-1] if step % 2 else chosen
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        return vae_loss(vae, to_input(mirrored, device, stage.dtype), generator)

    stage.run(loss_of)
    sample = encode(vae, pictures[:1024], device)
    normalise_latent(vae, sample[:, :4])
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device, batch: int = 32) -> Tensor:
    """The latent of every picture as its mean and log variance, (pictures, 8, height / 8, width / 8), fp32."""
    moments = []
    for start in range(0, len(pictures), batch):
        posterior = vae.encode(to_input(pictures[start : start + batch], device, vae.dtype)).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float())
    return torch.cat(moments)


def words_for(scenes: list[Scene], row: int, timestep: int, rng: random.Random) -> str:
    """A caption for a scene; none every tenth time (for guidance), and another scene's near the end (``TRUSTED``)."""
    if rng.random() < 0.1:
        return ""
    another = rng.random() < 0.5 * (1 - timestep / TRUSTED)
    return caption(rng.choice(scenes) if another else scenes[row], rng)


def encode_all(vae: AutoencoderKL, pictures: np.ndarray, file: Path, device: torch.device) -> Tensor:
    """``encode`` in bfloat16, kept in a file so that a run that goes on need not do it again."""
    if not file.exists():
        print("encoding the scenes", flush=True)
        moments = encode(vae.to(device, torch.bfloat16), pictures, device)
        vae.float()
        part = file.with_suffix(".part.npy")
        np.save(part, moments.cpu().numpy())
        os.replace(part, file)
    return torch.from_numpy(np.load(file)).to(device)


def train_unet(
    scenes: list[Scene],
    moments: Tensor,
    tokenizer: CLIPTokenizer,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 64,
    watch: Callable[[UNetNAS, CLIPTextModel, float], None] | None = None,
) -> tuple[UNetNAS, CLIPTextModel]:
    """Train U-Net-NAS and text encoder together on the latents of scenes and on captions said anew each time."""
    torch.manual_seed(seed)
    unet, text_encoder, scheduler = make_unet(), make_text_encoder(tokenizer), make_scheduler()
    stage = Stage("unet", {"unet": unet, "text_encoder": text_encoder}, minutes, 1e-3, folder, device)
    means, deviations = moments[:, :4], (0.5 * moments[:, 4:]).exp()

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{seed} {step}")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = [rng.randrange(len(scenes)) for _ in range(batch)]
        timesteps = [rng.randrange(scheduler.config.num_train_timesteps) for _ in rows]
        said = [words_for(scenes, row, timestep, rng) for row, timestep in zip(rows, timesteps, strict=True)]
        tokens = tokenizer(
            said, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        sampled = means[rows] + deviations[rows] * torch.randn(means[rows].shape, generator=generator).to(means)
        return unet_loss(
            unet, text_encoder, scheduler, sampled.to(device), tokens.to(device), torch.tensor(timesteps), generator
        )

    stage.run(loss_of, (lambda progress: watch(unet, text_encoder, progress)) if watch else None)
    return unet, text_encoder


def train(folder: Path, scenes: int, vae_minutes: float, unet_minutes: float, seed: int, device: torch.device) -> Path:
    """Run all stages in ``folder`` and leave the finished diffusers folder in ``folder/model``."""
    folder.mkdir(parents=True, exist_ok=True)
    _same_run(folder / "settings.json", {"scenes": scenes, "vae_minutes": vae_minutes, "seed": seed})
    rng = random.Random(seed)
    drawn = [random_scene(rng) for _ in range(scenes)]
    tokenizer = make_tokenizer(folder / "tokenizer")
    print(f"drawing {scenes} scenes", flush=True)
    pictures = draw_all(drawn, folder / f"scenes-{seed}-{scenes}.npy")

    vae = train_vae(pictures, vae_minutes, folder, device, seed)
    moments = encode_all(vae, pictures, folder / "moments.npy", device)

    unet, text_encoder = train_unet(drawn, moments, tokenizer, unet_minutes, folder, device, seed)
    return save(folder / "model", vae, text_encoder, tokenizer, unet)


def _same_run(file: Path, settings: dict[str, float]) -> None:
    """What the checkpoints in a folder depend on must not change between two runs there."""
    if not file.exists():
        file.write_text(json.dumps(settings))
    elif (before := json.loads(file.read_text())) != settings:
        raise InputError(f"{file.parent} holds a run with {before}, not {settings}: go on with those, or name another")


def save(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNetNAS
) -> Path:
    """Write the parts as an ordinary diffusers folder, fp16 safetensors."""
    pipe = DeciDiffusionImg2ImgPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
    )
    with quiet():
        pipe.to(torch.float16).save_pretrained(folder)
    # diffusers' parts come up in float32 whatever is stored; transformers' do so only if they are told.
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tiny"), help="log, checkpoints and the finished model"
    )
    parser.add_argument("--scenes", type=int, default=20_000, help="how many scenes to draw (default %(default)s)")
    parser.add_argument("--vae-minutes", type=float, default=35)
    parser.add_argument("--unet-minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    started = time.monotonic()
    device = torch.device(given.device)
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    model = train(given.folder, given.scenes, given.vae_minutes, given.unet_minutes, given.seed, device)
    print(f"wrote {model} after {(time.monotonic() - started) / 60:.0f} minutes on {where}, seed {given.seed}")


if __name__ == "__main__":
    main()
