"""Linear layers for generation on the CPU: the fastest product for few rows, and int8 weights."""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x (rows, in), weight (out, in) and perhaps a bias (out,) → `x @ weight.T + bias` (rows, out)."""


def product_from_the_left(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The transposed product. In bfloat16 on an Intel Xeon (Sapphire Rapids), it reads the matrices of GPT-2 small 1.2
    to 1.6 times as fast as the usual one."""
    if len(x) == 1:
        y = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
        return y[None]
    return (torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())).t()


def product_in_halves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A batched product over two halves of the matrix. In float32 for one row, it is three times as fast as the usual
    one on an AMD EPYC (Zen 4), and half as fast on an Intel Xeon (Sapphire Rapids)."""
    rows, n = x.shape
    halves, columns = weight.view(2, -1, n), x.t().expand(2, n, rows)
    y = torch.bmm(halves, columns) if bias is None else torch.baddbmm(bias.view(2, -1, 1), halves, columns)
    return y.view(-1, rows).t()


def product_in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A batched product over parts of 16 outputs. In float32 for 8 rows on an Intel Xeon (Sapphire Rapids), it reads
    the matrices of GPT-2 small 1.8 times as fast as the usual one."""
    rows, n = x.shape
    parts = weight.view(-1, 16, n).transpose(1, 2)
    x = x.expand(len(parts), rows, n)
    y = torch.bmm(x, parts) if bias is None else torch.baddbmm(bias.view(-1, 1, 16), x, parts)
    return y.transpose(0, 1).reshape(rows, -1)


PRODUCTS: tuple[Product, ...] = (nn.functional.linear, product_from_the_left, product_in_halves, product_in_parts)
_fastest: dict[tuple[object, ...], Product] = {}


def fastest_product(x: Tensor, weights: list[Tensor]) -> Product:
    """Returns the fastest of `PRODUCTS` on this machine for x (rows, in) and weights (out, in) of one shape.

    Measures once for each shape and dtype; for GPT-2 small this takes as long as 15 tokens. All weights are read in
    turn, so that they come from memory and not from a cache, as they do in generation. A product replaces the usual one
    only if it is at least a tenth faster.
    """
    rows = (len(x) - 1).bit_length()  # 1, 2, 3 to 4, 5 to 8, … rows
    key = (*weights[0].shape, len(weights), rows, x.dtype, torch.get_num_threads())
    if key not in _fastest:
        rounds = [[seconds_of(product, x, weights) for product in PRODUCTS] for _ in range(3)]
        usual, *others = map(min, zip(*rounds, strict=True))
        _fastest[key] = PRODUCTS[1 + others.index(min(others))] if min(others) < 0.9 * usual else PRODUCTS[0]
    return _fastest[key]


def seconds_of(product: Product, x: Tensor, weights: list[Tensor]) -> float:
    """Returns the time that the products with all weights take, after one product that is not timed."""
    product(x, weights[0], None)
    start = time.perf_counter()
    for weight in weights:
        product(x, weight, None)
    return time.perf_counter() - start


class FewRowsLinear(nn.Linear):
    """A linear layer for decoding on the CPU, where the input has few rows and reading the weights takes all the time.

    Computes the same as `nn.Linear`, for large weights by the product that is fastest on this machine.
    """

    weights_of_this_shape: list[Tensor]  # of the whole model, to measure with
    chosen: dict[int, Product]  # for each number of rows so far

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        product = self.chosen.get(len(rows)) or self.choose(rows)
        return product(rows, self.weight, self.bias).reshape(*x.shape[:-1], -1)

    def choose(self, x: Tensor) -> Product:
        """Returns the product for x (rows, in). For many rows and small weights it is the usual one."""
        if len(x) > 32 or self.weight.numel() < 2**18 or self.out_features % 16:
            return PRODUCTS[0]
        self.chosen[len(x)] = fastest_product(x, self.weights_of_this_shape)
        return self.chosen[len(x)]


def speed_up_decoding(model: nn.Module) -> None:
    """Turns a model's linear layers, if they are on the CPU, into `FewRowsLinear`."""
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            by_shape[module.weight.shape].append(module.weight)
            module.__class__ = FewRowsLinear
            assert isinstance(module, FewRowsLinear)
            module.weights_of_this_shape, module.chosen = by_shape[module.weight.shape], {}


def quantize_weights(model: nn.Module) -> None:
    """Stores the weights of a model's linear layers as int8 with one scale per output, for the CPU.

    Activations are quantized on the fly. This is PyTorch's dynamic quantization, which is deprecated but still in 2.13;
    `torch._weight_int8pack_mm` replaces it in the first PyTorch without it. Today that takes twice the time, and
    torchao (0.18, not compiled) is slower than float32.
    """
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see above
        quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
