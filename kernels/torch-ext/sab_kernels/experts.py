"""Products of rows with packed weights of many experts, each row with those that it is given."""

import torch
from torch import Tensor

from .device import computing_dtype, on_device
from .expert_batch import multiply_expert_batch
from .expert_decode import multiply_expert_decode
from .expert_product import ExpertProduct
from .geometry import Geometry, ceil_div
from .linear import DTYPES
from .tuning import Launch, device_launch, expert_candidates, fastest, settings_key, tunes


def experts_linear(
    rows: Tensor, experts: Tensor, tensors: dict[str, Tensor], geometry: Geometry, bias: Tensor | None, repeats: int
) -> Tensor:
    """Of every pair of a row and an expert ``row Ŵ[expert]ᵀ + b[expert]``, [pairs, out_features] in the rows' dtype.

    Three ways by the number of pairs for an expert: a few one by one, more in tiles of up to eight pairs of one expert,
    both through the 8-bit matrix unit (expert_decode.py; not for fp32 rows, which it would round to 15 bits), and any
    number in larger tiles through operands made in registers (expert_batch.py). One launch computes all pairs. Nothing
    waits for the device, and no size depends on what ``experts`` has in it.

    Args:
        rows: [pairs / repeats, in_features], fp32, bf16 or fp16; any strides.
        experts: int [pairs]: whose expert, in any order. Outside 0 … E − 1 there is none, and the result is zeros.
        tensors: of every expert in the kernel layout (layout.py), each stacked along a new first dimension of size E.
        geometry: of one expert.
        bias: [E, out_features], floating, or None.
        repeats: pair s has row s // repeats, at least 1.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message has the value.
    """
    _check(rows, experts, tensors, geometry, repeats)
    count, pairs = tensors["weight"].shape[0], experts.numel()
    if bias is not None and bias.shape != (count, geometry.rows):
        raise ValueError(f"the bias is {tuple(bias.shape)}; {count} experts take [{count}, {geometry.rows}].")
    if pairs == 0 or count == 0:
        return torch.zeros(pairs, geometry.rows, dtype=rows.dtype, device=rows.device)
    dtype = computing_dtype(rows.dtype, rows.device)
    x = rows.to(dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    output = torch.empty(pairs, geometry.rows, dtype=dtype, device=rows.device)
    biases = () if bias is None else (bias.contiguous(),)
    product = ExpertProduct(
        x, tensors, geometry, (geometry.rows,), biases, (output,), ids=experts.contiguous(), repeats=repeats
    )
    with on_device(rows.device):
        run_experts(product, _launch(product))
    return output.to(rows.dtype)


def expert_way(pairs: int, experts: int, dtype: torch.dtype, launch: Launch) -> tuple[str, int]:
    """Which kernel runs, ``"decode"`` or ``"batch"``, and how many pairs of an expert it takes together at most."""
    if dtype != torch.float32:
        if pairs <= launch.expert_single * experts:
            return "decode", 1
        if pairs <= launch.expert_decode * experts:
            return "decode", 4 if pairs <= 2 * experts else 8
    most = 16 if dtype == torch.float32 else launch.expert_tokens  # as in small_batch.py
    return "batch", min(most, max(16, 1 << (ceil_div(pairs, experts) - 1).bit_length()))


def run_experts(product: ExpertProduct, launch: Launch) -> None:
    """Write the outputs of a product."""
    way, size = expert_way(product.tokens, product.experts, product.x.dtype, launch)
    multiply = multiply_expert_decode if way == "decode" else multiply_expert_batch
    multiply(product, launch, size)


def _launch(product: ExpertProduct) -> Launch:
    device, pairs, dtype = product.x.device, product.tokens, product.x.dtype
    launch = device_launch(device)
    if not tunes(device):
        return launch
    key = f"{product.experts} experts {settings_key(pairs, product.geometry, dtype)}"
    options = expert_candidates(pairs, product.experts, dtype, launch)
    return fastest(device, key, options, lambda option: run_experts(product, option))


def _check(rows: Tensor, experts: Tensor, tensors: dict[str, Tensor], geometry: Geometry, repeats: int) -> None:
    if experts.dim() != 1 or experts.dtype.is_floating_point or experts.dtype == torch.bool:
        raise ValueError(f"the experts are {experts.dtype} {tuple(experts.shape)}; they are whole numbers, [pairs].")
    if repeats < 1 or experts.numel() % repeats:
        raise ValueError(f"{experts.numel()} pairs are not rows that are repeated {repeats} times.")
    expected = (experts.numel() // repeats, geometry.columns)
    if rows.shape != expected:
        raise ValueError(
            f"the rows are {tuple(rows.shape)}; {experts.numel()} pairs with repeats={repeats} take {expected}."
        )
    if rows.dtype not in DTYPES:
        raise ValueError(f"the rows are {rows.dtype}; the kernels take float32, bfloat16 or float16.")
    weight = tensors["weight"]
    if rows.device != weight.device or experts.device != weight.device:
        raise ValueError(
            f"the rows are on {rows.device}, the experts on {experts.device}, the weight on {weight.device}; they "
            "belong on one device."
        )
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} with strides {tensor.stride()}; of {weight.shape[0]} experts it is "
                "to be stacked along the first dimension, and contiguous."
            )
