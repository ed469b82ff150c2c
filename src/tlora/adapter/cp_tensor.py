"""LoRTA's tensor inside PEFT's own LoRA layers: factors shared by all layers, heads and matrices.

The update of projection p in layer l has a term for each component k of the tensor:

    dW[l, p][(h, i), j] = s sum_k B[i, k] H[h, k] P[p, k] L[l, k] A[j, k]

for a projection that outputs heads (query, key, value); a projection that reads heads (output) gets
the transpose. So one side of each LoRA is A (d x r), and the other has the rows B diag(H_h P_p L_l)
of every head h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tlora.adapter.freeze import lora_layers
from tlora.calibration.hidden_states import block_of
from tlora.calibration.weights import Target
from tlora.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel


class CpTensor(nn.Module):
    """The factors: A `wide` (d x r), B `head` (d_h x r), and a row for each head, layer and matrix.

    B starts at zero; A and the others are drawn as by the authors, from torch's global generator.
    """

    def __init__(self, sizes: Sequence[int], rank: int, like: Tensor) -> None:
        """Make the factors of ``sizes`` d, d_h, heads, layers and matrices on ``like``'s device."""
        super().__init__()
        wide, head, heads, layers, matrices = (like.new_zeros(size, rank) for size in sizes)
        nn.init.kaiming_uniform_(wide, a=5**0.5)
        for factor in (layers, heads, matrices):
            nn.init.kaiming_uniform_(factor, a=0.0)
        self.wide, self.head = nn.Parameter(wide), nn.Parameter(head)
        self.heads, self.layers = nn.Parameter(heads), nn.Parameter(layers)
        self.matrices = nn.Parameter(matrices)

    def heads_of(self, layer: int, matrix: int) -> Tensor:
        """Return the side of a projection that has heads, (heads d_h) x r."""
        scaled = self.heads * self.layers[layer] * self.matrices[matrix]
        return (scaled[:, None] * self.head).flatten(0, 1)


class CpFactor(nn.Module):
    """Replaces a layer's `lora_A` or `lora_B`."""

    def __init__(self, tensor: CpTensor, place: tuple[int, int] | None, first: bool) -> None:
        """Take the head side of the projection at ``place`` (layer, matrix); None: A.

        ``first``: the place of `lora_A`, whose matrix is r x d.
        """
        super().__init__()
        self.tensor, self.place, self.first = tensor, place, first

    @property
    def weight(self) -> Tensor:
        """The matrix, as PEFT's Linear there has it."""
        tensor = self.tensor
        side = tensor.wide if self.place is None else tensor.heads_of(*self.place)
        return side.T if self.first else side

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the Linear that this replaces."""
        weight = self.weight
        return nn.functional.linear(x.to(weight.dtype), weight.to(x.device))


@dataclass(frozen=True)
class Projection:
    """A module with a slice of the tensor: its position, and whether it reads heads."""

    name: str
    layer: str
    matrix: str
    reads: bool


Groups = dict[tuple[int, int], list[Projection]]
"""The projections of each tensor, by d and the number of heads."""


def grouped(heads: Sequence[Target], readers: Sequence[Target], head_dim: int) -> Groups:
    """Group projections by d and number of heads; each group shares one tensor.

    With grouped-query attention, keys and values have fewer heads and therefore their own tensor.

    Args:
        heads: modules that output heads.
        readers: modules that read heads.
        head_dim: d_h.

    Raises:
        ConfigError: a module's name has no layer number, or its size is not a multiple of d_h.
    """
    groups: Groups = {}
    for target in (*heads, *readers):
        reads = target in readers
        d, inner = (target.d_out, target.d_in) if reads else (target.d_in, target.d_out)
        layer = block_of(target.name)
        if layer is None or inner % head_dim:
            what = f"no heads of {head_dim}" if layer else "no layer's number in its name"
            raise ConfigError(
                f"{target.name} has {what}, and LoRTA shares factors over layers and "
                "heads; choose the attention's projections by `head_modules` and "
                "`output_modules`.",
                where="adapter",
            )
        matrix = target.name.removeprefix(f"{layer}.")
        member = Projection(target.name, layer, matrix, reads)
        groups.setdefault((d, inner // head_dim), []).append(member)
    return groups


def make_lorta(model: PeftModel, groups: Groups, head_dim: int, rank: int) -> None:
    """Turn LoRA layers freshly wrapped by PEFT into shared factors."""
    adapted: dict[str, Any] = dict(lora_layers(model.base_model.model))
    for (d, heads), members in groups.items():
        layers = list(dict.fromkeys(member.layer for member in members))
        matrices = list(dict.fromkeys(member.matrix for member in members))
        like = adapted[members[0].name].lora_A["default"].weight.detach()
        tensor = CpTensor((d, head_dim, heads, len(layers), len(matrices)), rank, like)
        for member in members:
            place = (layers.index(member.layer), matrices.index(member.matrix))
            a, b = (place, None) if member.reads else (None, place)
            adapted[member.name].lora_A["default"] = CpFactor(tensor, a, True)
            adapted[member.name].lora_B["default"] = CpFactor(tensor, b, False)
