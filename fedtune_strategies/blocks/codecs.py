"""Codecs for weights on the wire: the frozen rest on its way down, a block's change on its way up.

A codec is one quantisation with an optional pruning before it: ``"int8"``, ``"prune:0.5+nf4"``. `encode` turns named
tensors into named *parts* that safetensors can store; the part names say everything that `decode` needs, so a receiver
never asks which codec the sender used:

=================  =====================================================================================
part               holds
=================  =====================================================================================
``w``              the tensor itself (exact, or rounded to bfloat16)
``w:int8``         int8 codes, one float32 scale for each row (all but the last dimension) in ``w:scale``
``w:nf4``          two 4-bit codes a byte, one float32 scale for each 64 elements in ``w:scale``
``w:sign``         one bit an element, 1 where it is not negative; in ``w:scale`` the mean magnitude of each row, or of
                   the tensor where rows are shorter than 64 elements
``w:kept``         with pruning: one bit an element, 1 where the code is sent; ``w:values`` holds bf16 or exact values
``w:shape``        int64 shape, where the codes do not show it
=================  =====================================================================================

Tensors with fewer than two dimensions (norm gains, biases) are always sent exactly: they are few and they matter.
Decoding uses only operations with one IEEE rounding each, so the same bits come out on every CPU; so does encoding, but
for the means of ``sign``, which the sender alone takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fedtune_strategies.blocks.codec_config import Codec
from fedtune_strategies.errors import ModelError, ProtocolError

NF4_BLOCK = 64
PIECE = 2**20  # elements that are in float32 at a time, beside a tensor of any size
SIGN_ROW = 64  # fewest elements of a row for which a scale is worth its 32 bits

# Quantiles of a standard normal, scaled to [-1, 1]: QLoRA (arXiv 2305.14314), appendix E.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_ZERO = NF4_VALUES.index(0.0)


def encode(tensors: Mapping[str, Tensor], codec: Codec) -> dict[str, Tensor]:
    """Code tensors into parts that safetensors can store: contiguous, on the CPU. A name holds no colon."""
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        coded = _encode_tensor(tensor.detach().cpu(), codec)
        if not torch.isfinite(coded.get("scale", torch.zeros(1))).all():
            raise ModelError(f"tensor {name} holds a value that is not finite; start again from sound weights")
        parts.update({f"{name}:{kind}" if kind else name: part.contiguous() for kind, part in coded.items()})
    return parts


def decode(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `encode`, as far as its codec can be undone: float32 tensors in the order of the parts."""
    return {name: tensor.float() for name, tensor in decode_each(parts)}


def decode_each(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield what `decode` returns one by one, with its bfloat16 tensors as they travel: so few take memory at once."""
    coded: dict[str, dict[str, Tensor]] = {}
    for part_name, part in parts.items():
        name, _, kind = part_name.partition(":")
        coded.setdefault(name, {})[kind] = part
    for name, own in coded.items():
        try:
            tensor = _decode_tensor(own)
        except (KeyError, IndexError, ValueError, RuntimeError):
            raise ProtocolError(
                f"the coded parts of tensor {name} do not fit together; both sides must run the same version"
            ) from None
        yield name, tensor


def decode_rows(parts: Mapping[str, Tensor], name: str, rows: slice | Tensor) -> Tensor:
    """Decode some rows of one matrix, the very bits of `decode`; where a codec has rows of their own, no others."""
    if f"{name}:kept" in parts:
        return decode(parts)[name][rows]
    if name in parts:
        return parts[name][rows].float()
    if f"{name}:int8" in parts:
        own = {"int8": parts[f"{name}:int8"][rows], "scale": parts[f"{name}:scale"][rows]}
        return _decode_tensor(own)
    columns = int(parts[f"{name}:shape"][1])
    if columns % NF4_BLOCK:
        return decode(parts)[name][rows]
    packed = parts[f"{name}:nf4"].view(-1, columns // 2)[rows]
    scale = parts[f"{name}:scale"].view(-1, columns // NF4_BLOCK)[rows]
    return _from_nf4(packed.flatten(), scale.flatten(), len(packed) * columns).view(-1, columns)


def encoded_size(parts: Mapping[str, Tensor]) -> int:
    """Bytes of the parts, without the header of the file that holds them."""
    return sum(part.numel() * part.element_size() for part in parts.values())


def _encode_tensor(tensor: Tensor, codec: Codec) -> dict[str, Tensor]:
    if tensor.dim() < 2:
        return {"": tensor}
    if not codec.prune:
        return _quantise(tensor, codec.quantisation, None)
    kept = _kept(tensor, codec.prune)
    coded = _quantise(torch.where(kept, tensor, 0), codec.quantisation, kept)
    return {**coded, "kept": _pack_bits(kept), "shape": torch.tensor(tensor.shape)}


def _quantise(tensor: Tensor, quantisation: str, kept: Tensor | None) -> dict[str, Tensor]:
    """Quantise a whole tensor; send its codes, or with pruning only those kept."""
    if quantisation == "int8":
        codes, scale = _to_int8(tensor)
        return {"int8": codes if kept is None else codes[kept], "scale": scale}
    if quantisation == "nf4":
        codes, scale = _to_nf4(tensor)
        sent = codes if kept is None else codes[kept.flatten()]
        return {"nf4": _pack_nibbles(sent), "scale": scale, "shape": torch.tensor(tensor.shape)}
    if quantisation == "sign":
        return {**_to_signs(tensor), "shape": torch.tensor(tensor.shape)}
    values = tensor.to(torch.bfloat16) if quantisation == "bf16" else tensor
    return {"": values} if kept is None else {"values": values[kept]}


def _decode_tensor(coded: Mapping[str, Tensor]) -> Tensor:
    if "" in coded:
        return coded[""]
    shape = coded["shape"].tolist() if "shape" in coded else list(coded["int8"].shape)
    kept = _unpack_bits(coded["kept"], shape) if "kept" in coded else None
    if "int8" in coded:
        codes = coded["int8"] if kept is None else _scatter(coded["int8"], kept, 0)
        return codes.float().mul_(coded["scale"].unsqueeze(-1)).view(shape)
    if "nf4" in coded:
        packed = coded["nf4"]
        if kept is not None:
            packed = _pack_nibbles(_scatter(_unpack_nibbles(packed)[: int(kept.sum())], kept, NF4_ZERO).flatten())
        return _from_nf4(packed, coded["scale"], math.prod(shape)).view(shape)
    if "sign" in coded:
        signs = _unpack_bits(coded["sign"], shape).float().mul_(2).sub_(1)
        return signs.mul_(coded["scale"].unsqueeze(-1)).view(shape)
    if kept is None:
        raise KeyError("kept")
    return _scatter(coded["values"], kept, 0).float()


def _kept(tensor: Tensor, share: float) -> Tensor:
    """Mask of what survives pruning: in each row all but the `share` lowest scores; a tie keeps all its elements."""
    scores = tensor.abs().float()
    pruned = int(share * scores.shape[-1])
    threshold = scores.kthvalue(pruned + 1, dim=-1, keepdim=True).values
    return (scores >= threshold) & (tensor != 0)


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 for each row: codes like the tensor, float32 scale of its shape without the last dimension.

    The experts of a layer are one tensor [experts, out, in], and each of their rows has its own scale.
    """
    rows = tensor.flatten(0, -2)
    codes, scale = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows))
    # Some rows at a time: float32 of a whole embedding, and twice, may be as large as the model.
    some = max(1, PIECE // rows.shape[-1])
    for own, code, largest in zip(rows.split(some), codes.split(some), scale.split(some), strict=True):
        values = own.float()
        largest.copy_(values.abs().amax(dim=-1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny))
        code.copy_((values / largest.unsqueeze(-1)).round_().clamp_(-127, 127))
    return codes.view(tensor.shape), scale.view(tensor.shape[:-1])


def _to_signs(tensor: Tensor) -> dict[str, Tensor]:
    """One bit an element, and the mean magnitudes, which of all scales have the least squared error."""
    magnitudes = tensor.float().abs()
    scale = magnitudes.mean(dim=-1) if tensor.shape[-1] >= SIGN_ROW else magnitudes.mean()
    return {"sign": _pack_bits(tensor >= 0), "scale": scale}


def _to_nf4(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit NormalFloat in blocks of 64: one code for each element [n] as uint8, float32 scale [blocks]."""
    flat = tensor.flatten().float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = blocks.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    values = torch.tensor(NF4_VALUES)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / scale.unsqueeze(1), middles, out_int32=True)
    return codes.to(torch.uint8).flatten()[: flat.numel()], scale


def _from_nf4(packed: Tensor, scale: Tensor, count: int) -> Tensor:
    """Values [count], float32, of packed codes of `_to_nf4`: a byte's two values are looked up together."""
    values = torch.tensor(NF4_VALUES, device=packed.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)
    flat = torch.index_select(pairs, 0, packed.int()).flatten()[:count]
    whole = count - count % NF4_BLOCK
    flat[:whole].view(-1, NF4_BLOCK).mul_(scale[: whole // NF4_BLOCK].unsqueeze(1))
    flat[whole:].mul_(scale[whole // NF4_BLOCK :])
    return flat


def _scatter(sent: Tensor, kept: Tensor, fill: int) -> Tensor:
    """Put what was sent where it was kept, and `fill` elsewhere."""
    full = torch.full(kept.shape, fill, dtype=sent.dtype, device=sent.device)
    full[kept] = sent
    return full


def _pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy()))


def _unpack_bits(packed: Tensor, shape: list[int]) -> Tensor:
    if packed.shape != (-(-math.prod(shape) // 8),):  # numpy would make up what is missing
        raise ValueError("another number of bits")
    bits = np.unpackbits(packed.cpu().numpy(), count=math.prod(shape))
    return torch.from_numpy(bits).to(packed.device).bool().view(shape)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half."""
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=1).flatten()
