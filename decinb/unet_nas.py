"""U-Net-NAS, the denoiser of DeciDiffusion: a table that describes the architecture, and three kinds of block.

A block is a list of ResNets and Transformers that alternate. A neural architecture search chose how many of each there
are at which resolution: there is no Transformer at full resolution, and most are at the start of the way up.

Source of the table: the published configuration of ``Deci/DeciDiffusion-v1-0``. The code was written for this project
with the layers of diffusers. Parameters have the published names, so that the published weights load unchanged.
"""

from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin  # diffusers looks for it in this module when it loads a saved pipeline
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
    # down, from full resolution
    "down_blocks_in_channels": [320, 320, 640],
    "down_blocks_out_channels": [320, 640, 1280],
    "down_blocks_num_resnets": [2, 2, 1],
    "down_blocks_num_attentions": [0, 1, 3],
    "add_downsample": [True, True, True],
    # middle
    "mid_num_resnets": 4,
    "mid_num_attentions": 2,
    "add_upsample_mid_block": True,
    # up, to full resolution
    "prev_output_channels": [1280, 1280, 640],
    "up_blocks_num_resnets": [2, 3, 3],
    "up_blocks_num_attentions": [6, 3, 0],
    "add_upsample": [True, True, False],
    # all blocks
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
    """The U-Net-NAS denoiser: from a noisy latent, a timestep and a text embedding to a prediction.

    Args:
        configurations: the architecture, with the keys of ``V1_CONFIGURATIONS``, which is the default.
        in_channels, out_channels: channels of the input and of the prediction.
        sample_size: height and width of the latents in training; other sizes work.
        flip_sin_to_cos, freq_shift: of the timestep embedding.
        norm_num_groups: groups of all group norms; must divide every width.
        norm_eps: of the last group norm.
        time_cond_proj_dim: accepted because pipelines read it; must be None.

    Raises:
        InputError: ``configurations`` lacks a key or has an unknown one, or its lists differ in length.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["BasicTransformerBlock", "ResnetBlock2D"]
    _skip_layerwise_casting_patterns: ClassVar = ["norm"]
    _repeated_blocks: ClassVar = ["BasicTransformerBlock"]

    # The methods of AttentionMixin skip the attention layers in Transformer2DModel.
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
        # diffusers regards a positional argument as a default, so ``from_config`` would build the published size.
        defaults = [name for name in self.config.get("_use_default_values", ()) if name != "configurations"]
        self.register_to_config(configurations=table, _use_default_values=defaults)

        widths_in, widths_out = table["down_blocks_in_channels"], table["down_blocks_out_channels"]
        make = _LayerFactory(table, norm_num_groups)

        self.conv_in = nn.Conv2d(in_channels, widths_in[0], kernel_size=3, padding=1)
        self.time_proj = Timesteps(widths_in[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(widths_in[0], table["temb_dim"], act_fn=table["resnet_act_fn"])

        self.down_blocks = nn.ModuleList(
            DownBlock(make, *row)
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
            make,
            widths_out[-1],
            table["mid_num_resnets"],
            table["mid_num_attentions"],
            table["add_upsample_mid_block"],
        )
        self.up_blocks = nn.ModuleList(
            UpBlock(make, *row)
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
        """Predict the noise, the velocity or the sample, whatever the model was trained for.

        Args:
            sample: noisy latent, (batch, in_channels, height, width).
            timestep: one for all rows or one for each row, 0 to 999.
            encoder_hidden_states: text embedding, (batch, tokens, cross_attention_dim).
            timestep_cond, added_cond_kwargs: accepted because pipelines pass them; must be None.
            cross_attention_kwargs: for attention processors; ``scale`` is the weight of LoRA layers.
            return_dict: return a ``UNet2DConditionOutput`` instead of a tuple.
            latent_of: for each text, the row of ``sample`` that it belongs to, (texts,). With guidance, a latent has
                several texts; the first blocks, which have no Transformers, then run once for each latent. None if
                each latent has one text.

        Returns:
            The prediction, (texts, out_channels, height, width).

        Raises:
            InputError: ``timestep_cond`` or ``added_cond_kwargs`` is given.
        """
        if timestep_cond is not None or added_cond_kwargs is not None:
            raise InputError(
                "U-Net-NAS is conditioned on timestep and text only: leave out timestep_cond and image prompts"
            )
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        conditions = (temb, encoder_hidden_states, cross_attention_kwargs)

        hidden = self.conv_in(sample)
        skips = [hidden]
        for block in self.down_blocks:
            if latent_of is not None and block.reads_text:  # from here on, each text has its own row
                hidden, skips, temb = hidden[latent_of], [skip[latent_of] for skip in skips], temb[latent_of]
                conditions, latent_of = (temb, *conditions[1:]), None
            hidden, skips = block(hidden, skips, *conditions)
        skips = skips[:-1]  # the output of the last down block goes to the mid block only
        hidden, skips = self.mid_block(hidden, skips, *conditions)
        for block in self.up_blocks:
            hidden, skips = block(hidden, skips, *conditions)

        hidden = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return UNet2DConditionOutput(sample=hidden) if return_dict else (hidden,)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Read a published ``config.json``, ignoring the settings of an ordinary U-Net that it also contains.

        Raises:
            ModelError: there are no ``configurations``.
        """
        if "configurations" not in config_dict:
            raise ModelError("config.json has no `configurations`: this is not a U-Net-NAS")
        # With this class name diffusers drops the ordinary settings itself, and still warns about unknown keys.
        init_dict, unused, _ = super().extract_init_dict(
            {**config_dict, "_class_name": "UNet2DConditionModel"}, **kwargs
        )
        return init_dict, unused, {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "UNetNAS":
        """Load from a folder or from the hub as any diffusers model, but refuse weights that do not fit exactly.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            kwargs: as of diffusers' ``ModelMixin.from_pretrained``.

        Raises:
            ModelError: a tensor is missing, unexpected or of the wrong shape (the message names it), or the
                configuration is not that of a U-Net-NAS.
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
        return (model, info) if wants_info else model  # type: ignore[return-value]

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Refuse FreeU, which scales the skip connections of ``UNet2DConditionModel``'s up blocks.

        Raises:
            InputError: always.
        """
        raise InputError("FreeU is made for the up blocks of UNet2DConditionModel, which U-Net-NAS does not have")

    def disable_freeu(self) -> None:
        """Do nothing, since FreeU cannot be enabled."""


def refuse_partial(info: dict[str, Any], where: str | Path) -> None:
    """Refuse weights that do not fit a model exactly.

    Args:
        info: from ``from_pretrained(..., output_loading_info=True)`` of diffusers or transformers.
        where: the folder, for the message.

    Raises:
        ModelError: a tensor is missing, unexpected or of the wrong shape; the message names it.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Text encoders saved in 2022 and 2023 contain their position ids, which are not weights.
        if names := sorted(name for name in map(str, info[kind]) if not name.endswith("position_ids")):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(f"the weights in {str(where)!r} have {kind.replace('_', ' ')}: {shown}")


class _Block(nn.Module):
    """The base of the three kinds of block: a list of ResNets and Transformers.

    A block takes the skip connections and returns the new ones. It does not change the list that it was given, because
    the hooks that offload a model pass a copy.
    """

    def __init__(self, modules: list[nn.Module]):
        super().__init__()
        self.modules_list = nn.ModuleList(modules)
        self.gradient_checkpointing = False

    @property
    def reads_text(self) -> bool:
        """Whether the block has a Transformer."""
        return any(isinstance(module, Transformer2DModel) for module in self.modules_list)

    def resnet(self, module: ResnetBlock2D, hidden: Tensor, temb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, hidden, temb)
        return module(hidden, temb)

    def transformer(self, module: Transformer2DModel, hidden: Tensor, text: Tensor, kwargs: dict | None) -> Tensor:
        return module(hidden, text, cross_attention_kwargs=kwargs, return_dict=False)[0]


class DownBlock(_Block):
    """A block on the way down: adds a skip connection after every ResNet and after the downsampler."""

    def __init__(
        self, make: "_LayerFactory", width_in: int, width: int, num_resnets: int, num_attentions: int, downsample: bool
    ):
        widths_in = [width_in] + [width] * (num_resnets - 1)
        super().__init__(make.alternate([make.resnet(w, width) for w in widths_in], num_attentions, width))
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
    """The block at the lowest resolution: neither adds nor uses skip connections."""

    def __init__(self, make: "_LayerFactory", width: int, num_resnets: int, num_attentions: int, upsample: bool):
        entry = make.resnet(width, width)
        resnets = [make.resnet(width, width) for _ in range(num_resnets)]
        super().__init__([entry, *make.alternate(resnets, num_attentions, width, transformer_first=True)])
        self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)] if upsample else [])

    def forward(
        self, hidden: Tensor, skips: list[Tensor], temb: Tensor, text: Tensor, kwargs: dict | None
    ) -> tuple[Tensor, list[Tensor]]:
        # The first ResNet runs twice, on entry and as the first of the list, as in training of the published weights.
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
    """A block on the way up: every ResNet gets the last unused skip connection as additional channels."""

    def __init__(
        self,
        make: "_LayerFactory",
        width_before: int,
        width: int,
        width_last_skip: int,
        num_resnets: int,
        num_attentions: int,
        upsample: bool,
    ):
        widths_in = [width_before] + [width] * (num_resnets - 1)
        widths_skip = [width] * (num_resnets - 1) + [width_last_skip]
        resnets = [make.resnet(a + b, width) for a, b in zip(widths_in, widths_skip, strict=True)]
        super().__init__(make.alternate(resnets, num_attentions, width))
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
            # To the size of the next skip connection: twice as large, unless an odd size was halved.
            hidden = upsampler(hidden, output_size=skips[-1].shape[-2:])
        return hidden, skips


class _LayerFactory:
    """Makes ResNets and Transformers with the settings common to all blocks, and puts them in order."""

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

    def alternate(
        self, resnets: list[nn.Module], num_attentions: int, width: int, transformer_first: bool = False
    ) -> list[nn.Module]:
        """Return ResNets and new Transformers, alternating until one kind is used up; or ResNets first, unmixed."""
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
        raise InputError(
            f"configurations: all lists must have the same length, one entry for each block, got {lengths}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
