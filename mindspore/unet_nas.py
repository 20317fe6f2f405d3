"""U-Net-NAS on MindSpore, from MindONE's ResNet and Transformer blocks.

The architecture and the names of the parameters are those of ``decinb/unet_nas.py``, so the same weights load.
"""

from itertools import zip_longest
from typing import Any

import mindspore as ms
import numpy as np
from mindone.diffusers import ConfigMixin, ModelMixin
from mindone.diffusers.configuration_utils import register_to_config
from mindone.diffusers.models.downsampling import Downsample2D
from mindone.diffusers.models.embeddings import TimestepEmbedding
from mindone.diffusers.models.resnet import ResnetBlock2D
from mindone.diffusers.models.transformers.transformer_2d import Transformer2DModel
from mindone.diffusers.models.upsampling import Upsample2D
from mindspore import Tensor, mint, nn


class UNetNAS(ModelMixin, ConfigMixin):
    """The U-Net-NAS denoiser: a noisy latent, a timestep and a text embedding in, the model's prediction out.

    Args:
        configurations: the architecture, as in the ``config.json`` of the U-Net.
        in_channels, out_channels: channels of the latent.
        sample_size: height and width of the latent that the model was trained for; other sizes work.
        norm_num_groups: groups of every group norm.
    """

    @register_to_config
    def __init__(
        self,
        configurations: dict[str, Any],
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
        table = configurations
        widths_in, widths_out = table["down_blocks_in_channels"], table["down_blocks_out_channels"]
        parts = _Parts(table, norm_num_groups)

        self.conv_in = mint.nn.Conv2d(in_channels, widths_in[0], kernel_size=3, padding=1)
        self.time_proj = _Timesteps(widths_in[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(widths_in[0], table["temb_dim"], act_fn=table["resnet_act_fn"])
        down = zip(
            widths_in,
            widths_out,
            table["down_blocks_num_resnets"],
            table["down_blocks_num_attentions"],
            table["add_downsample"],
            strict=True,
        )
        self.down_blocks = nn.CellList([DownBlock(parts, *row) for row in down])
        self.mid_block = MidBlock(
            parts,
            widths_out[-1],
            table["mid_num_resnets"],
            table["mid_num_attentions"],
            table["add_upsample_mid_block"],
        )
        up = zip(
            table["prev_output_channels"],
            reversed(widths_out),
            reversed(widths_in),
            table["up_blocks_num_resnets"],
            table["up_blocks_num_attentions"],
            table["add_upsample"],
            strict=True,
        )
        self.up_blocks = nn.CellList([UpBlock(parts, *row) for row in up])
        self.conv_norm_out = mint.nn.GroupNorm(norm_num_groups, widths_in[0], eps=norm_eps)
        self.conv_act = mint.nn.SiLU()
        self.conv_out = mint.nn.Conv2d(widths_in[0], out_channels, kernel_size=3, padding=1)

    def construct(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,
        timestep_cond: None = None,
        cross_attention_kwargs: None = None,
        added_cond_kwargs: None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Predict from a noisy latent.

        Args:
            sample: noisy latent, (batch, in_channels, height, width).
            timestep: one for all rows, or one for each row, from 0 to 999.
            encoder_hidden_states: text embedding, (batch, tokens, cross_attention_dim).
            timestep_cond, cross_attention_kwargs, added_cond_kwargs: accepted because pipelines pass them; ignored.
            return_dict: accepted because pipelines pass it; the result is a tuple, as everywhere in MindONE.

        Returns:
            The prediction, in the shape of ``sample``.
        """
        if not isinstance(timestep, Tensor):
            timestep = ms.tensor(timestep)
        timestep = timestep.reshape(-1).broadcast_to((sample.shape[0],))
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))

        hidden = self.conv_in(sample)
        skips = (hidden,)
        for block in self.down_blocks:
            hidden, skips = block(hidden, skips, temb, encoder_hidden_states)
        skips = skips[:-1]  # the output of the last down block goes to the mid block only
        hidden = self.mid_block(hidden, temb, encoder_hidden_states, skips[-1].shape[-2:])
        for block in self.up_blocks:
            hidden, skips = block(hidden, skips, temb, encoder_hidden_states)
        return (self.conv_out(self.conv_act(self.conv_norm_out(hidden))),)


class _Timesteps(nn.Cell):
    """Sinusoidal embedding of timesteps.

    MindONE's computes the frequencies with MindSpore's ``exp``, which on a CPU is off by 4e-6. Times a timestep of
    hundreds that is an error of 1e-3 in the sine's argument, so here they come from NumPy.
    """

    def __init__(self, width: int, flip_sin_to_cos: bool, freq_shift: int):
        super().__init__()
        half = width // 2
        exponent = -np.log(10000) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
        self.frequencies = ms.Tensor(np.exp(exponent).astype(np.float32)[None, :])
        self.flip_sin_to_cos = flip_sin_to_cos

    def construct(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.reshape(-1, 1).to(ms.float32) * self.frequencies
        sin, cos = mint.sin(angles), mint.cos(angles)
        return mint.cat([cos, sin] if self.flip_sin_to_cos else [sin, cos], dim=-1)


class DownBlock(nn.Cell):
    """On the way down, a skip is kept after every ResNet and after the downsampler."""

    def __init__(self, parts: "_Parts", width_in: int, width: int, num_resnets: int, num_attentions: int, down: bool):
        super().__init__()
        resnets = [parts.resnet(w, width) for w in [width_in] + [width] * (num_resnets - 1)]
        self.modules_list, self.is_resnet = parts.arrange(resnets, num_attentions, width)
        self.downsamplers = nn.CellList([Downsample2D(width, use_conv=True, name="op")] if down else [])

    def construct(self, hidden: Tensor, skips: tuple[Tensor], temb: Tensor, text: Tensor) -> tuple:
        for module, is_resnet in zip(self.modules_list, self.is_resnet):
            if is_resnet:
                hidden = module(hidden, temb)
                skips = (*skips, hidden)
            else:
                hidden = module(hidden, text)[0]
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden)
            skips = (*skips, hidden)
        return hidden, skips


class MidBlock(nn.Cell):
    """The lowest resolution, where skips are neither kept nor used."""

    def __init__(self, parts: "_Parts", width: int, num_resnets: int, num_attentions: int, up: bool):
        super().__init__()
        resnets = [parts.resnet(width, width) for _ in range(num_resnets)]
        entry = parts.resnet(width, width)
        self.modules_list, self.is_resnet = parts.arrange(resnets, num_attentions, width, entry)
        self.upsamplers = nn.CellList([Upsample2D(width, use_conv=True)] if up else [])

    def construct(self, hidden: Tensor, temb: Tensor, text: Tensor, size: tuple[int, int]) -> Tensor:
        # The first ResNet runs twice: on entry, and as the first of the list. The published weights were trained so.
        hidden = self.modules_list[0](hidden, temb)
        for module, is_resnet in zip(self.modules_list, self.is_resnet):
            hidden = module(hidden, temb) if is_resnet else module(hidden, text)[0]
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden, size)
        return hidden


class UpBlock(nn.Cell):
    """On the way up, each ResNet takes the last unused skip as additional channels."""

    def __init__(
        self,
        parts: "_Parts",
        width_before: int,
        width: int,
        width_last_skip: int,
        num_resnets: int,
        num_attentions: int,
        up: bool,
    ):
        super().__init__()
        inputs = [width_before] + [width] * (num_resnets - 1)
        skips = [width] * (num_resnets - 1) + [width_last_skip]
        resnets = [parts.resnet(a + b, width) for a, b in zip(inputs, skips, strict=True)]
        self.modules_list, self.is_resnet = parts.arrange(resnets, num_attentions, width)
        self.upsamplers = nn.CellList([Upsample2D(width, use_conv=True)] if up else [])

    def construct(self, hidden: Tensor, skips: tuple[Tensor], temb: Tensor, text: Tensor) -> tuple:
        for module, is_resnet in zip(self.modules_list, self.is_resnet):
            if is_resnet:
                hidden = module(mint.cat([hidden, skips[-1]], dim=1), temb)
                skips = skips[:-1]
            else:
                hidden = module(hidden, text)[0]
        for upsampler in self.upsamplers:
            # To the size of the next skip: twice the size, except where a latent did not halve evenly.
            hidden = upsampler(hidden, skips[-1].shape[-2:])
        return hidden, skips


class _Parts:
    """Make ResNets and Transformers with the settings that all blocks share, and arrange them in order."""

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

    def arrange(
        self, resnets: list[nn.Cell], num_attentions: int, width: int, entry: ResnetBlock2D | None = None
    ) -> tuple[nn.CellList, list[bool]]:
        """Return the modules in order, and which of them are ResNets. After an ``entry`` a Transformer comes first."""
        transformers = [self.transformer(width) for _ in range(num_attentions)]
        if not self.table["mix_block_in_forward"]:
            modules = [*resnets, *transformers]
        else:
            first, second = (resnets, transformers) if entry is None else (transformers, resnets)
            modules = [module for pair in zip_longest(first, second) for module in pair if module is not None]
        modules = modules if entry is None else [entry, *modules]
        return nn.CellList(modules), [isinstance(module, ResnetBlock2D) for module in modules]
