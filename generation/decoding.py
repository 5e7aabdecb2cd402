"""Linear layers for decoding on the CPU."""

import warnings

import torch
import torch.nn as nn


class FewRowsLinear(nn.Linear):
    """A linear layer for decoding on the CPU, where the input has few rows and reading the weights takes all the time.

    The same function as `nn.Linear`. On an AMD EPYC (Zen 4), the product of a matrix and a vector that PyTorch calls
    reads the weights at 14.6 GB/s, the batched product of the matrix cut in parts at 50.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, rows = self.in_features, x.numel() // self.in_features
        if rows > 32 or self.out_features % 16 or x.dtype != torch.float32:
            return super().forward(x)
        flat = x.reshape(rows, n)
        if rows <= 4:
            y = torch.bmm(self.weight.view(2, -1, n), flat.t().expand(2, n, rows)).view(-1, rows).t()
        else:
            parts = self.weight.view(-1, 16, n).transpose(1, 2)
            y = torch.bmm(flat.expand(len(parts), rows, n), parts)
            y = y.transpose(0, 1).reshape(rows, -1)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def speed_up_decoding(model: nn.Module) -> None:
    """Has a model's linear layers, on the CPU and in float32, compute as `FewRowsLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = FewRowsLinear


def quantize_weights(model: nn.Module) -> None:
    """Stores the weights of a model's linear layers as int8, one scale per output; activations are quantized as they
    come. For the CPU, by PyTorch's own dynamic quantization: torchao 0.18, not compiled, was slower than float32.
    """
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao
        quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
