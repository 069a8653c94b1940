"""`python pytorch.py FOLDER`: small networks as PyTorch's two exporters write them (torch 2.15, onnxscript 0.7)."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn


class Last(nn.Module):
    """A recurrent layer, and a product of its last state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.product = layer, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """The product of the last state."""
        return self.product(self.layer(x)[0][:, -1])


class Encoder(nn.Module):
    """One layer of a transformer's encoder, and the mean over its steps."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the steps."""
        return self.layer(x).mean(1)


class UNet(nn.Module):
    """One step down, one up."""

    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)
        )
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6())
        self.up, self.last = up, nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Both resolutions side by side, mixed."""
        x = self.first(x)
        return self.last(torch.cat([self.up(self.down(x)), x], 1))


class Gates(nn.Module):
    """Two inputs and three results."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A product of gates, half of it, and the largest of it."""
        h = torch.tanh(self.a(x)) * torch.sigmoid(self.b(y))
        return self.c(h), h.chunk(2, -1)[1], torch.clamp(h, -0.3, 0.4).amax(-1, keepdim=True)


def signal() -> nn.Module:
    """Of one axis."""
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, stride=2, padding=2), nn.InstanceNorm1d(8, affine=True), nn.PReLU(8),
        nn.Conv1d(8, 8, 3, groups=8, padding=1), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3),
        nn.Softmax(-1),
    )  # fmt: skip


def norms() -> nn.Module:
    """Of many kinds, and what PyTorch writes as a choice."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Mish(), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.LayerNorm([8, 6, 6]), nn.Softplus(), nn.AvgPool2d(3, 2, ceil_mode=True), nn.Hardswish(), nn.PixelShuffle(2),
    )  # fmt: skip


def networks() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """All of them, the same weights every time."""
    torch.manual_seed(0)
    image, series = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8)
    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    return {
        "lstm": (Last(nn.LSTM(8, 12, batch_first=True)), (series,)),
        "gru": (Last(nn.GRU(8, 6, batch_first=True, bidirectional=True)), (series,)),
        "encoder": (Encoder(False), (series,)),
        "encoder-first": (Encoder(True), (series,)),
        "unet": (UNet(up), (image,)),
        "unet-transposed": (UNet(nn.ConvTranspose2d(8, 8, 2, 2)), (image,)),
        "gates": (Gates(), (torch.randn(2, 6), torch.randn(2, 5))),
        "signal": (signal(), (torch.randn(2, 4, 32),)),
        "norms": (norms(), (image,)),
    }


def main() -> None:
    """Write every network twice."""
    folder = Path(sys.argv[1])
    for name, (network, samples) in networks().items():
        names = [f"x{i}" for i in range(len(samples))]
        for dynamo in (False, True):
            open_batch: dict[str, object] = (
                {"dynamic_shapes": tuple({0: torch.export.Dim.DYNAMIC} for _ in samples), "external_data": False}
                if dynamo
                else {"dynamic_axes": {n: {0: "batch"} for n in names}, "opset_version": 17}
            )  # fmt: skip
            path = folder / f"pytorch-{name}-{'dynamo' if dynamo else 'script'}.onnx"
            torch.onnx.export(
                network.eval(), samples, path, dynamo=dynamo, input_names=names, verbose=False, **open_batch
            )  # fmt: skip
            plain(path)


def plain(path: Path) -> None:
    """Leave out what says where and from which lines of Python it was made."""
    model = onnx.load(path)
    model.ClearField("doc_string")
    for place in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input,
                  *model.graph.output, *model.graph.initializer):  # fmt: skip
        place.ClearField("metadata_props")
        place.ClearField("doc_string")
    del model.graph.value_info[:]
    onnx.save(model, path)


if __name__ == "__main__":
    main()
