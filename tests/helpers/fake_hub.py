"""A hub on the loopback, which serves folders, counts requests and can be set to misbehave; and models to serve.

It answers as ``huggingface_hub`` expects: ``/api/models/<repo>`` lists the files of a commit, and
``/<repo>/resolve/<revision>/<file>`` returns one of them.
"""

import hashlib
import json
import shutil
import threading
import time
from collections import Counter
from functools import cache, wraps
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from decinb.models import MODELS
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.unet_nas import V1_CONFIGURATIONS, UNetNAS

SILENCE_S = 120  # longer than any client in the tests waits


class FakeHub:
    """A server for the folders in ``repos``, by repository id.

    Attributes:
        misbehave: what goes wrong, by repository or ``repository/file``: "gated", "html", "silent", "outside" (an ETag
            that is a path), or a status such as 404 or 503. For a file it can also be a list, with one fault for each
            download in turn: a status, "silent", "cut" (the connection ends at 90% of the body), "stall" (silence after
            90%) or "wrong" (other bytes of the same number).
        requests: the number of requests, by (method, path).
        sent: the bytes of all bodies sent, by path.
    """

    def __init__(self, repos: dict[str, Path]):
        self.repos = dict(repos)
        self.misbehave: dict[str, str | int | list[str | int]] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[str] = Counter()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; after ``stop``, at the same address as before."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse all connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def fetched(self, repo: str) -> set[str]:
        """Return the files of a repository that were downloaded."""
        start = f"/{repo}/resolve/{commit(repo)}/"
        return {
            path.removeprefix(start) for method, path in self.requests if method == "GET" and path.startswith(start)
        }


def commit(repo: str) -> str:
    """Return the only commit of a repository: the one that a known model is pinned to, if it is."""
    pinned = (model.revision for model in MODELS.values() if model.source == repo)
    return next(pinned, None) or hashlib.sha1(repo.encode()).hexdigest()


def small_model(tiny: DeciDiffusionImg2ImgPipeline, folder: Path) -> Path:
    """Save the bundled model with a small untrained U-Net, which loads fast."""
    torch.manual_seed(0)
    dim = tiny.text_encoder.config.hidden_size
    unet = UNetNAS({**SMALL_UNET, "cross_attention_dim": dim}, sample_size=16)
    DeciDiffusionImg2ImgPipeline(**{**tiny.components, "unet": unet}).save_pretrained(folder)
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, cls: type) -> None:
    """Fail the test if an object of a class is created."""

    @wraps(cls.__init__)  # loaders look at its arguments
    def fail(*args: object, **kwargs: object) -> None:
        pytest.fail(f"a {cls.__name__} was created")

    monkeypatch.setattr(cls, "__init__", fail)


def digest(pipe: DiffusionPipeline) -> str:
    """Return a hash of all weights of a pipeline."""
    sha = hashlib.sha256()
    for _, component in sorted(pipe.components.items()):
        for name, tensor in sorted(component.state_dict().items()) if isinstance(component, nn.Module) else ():
            sha.update(f"{name} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def weights(folder: Path, component: str) -> Path:
    """Return the file with the weights of a component, not a variant of it."""
    return min((folder / component).glob("*.safetensors"), key=lambda file: len(file.name))


def as_pickle(folder: Path, component: str) -> Path:
    """Replace the weights of a component by a pickle, and return its path."""
    safe = weights(folder, component)
    pickled = safe.with_name("pytorch_model.bin" if safe.stem == "model" else "diffusion_pytorch_model.bin")
    torch.save(load_file(safe), pickled)
    for file in safe.parent.glob("*.safetensors"):  # any of them is preferred to a pickle
        file.unlink()
    return pickled


def publish(model: Path, folder: Path) -> Path:
    """Copy a model that diffusers saved to the layout of the published checkpoint, with files that must not be used.

    The U-Net is in ``flexible_unet`` with the configuration of an ordinary U-Net, the text encoder and the VAE have
    older tensor names, the tokenizer is in two files, and ``model_index.json`` asks for code from the repository.
    """
    shutil.copytree(model, folder)
    (folder / "unet").rename(folder / "flexible_unet")
    config = json.loads((folder / "flexible_unet" / "config.json").read_text())
    write_json(folder / "flexible_unet" / "config.json", {**ORDINARY_UNET, "configurations": config["configurations"]})

    text_encoder = folder / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(text_encoder).items()}, text_encoder, FORMAT)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({_old_vae_name(name): tensor for name, tensor in load_file(vae).items()}, vae, FORMAT)

    words = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    write_json(folder / "tokenizer" / "vocab.json", words["vocab"])
    merges = ["#version: 0.2", *(" ".join(pair) for pair in words["merges"])]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(merges) + "\n")

    for name in DECOYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"raise SystemExit('this must never be read')\n")
    index = {"_class_name": ["pipeline_decoy", "DecoyPipeline"], "unet": ["flexible_unet_decoy", "DecoyUNet"]}
    write_json(folder / "model_index.json", index)
    return folder


FORMAT = {"format": "pt"}

SMALL_UNET = {
    **V1_CONFIGURATIONS,
    "down_blocks_in_channels": [32, 32, 32],
    "down_blocks_out_channels": [32, 32, 64],
    "down_blocks_num_resnets": [1, 1, 1],
    "down_blocks_num_attentions": [0, 1, 2],
    "mid_num_resnets": 1,
    "mid_num_attentions": 1,
    "prev_output_channels": [64, 64, 32],
    "up_blocks_num_resnets": [2, 2, 2],
    "up_blocks_num_attentions": [2, 1, 0],
    "num_attention_heads": 4,
    "cross_attention_dim": 24,
    "temb_dim": 64,
    "sample_size": 16,
}

# The files of a published model that are read.
USED = {
    "flexible_unet/config.json",
    "flexible_unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "scheduler/scheduler_config.json",
}
DECOYS = (
    "README.md",
    "v1-5-pruned.ckpt",
    "pipeline_decoy.py",
    "flexible_unet/flexible_unet_decoy.py",
    "flexible_unet/diffusion_pytorch_model.bin",
    "flexible_unet/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "vae/diffusion_pytorch_model.bin",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
)

ORDINARY_UNET = {  # what the published flexible_unet/config.json has besides `configurations`, and what does not hold
    "_class_name": "FlexibleUNet2DConditionModel",
    "_diffusers_version": "0.21.4",
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_head_dim": 8,
    "attention_type": "default",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 768,
    "cross_attention_norm": None,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 64,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": False,
    "use_linear_projection": False,
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _old_vae_name(name: str) -> str:
    if ".attentions." in name:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
    return name


@cache
def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests[self.command, path] += 1
        parts = path.strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        owner_name, rest = (parts[2:4], parts[4:]) if listing else (parts[:2], parts[2:])
        repo, revision = "/".join(owner_name), rest[1] if len(rest) > 1 else "main"
        fault = self.hub.misbehave.get("/".join([repo, *rest[2:]])) or self.hub.misbehave.get(repo)

        if isinstance(fault, list):
            fault = fault.pop(0) if fault and self.command == "GET" else None

        if fault == "silent":
            time.sleep(SILENCE_S)
        elif fault == "html":
            self.answer(200, b"<html>Please sign in to the guest network</html>", {"Content-Type": "text/html"})
        elif isinstance(fault, int):
            self.answer(fault, b"")
        elif repo not in self.hub.repos:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", commit(repo)):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif listing:
            folder, sized = self.hub.repos[repo], "blobs=" in urlsplit(self.path).query
            files = [
                {"rfilename": name, **({"size": (folder / name).stat().st_size} if sized else {})}
                for name in self.files(repo)
            ]
            body = {"id": repo, "modelId": repo, "sha": commit(repo), "private": False, "tags": [], "siblings": files}
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif fault == "gated":  # as on the real hub, the list of files is public
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif rest[:1] != ["resolve"] or "/".join(rest[2:]) not in self.files(repo):
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit(repo)})
        else:
            file = self.hub.repos[repo] / "/".join(rest[2:])
            body = file.read_bytes()
            if fault == "wrong":
                body = bytes(len(body))
            etag = "../../../outside" if fault == "outside" else _etag(file)
            self.answer(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": commit(repo)}, fault)

    def files(self, repo: str) -> list[str]:
        folder = self.hub.repos[repo]
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str | None = None) -> None:
        given = self.headers.get("Range", "")
        if status == 200 and given.startswith("bytes=") and given.endswith("-"):
            start = int(given.removeprefix("bytes=").removesuffix("-"))
            headers = {**(headers or {}), "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            status, body = 206, body[start:]
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            sent = body[: len(body) * 9 // 10] if fault in ("cut", "stall") else body
            self.hub.sent[unquote(urlsplit(self.path).path)] += len(sent)
            self.wfile.write(sent)
            if fault == "stall":
                time.sleep(SILENCE_S)
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass
