"""Networks of somebody else for the fuzz: inverted residuals, with and without squeeze-excite, of plain modules."""

from __future__ import annotations

import torch
from fuzz_draw import CHANNELS, Draw, draw_input, draw_unit
from torch import Tensor, nn


class Stored(nn.Module):
    """Where an operation that is no module stores its result, which rounds it: the yardstick looks at modules."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class InvertedResidual(nn.Module):
    """Modules stand in the order in which they are called, as the judge's masks do."""

    def __init__(self, draw: Draw, c: int, c_out: int, size: float) -> None:
        super().__init__()
        wide = draw.choice(CHANNELS)
        self.expand = nn.Sequential(*draw_unit(draw, "pointwise", c, wide, size))
        depthwise = draw_unit(draw, "depthwise", wide, wide, 1.0)
        conv = depthwise[0]
        conv.padding = (conv.kernel_size[0] // 2,) * 2  # no image gets too small
        self.depthwise = nn.Sequential(*depthwise)
        squeezed = draw.choice([None, 1, 4, 9])
        self.reduce = self.act = self.widen = None
        if squeezed is not None:
            self.reduce, self.act, self.widen = nn.Conv2d(wide, squeezed, 1), nn.SiLU(), nn.Conv2d(squeezed, wide, 1)
            self.hard = draw.chance(0.5)
        self.project = nn.Sequential(*draw_unit(draw, "pointwise", wide, c_out, 1.0)[:2])
        self.gated, self.sum = Stored(), Stored()
        self.adds = conv.stride == (1, 1) and c == c_out and draw.chance(0.8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        if self.reduce is not None:
            gate = self.widen(self.act(self.reduce(y.mean((2, 3), keepdim=True))))
            y = self.gated(y * (nn.functional.hardsigmoid(gate) if self.hard else gate.sigmoid()))
        y = self.project(y)
        return self.sum(y + x) if self.adds else y


def draw_blocks(draw: Draw, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """One to three blocks, and a unit with an activation, perhaps with a pooling at the end. Without the activation
    most gradients would be zero after batch statistics, and nothing left of them but rounding."""
    c = draw.choice(CHANNELS)
    x, size = draw_input(draw, c, dtype)
    blocks: list[nn.Module] = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        c_out = c if draw.chance(0.6) else draw.choice(CHANNELS)
        blocks.append(InvertedResidual(draw, c, c_out, size))
        c, size = c_out, 1.0
    blocks.append(nn.Sequential(*draw_unit(draw, "pointwise", c, draw.choice(CHANNELS), 1.0)))
    if draw.chance(0.3):
        blocks.append(nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*blocks), x
