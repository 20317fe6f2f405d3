"""U-Net-NAS, the denoiser of DeciDiffusion: an architecture given as data, and three kinds of block that lay it down.

A block is one list of ResNets and Transformers, taken in turns. What a neural architecture search chose is how many of
each stand at which resolution: no Transformer at the finest, most of them at the coarse end of the way up.

Source of the numbers: the published configuration of ``Deci/DeciDiffusion-v1-0``. Written for this project from those
facts, on the layers of diffusers; the parameter names are the published ones, so its weights load as they are.
"""

from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin  # must be visible here: diffusers looks for it when it loads a saved pipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin, UNet2DConditionLoadersMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from decinb.errors import InputError, ModelError

V1_CONFIGURATIONS: dict[str, Any] = {
    # from the image down to the coarsest latent
    "down_blocks_in_channels": [320, 320, 640],
    "down_blocks_out_channels": [320, 640, 1280],
    "down_blocks_num_resnets": [2, 2, 1],
    "down_blocks_num_attentions": [0, 1, 3],
    "add_downsample": [True, True, True],
    # in the middle
    "mid_num_resnets": 4,
    "mid_num_attentions": 2,
    "add_upsample_mid_block": True,
    # and back up
    "prev_output_channels": [1280, 1280, 640],
    "up_blocks_num_resnets": [2, 3, 3],
    "up_blocks_num_attentions": [6, 3, 0],
    "add_upsample": [True, True, False],
    # everywhere
    "mix_block_in_forward": True,
    "num_attention_heads": 8,
    "cross_attention_dim": 768,
    "temb_dim": 1280,
    "resnet_eps": 1e-5,
    "resnet_act_fn": "silu",
    "sample_size": 64,
}
"""The architecture of DeciDiffusion 1.0: 814,746,884 parameters, 0.614 TFLOP for a 64 x 64 latent and 77 tokens."""


class UNetNAS(ModelMixin, AttentionMixin, ConfigMixin, UNet2DConditionLoadersMixin, PeftAdapterMixin):
    """The U-Net-NAS denoiser: a noisy latent, a timestep and a text embedding in, the model's prediction out.

    Args:
        configurations: the architecture, with the keys of ``V1_CONFIGURATIONS`` (the default).
        in_channels, out_channels: channels of the latent.
        sample_size: height and width of the latent the model was trained for; other sizes work.
        norm_num_groups: groups of every group norm; must divide every width.

    Raises:
        InputError: a key of ``configurations`` is missing or unknown, or its lists differ in length.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["BasicTransformerBlock", "ResnetBlock2D"]
    _skip_layerwise_casting_patterns: ClassVar = ["norm"]
    _repeated_blocks: ClassVar = ["BasicTransformerBlock"]

    # Those of AttentionMixin pass over the attention layers that Transformer2DModel is made of.
    fuse_qkv_projections = UNet2DConditionModel.fuse_qkv_projections
    unfuse_qkv_projections = UNet2DConditionModel.unfuse_qkv_projections
    set_attention_slice = UNet2DConditionModel.set_attention_slice

    @register_to_config
    def __init__(
        self,
        configurations: dict[str, Any] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        sample_size: int = 64,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        time_cond_proj_dim: None = None,
    ):
        super().__init__()
        table = dict(V1_CONFIGURATIONS if configurations is None else configurations)
        _check(table)
        # diffusers takes what is given by position for a default, and ``from_config`` would build the published size.
        defaults = [name for name in self.config.get("_use_default_values", ()) if name != "configurations"]
        self.register_to_config(configurations=table, _use_default_values=defaults)

        widths_in, widths_out = table["down_blocks_in_channels"], table["down_blocks_out_channels"]
        kit = _Kit(table, norm_num_groups)

        self.conv_in = nn.Conv2d(in_channels, widths_in[0], kernel_size=3, padding=1)
        self.time_proj = Timesteps(widths_in[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(widths_in[0], table["temb_dim"], act_fn=table["resnet_act_fn"])

        self.down_blocks = nn.ModuleList(
            DownBlock(kit, *row)
            for row in zip(
                widths_in,
                widths_out,
                table["down_blocks_num_resnets"],
                table["down_blocks_num_attentions"],
                table["add_downsample"],
                strict=True,
            )
        )
        self.mid_block = MidBlock(
            kit,
            widths_out[-1],
            table["mid_num_resnets"],
            table["mid_num_attentions"],
            table["add_upsample_mid_block"],
        )
        self.up_blocks = nn.ModuleList(
            UpBlock(kit, *row)
            for row in zip(
                table["prev_output_channels"],
                reversed(widths_out),
                reversed(widths_in),
                table["up_blocks_num_resnets"],
                table["up_blocks_num_attentions"],
                table["add_upsample"],
                strict=True,
            )
        )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths_in[0], eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths_in[0], out_channels, kernel_size=3, padding=1)

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        timestep_cond: None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: None = None,
        return_dict: bool = True,
        latent_of: Tensor | None = None,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict from a noisy latent.

        Args:
            sample: noisy latent, (batch, in_channels, height, width).
            timestep: one for all rows, or one a row, 0 to 999.
            encoder_hidden_states: text embedding, (batch, tokens, cross_attention_dim).
            cross_attention_kwargs: for attention processors; ``scale`` weighs LoRA layers.
            timestep_cond, added_cond_kwargs: taken because the pipelines pass them; must be None.
            return_dict: a ``UNet2DConditionOutput``, or a plain tuple.
            latent_of: the row of ``sample`` that each text is for, (texts,), where one latent has several, as under
                guidance: the blocks without Transformers then run once a latent. None: each latent has its own text.

        Returns:
            The prediction, in the shape of ``sample``, a row a text.
        """
        if timestep_cond is not None or added_cond_kwargs is not None:
            raise InputError(
                "U-Net-NAS is conditioned by timestep and text only: leave timestep_cond and image prompts out"
            )
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        given = (temb, encoder_hidden_states, cross_attention_kwargs)

        hidden = self.conv_in(sample)
        skips = [hidden]
        for block in self.down_blocks:
            if latent_of is not None and block.reads_text:  # until here, all texts of a latent are one
                hidden, skips, temb = hidden[latent_of], [skip[latent_of] for skip in skips], temb[latent_of]
                given, latent_of = (temb, *given[1:]), None
            hidden, skips = block(hidden, skips, *given)
        skips = skips[:-1]  # what leaves the last down block goes to the mid block, not across
        hidden, skips = self.mid_block(hidden, skips, *given)
        for block in self.up_blocks:
            hidden, skips = block(hidden, skips, *given)

        hidden = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return UNet2DConditionOutput(sample=hidden) if return_dict else (hidden,)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Read a published ``config.json``: ``configurations``, and settings of an ordinary U-Net that are not true."""
        if "configurations" not in config_dict:
            raise ModelError("config.json has no `configurations`, so this is not a U-Net-NAS")
        # Under this name diffusers itself drops the ordinary settings, and still warns of keys that nobody knows.
        init_dict, unused, _ = super().extract_init_dict(
            {**config_dict, "_class_name": "UNet2DConditionModel"}, **kwargs
        )
        return init_dict, unused, {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "UNetNAS":
        """Load from a folder or hub id, as every diffusers model does, but strictly.

        Raises:
            ModelError: a tensor is missing, extra or of another shape (the message names it), or the configuration is
                not that of a U-Net-NAS.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        where = "/".join(str(part) for part in (pretrained_model_name_or_path, kwargs.get("subfolder")) if part)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (ValueError, RuntimeError) as error:
            if "shape" not in str(error):
                raise
            raise ModelError(f"the weights in {where!r} do not fit the configuration: {_one_line(error)}") from error
        refuse_partial(info, where)
        return (model, info) if wants_info else model

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Refuse FreeU, which scales the skips of an ordinary U-Net's stages: there are no such stages here.

        Raises:
            InputError: always.
        """
        raise InputError("FreeU knows the stages of UNet2DConditionModel, and U-Net-NAS has others: run it without")

    def disable_freeu(self) -> None:
        """Do nothing: it is never enabled."""


def refuse_partial(info: dict[str, Any], where: str | Path) -> None:
    """Refuse weights that do not fill a model exactly.

    Args:
        info: what ``from_pretrained(..., output_loading_info=True)`` of diffusers or transformers tells.
        where: the folder, for the message.

    Raises:
        ModelError: a tensor is missing, extra or of another shape; the message names it.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Text encoders of 2022 and 2023 were saved with the numbers 0, 1, 2 ... of their positions.
        if names := sorted(name for name in map(str, info[kind]) if not name.endswith("position_ids")):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(f"the weights in {str(where)!r} have {kind.replace('_', ' ')}: {shown}")


class _Block(nn.Module):
    """What the three kinds share: the list of ResNets and Transformers, and how a member of it is called.

    A block gives back the skips that are then to be used, and leaves the list that it was given as it was: the hooks
    that offload a model hand it a copy.
    """

    def __init__(self, modules: list[nn.Module]):
        super().__init__()
        self.modules_list = nn.ModuleList(modules)
        self.gradient_checkpointing = False

    @property
    def reads_text(self) -> bool:
        return any(isinstance(module, Transformer2DModel) for module in self.modules_list)

    def resnet(self, module: ResnetBlock2D, hidden: Tensor, temb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, hidden, temb)
        return module(hidden, temb)

    def transformer(self, module: Transformer2DModel, hidden: Tensor, text: Tensor, kwargs: dict | None) -> Tensor:
        return module(hidden, text, cross_attention_kwargs=kwargs, return_dict=False)[0]


class DownBlock(_Block):
    """On the way down, a skip is kept after every ResNet and after the downsampler."""

    def __init__(self, kit: "_Kit", width_in: int, width: int, num_resnets: int, num_attentions: int, downsample: bool):
        first_then_rest = [width_in] + [width] * (num_resnets - 1)
        super().__init__(kit.lay_down([kit.resnet(w, width) for w in first_then_rest], num_attentions, width))
        self.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, name="op")] if downsample else [])

    def forward(
        self, hidden: Tensor, skips: list[Tensor], temb: Tensor, text: Tensor, kwargs: dict | None
    ) -> tuple[Tensor, list[Tensor]]:
        skips = list(skips)
        for module in self.modules_list:
            if isinstance(module, ResnetBlock2D):
                hidden = self.resnet(module, hidden, temb)
                skips.append(hidden)
            else:
                hidden = self.transformer(module, hidden, text, kwargs)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden)
            skips.append(hidden)
        return hidden, skips


class MidBlock(_Block):
    """At the bottom there are no skips to keep or to take."""

    def __init__(self, kit: "_Kit", width: int, num_resnets: int, num_attentions: int, upsample: bool):
        entry = kit.resnet(width, width)
        resnets = [kit.resnet(width, width) for _ in range(num_resnets)]
        super().__init__([entry, *kit.lay_down(resnets, num_attentions, width, transformer_first=True)])
        self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)] if upsample else [])

    def forward(
        self, hidden: Tensor, skips: list[Tensor], temb: Tensor, text: Tensor, kwargs: dict | None
    ) -> tuple[Tensor, list[Tensor]]:
        # The first ResNet runs twice: on entry, and as the first of the list. The published weights were trained so.
        hidden = self.resnet(self.modules_list[0], hidden, temb)
        for module in self.modules_list:
            if isinstance(module, ResnetBlock2D):
                hidden = self.resnet(module, hidden, temb)
            else:
                hidden = self.transformer(module, hidden, text, kwargs)
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden, output_size=skips[-1].shape[-2:])
        return hidden, skips


class UpBlock(_Block):
    """On the way up, every ResNet first takes the last unused skip beside what it was given."""

    def __init__(
        self,
        kit: "_Kit",
        width_before: int,
        width: int,
        width_last_skip: int,
        num_resnets: int,
        num_attentions: int,
        upsample: bool,
    ):
        given = [width_before] + [width] * (num_resnets - 1)
        skipped = [width] * (num_resnets - 1) + [width_last_skip]
        resnets = [kit.resnet(a + b, width) for a, b in zip(given, skipped, strict=True)]
        super().__init__(kit.lay_down(resnets, num_attentions, width))
        self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)] if upsample else [])

    def forward(
        self, hidden: Tensor, skips: list[Tensor], temb: Tensor, text: Tensor, kwargs: dict | None
    ) -> tuple[Tensor, list[Tensor]]:
        skips = list(skips)
        for module in self.modules_list:
            if isinstance(module, ResnetBlock2D):
                hidden = self.resnet(module, torch.cat([hidden, skips.pop()], dim=1), temb)
            else:
                hidden = self.transformer(module, hidden, text, kwargs)
        for upsampler in self.upsamplers:
            # To the size of the skip it meets next: exactly twice, except where a latent did not halve evenly.
            hidden = upsampler(hidden, output_size=skips[-1].shape[-2:])
        return hidden, skips


class _Kit:
    """Makes ResNets and Transformers with the settings that are the same everywhere, and lays them down in order."""

    def __init__(self, table: dict[str, Any], groups: int):
        self.table, self.groups = table, groups

    def resnet(self, width_in: int, width: int) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels=width_in,
            out_channels=width,
            temb_channels=self.table["temb_dim"],
            groups=self.groups,
            eps=self.table["resnet_eps"],
            non_linearity=self.table["resnet_act_fn"],
        )

    def transformer(self, width: int) -> Transformer2DModel:
        heads = self.table["num_attention_heads"]
        return Transformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=width,
            norm_num_groups=self.groups,
            cross_attention_dim=self.table["cross_attention_dim"],
        )

    def lay_down(
        self, resnets: list[nn.Module], num_attentions: int, width: int, transformer_first: bool = False
    ) -> list[nn.Module]:
        transformers = [self.transformer(width) for _ in range(num_attentions)]
        if not self.table["mix_block_in_forward"]:
            return [*resnets, *transformers]
        first, second = (transformers, resnets) if transformer_first else (resnets, transformers)
        return [module for pair in zip_longest(first, second) for module in pair if module is not None]


def _check(table: dict[str, Any]) -> None:
    missing, unknown = V1_CONFIGURATIONS.keys() - table.keys(), table.keys() - V1_CONFIGURATIONS.keys()
    if missing or unknown:
        raise InputError(f"configurations: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
    lengths = {key: len(table[key]) for key, value in V1_CONFIGURATIONS.items() if isinstance(value, list)}
    if len(set(lengths.values())) != 1:
        raise InputError(f"configurations: all lists must name the same number of blocks, got {lengths}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
