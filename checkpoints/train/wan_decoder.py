"""The decoder of emoji-wan's VAE, mostly worked out instead of trained: AutoencoderKLWan's layers, weights set by hand.

The latents are linear (clip_latents), so what turns them into pixels is known; only Wan's layers must be made to do it.
Here that is done for all that follows the first level; train_wan_decoder trains the first level, where the latents'
noise is taken away and finer detail is added.

* A residual block is norm, SiLU, convolution, norm, SiLU, convolution. A channel with a large constant makes its norms
  divide by that constant, and values far above zero pass SiLU unchanged. So channels hold value + OFFSET, and a block
  can compute anything that one hidden layer can.
* To choose between values, a hidden unit holds value + BIAS where its gate is open, and is far below zero where not.
* Enlarging repeats pixels. The place channels grow by 1 from pixel to pixel; compared with the neighbours they tell
  left from right and top from bottom, and each new pixel picks its own part of the one it came from.
* The emoji moves by one pixel of each level in a frame of that level: by a latent cell in a latent frame, by half of it
  in half the time, and so on. So of two frames made of one, the first takes each pixel from its neighbour ahead, and
  the second stays as it is.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d, WanResample, WanResidualBlock
from torch import Tensor, nn

from checkpoints.train.clip_latents import CELLS, MOTION, PATCH, PICTURE_CHANNELS, PLACE, latent_basis
from checkpoints.train.clips import FRAMES, SIDE, render_clip, training_clips
from checkpoints.train.pictures import to_signed

CELL_VALUES = 23  # principal components of 8x8 pixels, of 192; the latents hold the first 12
HALF_CELL_VALUES = 14  # principal components of 4x4 pixels, of 48
SCALE = 0.25  # of picture values in channels: they must stay small beside OFFSET and BIAS
OFFSET = 16.0
CONSTANT = 1000.0
HIDDEN_CONSTANT = 30_000.0
BIAS = 10.0
CLOSED = 30.0  # how far a unit with a closed gate is below BIAS

QUARTERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))  # (row, column): above or below, left or right
WAYS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # (row, column): right, left, down, up

Part = tuple[Tensor, Tensor]  # the values of a quarter from those of the whole: a matrix and what is added


@dataclass(frozen=True)
class Stream:
    """Which channel holds what, between the blocks of a level."""

    values: int  # channels 0 to `values` - 1 hold the picture
    offset: float
    width: int
    side: int  # pixels

    @property
    def constant(self) -> int:
        return self.width - 1

    def place(self, axis: int) -> int:
        """Row (0) or column (1), 0 in the middle of the picture."""
        return self.width - 3 + axis

    def quarter(self, axis: int) -> int:
        """-1 or 1: which half of the pixel that this one was made of."""
        return self.width - 5 + axis

    def motion(self, axis: int) -> int:
        """-1, 0 or 1: the way of the emoji, down or right."""
        return self.width - 7 + axis

    def motion_now(self, axis: int) -> int:
        """The same in frames that are to be moved at this level; 0 in others."""
        return self.width - 9 + axis


class Row:
    """One output channel of a convolution, put together from what it reads."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, channel: int, stream: Stream) -> None:
        # [inputs, rows, columns], of the newest frame
        self.taps = conv.weight[channel] if conv.weight.ndim == 4 else conv.weight[channel, :, -1]
        self.taps.zero_()
        assert conv.bias is not None
        conv.bias[channel] = 0.0
        self.stream = stream

    def add(self, channel: int, factor: float, at: tuple[int, int] = (0, 0)) -> "Row":
        """Read a value, of the pixel `at` (rows down, columns right); outside of the picture it is 0."""
        row, column = self.taps.shape[1] // 2 + at[0], self.taps.shape[2] // 2 + at[1]
        self.taps[channel, row, column] += factor
        self.taps[self.stream.constant, row, column] -= factor * self.stream.offset / CONSTANT
        return self

    def add_constant(self, value: float, at: tuple[int, int] = (0, 0)) -> "Row":
        """Add a number where the pixel `at` is in the picture."""
        row, column = self.taps.shape[1] // 2 + at[0], self.taps.shape[2] // 2 + at[1]
        self.taps[self.stream.constant, row, column] += value / CONSTANT
        return self


def set_decoder(vae: AutoencoderKLWan) -> None:
    """Set the weights of the decoder of `train_wan_vae.build_vae`."""
    decoder = vae.decoder
    with torch.no_grad():
        nn.init.dirac_(vae.post_quant_conv.weight)
        vae.post_quant_conv.bias.zero_()
        attention = decoder.mid_block.attentions[0].proj
        blocks = [module for module in decoder.modules() if isinstance(module, WanResidualBlock)]
        for layer in [attention, *(block.conv2 for block in blocks)]:  # nothing is added unless set below
            layer.weight.zero_()
            layer.bias.zero_()
        cells = _set_input(decoder)
        halves = _set_level(decoder, 1, cells, _quarters_of_cells())
        pixels = _set_level(decoder, 2, halves, _quarters_of_halves())
        _set_output(decoder, pixels)


def first_stream(decoder: WanDecoder3d) -> Stream:
    """The channels of the first level; those between the picture's and the rest are for its blocks to use."""
    return Stream(CELL_VALUES, 0.0, decoder.conv_in.out_channels, CELLS)


def _set_input(decoder: WanDecoder3d) -> Stream:
    """Latents to the channels of the first level, whose blocks see its values as they are."""
    stream, conv = first_stream(decoder), decoder.conv_in
    conv.weight[:, :, :-1] = 0.0  # each frame for itself
    unused = [*range(CELL_VALUES, stream.motion_now(0))]
    named = [channel for channel in range(stream.width) if channel not in unused]
    conv.weight[named] = 0.0
    conv.bias.zero_()
    middle = conv.weight[:, :, -1, 1, 1]
    for channel in range(PICTURE_CHANNELS):
        middle[channel, channel] = SCALE
    for axis in (0, 1):  # latents hold (column, row) and (x, y)
        middle[stream.place(axis), PICTURE_CHANNELS + 1 - axis] = 1 / PLACE
        middle[stream.motion(axis), PICTURE_CHANNELS + 3 - axis] = 1 / MOTION
    conv.bias[stream.constant] = CONSTANT
    for block in first_blocks(decoder):
        block.norm1.gamma.fill_(CONSTANT / block.norm1.scale)
        block.norm1.gamma[stream.constant] = 1 / block.norm1.scale
        block.conv1.weight[:, :, :-1] = 0.0
    return stream


def first_blocks(decoder: WanDecoder3d) -> list[WanResidualBlock]:
    """The blocks of the first level."""
    return [*decoder.mid_block.resnets, *decoder.up_blocks[0].resnets]


def _set_level(decoder: WanDecoder3d, level: int, before: Stream, parts: list[Part]) -> Stream:
    """Twice as many frames, rows and columns; each pixel with its own part; half of the frames moved back."""
    between = _set_enlargement(decoder.up_blocks[level - 1].upsamplers[0], before)
    pick, move = decoder.up_blocks[level].resnets
    after = _set_pick(pick, between, parts)
    _set_move(move, after)
    return after


def _set_enlargement(resample: WanResample, before: Stream) -> Stream:
    """Each frame twice, to be moved and not; each pixel four times, with the quarter it is."""
    resample.time_conv.weight.zero_()
    for copy in range(2):
        for channel in range(before.width):
            row = Row(resample.time_conv, copy * before.width + channel, before)
            row.taps[channel] = 1.0
        for axis in (0, 1):
            row = Row(resample.time_conv, copy * before.width + before.motion_now(axis), before)
            row.add_constant(before.offset)
            if copy == 0:
                row.add(before.motion(axis), 1.0)
    conv = resample.resample[1]
    after = Stream(before.values, OFFSET, conv.out_channels, 2 * before.side)
    conv.weight.zero_()
    conv.bias.zero_()
    for channel in range(before.values):
        Row(conv, channel, before).add(channel, 1.0).add_constant(OFFSET)
    for axis in (0, 1):
        for copied, source in (
            (after.motion(axis), before.motion(axis)),
            (after.motion_now(axis), before.motion_now(axis)),
        ):
            Row(conv, copied, before).add(source, 1.0).add_constant(OFFSET)
        quarter = Row(conv, after.quarter(axis), before)
        _add_quarter(quarter, axis, 1.0)
        quarter.add_constant(OFFSET)
        place = Row(conv, after.place(axis), before).add(before.place(axis), 2.0)
        _add_quarter(place, axis, 0.5)
        place.add_constant(OFFSET)
    Row(conv, after.constant, before).add_constant(CONSTANT)
    return after


def _add_quarter(row: Row, axis: int, factor: float) -> None:
    """Add -1 or 1: of the two pixels made of one, the first has another on one side and itself on the other.

    The place is counted from 1 at either edge, so that what lies outside, 0, goes on with it.
    """
    edge = (row.stream.side + 1) / 2
    for way in (-1, 1):
        at = (way, 0) if axis == 0 else (0, way)
        for where, sign in ((at, factor), ((0, 0), -factor)):
            row.add(row.stream.place(axis), sign, where).add_constant(-way * sign * edge, where)


def _set_pick(block: WanResidualBlock, before: Stream, parts: list[Part]) -> Stream:
    """Each pixel's values become those of its quarter of the pixel it was made of."""
    values = len(parts[0][1])
    after = Stream(values, OFFSET, block.conv1.out_channels, before.side)
    _set_norms(block)
    block.conv_shortcut.weight.zero_()
    block.conv_shortcut.bias.zero_()
    for channel in range(values):
        Row(block.conv_shortcut, channel, before).add_constant(OFFSET)
    for channel in range(-9, 0):
        copied = before.width + channel
        Row(block.conv_shortcut, after.width + channel, before).taps[copied] = 1.0
    unit = 0
    for quarter, (matrix, added) in zip(QUARTERS, parts, strict=True):
        opened = unit + values  # the last unit of each quarter is the gate's own
        for value in range(values + 1):
            row = Row(block.conv1, unit + value, before).add_constant(BIAS - CLOSED)
            for axis in (0, 1):
                row.add(before.quarter(axis), quarter[axis] * CLOSED / 2)
            if value < values:
                for channel in range(before.values):
                    row.add(channel, float(matrix[value, channel]))
                row.add_constant(SCALE * float(added[value]))
                _add_difference(block.conv2, value, unit + value, opened)
        unit = opened + 1
    return after


def _set_move(block: WanResidualBlock, stream: Stream) -> None:
    """In frames with a motion each pixel's values become those of the next one ahead, if there is one."""
    _set_norms(block)
    unit = 0
    for way in WAYS:
        axis = 0 if way[0] else 1
        opened = unit + stream.values
        for value in range(stream.values + 1):
            row = Row(block.conv1, unit + value, stream).add_constant(BIAS - 2 * CLOSED)
            row.add(stream.motion_now(axis), way[axis] * CLOSED).add_constant(CLOSED, way)
            if value < stream.values:
                row.add(value, 1.0, way).add(value, -1.0)
                _add_difference(block.conv2, value, unit + value, opened)
        unit = opened + 1


def _set_norms(block: WanResidualBlock) -> None:
    """Make both norms divide by their constants only; the last hidden unit is the second one's."""
    block.norm1.gamma.fill_(CONSTANT / block.norm1.scale)
    block.norm2.gamma.fill_(HIDDEN_CONSTANT / block.norm2.scale)
    block.conv1.weight.zero_()
    block.conv1.bias.zero_()
    block.conv1.bias[-1] = HIDDEN_CONSTANT
    block.conv2.weight.zero_()
    block.conv2.bias.zero_()


def _add_difference(conv: nn.Conv3d, channel: int, unit: int, opened: int) -> None:
    conv.weight[channel, unit, -1, 1, 1] += 1.0
    conv.weight[channel, opened, -1, 1, 1] -= 1.0


def _set_output(decoder: WanDecoder3d, stream: Stream) -> None:
    """The values of the last level are pixels."""
    decoder.norm_out.gamma.fill_(CONSTANT / decoder.norm_out.scale)
    decoder.conv_out.weight.zero_()
    for channel in range(stream.values):
        Row(decoder.conv_out, channel, stream).add(channel, 1 / SCALE)


def _quarters_of_cells() -> list[Part]:
    """From the latents' principal components of 8x8 pixels to those of each 4x4."""
    mean, projection = latent_basis(CELL_VALUES)
    half_mean, half_basis = _half_cell_basis()
    pictures = torch.linalg.pinv(projection).reshape(-1, 3, 2, PATCH // 2, 2, PATCH // 2)
    means = mean.reshape(3, 2, PATCH // 2, 2, PATCH // 2)
    parts = []
    for row, column in QUARTERS:
        quarter = pictures[:, :, (row + 1) // 2, :, (column + 1) // 2].flatten(1)
        quarter_mean = means[:, (row + 1) // 2, :, (column + 1) // 2].flatten()
        parts.append(((quarter @ half_basis).T, (quarter_mean - half_mean) @ half_basis))
    return parts


def _quarters_of_halves() -> list[Part]:
    """From the principal components of 4x4 pixels to the colours of each 2x2, in the order of Wan's `unpatchify`."""
    half_mean, half_basis = _half_cell_basis()
    pixels = half_basis.reshape(3, 2, 2, 2, 2, -1)
    means = half_mean.reshape(3, 2, 2, 2, 2)
    parts = []
    for row, column in QUARTERS:
        quarter = pixels[:, (row + 1) // 2, :, (column + 1) // 2].transpose(1, 2).flatten(0, 2)
        parts.append((quarter, means[:, (row + 1) // 2, :, (column + 1) // 2].transpose(1, 2).flatten()))
    return parts


def _half_cell_basis() -> tuple[Tensor, Tensor]:
    """Mean [48] of 4x4 pixels in training clips, and their principal components [48, 14]; by colour, row, column."""
    frames = np.stack([render_clip(clip)[FRAMES // 2] for clip in training_clips()])
    half = PATCH // 2
    blocks = torch.from_numpy(to_signed(frames)).reshape(-1, SIDE // half, half, SIDE // half, half, 3)
    patches = blocks.permute(0, 1, 3, 5, 2, 4).flatten(0, 2).flatten(1)
    mean = patches.mean(dim=0)
    centred = patches - mean
    vectors = torch.linalg.eigh((centred.T @ centred).double())[1]
    return mean, vectors.flip(1)[:, :HALF_CELL_VALUES].float()
