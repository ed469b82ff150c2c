"""`uniform`: one rank and scale 1 for all modules, readable by every server.

Pads A's rows and B's columns with zeros to R, the largest rank; folds the scale into B; sets `r`
and `lora_alpha` to R, without patterns. TGI and LoRAX pad ranks themselves and then divide alpha by
the padded one, so for them R is the padded rank. A projection adapted in some layer appears in
every layer, filled with zeros if untrained: TGI and LoRAX drop a projection missing in one layer,
and LMDeploy reads uninitialized memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch

from tlora.adapter.saved import PREFIX, SavedLora, shape_of
from tlora.errors import listed
from tlora.exporters.base import Export, Source, counted, refuse, write_lora
from tlora.exporters.compact import baked
from tlora.exporters.servers import SERVERS, stacked_rank
from tlora.training.model_card import span

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The layer number in a module's name."""
_CARRIED = ("trained modules", "trained rows", "other tensors")
"""Parts besides the matrices that PEFT and classifier servers read."""


class Uniform:
    """Writes one rank, scale 1 and no gaps."""

    needs: ClassVar[str | None] = None

    def write(self, source: Source, folder: Path) -> Export:
        """Write the folder; see `Exporter`."""
        lora = source.lora
        lacking = [words for words in lora.lacks() if not words.startswith(_CARRIED)]
        refuse(lora, "`uniform`", lacking, "use --format native or merged")
        ranks = {name: lora.rank(name) for name in lora.keys}
        server = source.config.server
        rank = (SERVERS[server].padded if server else int)(max(ranks.values()))
        tensors = baked(lora, source.config.dtype)
        for name, (a, b) in lora.keys.items():
            more = rank - ranks[name]
            tensors[a] = torch.nn.functional.pad(tensors[a], (0, 0, 0, more))
            tensors[b] = torch.nn.functional.pad(tensors[b], (0, more))
        missing = gaps(lora, source.sizes)
        dtype = tensors[next(iter(lora.keys.values()))[0]].dtype
        for name, (d_out, d_in) in missing.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.zeros(rank, d_in, dtype=dtype)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(d_out, rank, dtype=dtype)
        names = [*lora.keys, *missing]
        fields = lora.fields | {
            "r": rank,
            "lora_alpha": rank,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": target_list(names, source.sizes or names),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "init_lora_weights": True,
        }
        write_lora(folder, fields, tensors)
        notes = _notes(ranks, rank, missing)
        if not server and rank != stacked_rank(rank):
            notes.append(
                f"TGI and LoRAX pad rank {rank} to {stacked_rank(rank)} and divide alpha by it;"
                " for these servers, export with --for tgi."
            )
        if source.sizes is None:
            notes.append(
                "The base model's configuration was not found, so layers above the last adapted one"
                " are not filled with zeros; give --model."
            )
        return Export(notes, rank)


def _notes(ranks: dict[str, int], rank: int, missing: dict[str, tuple[int, int]]) -> list[str]:
    notes = []
    padded = [each for each in ranks.values() if each < rank]
    if padded:
        notes.append(
            f"Padded with zeros to rank {rank}: {len(padded)} of {len(ranks)} modules (of rank"
            f" {span(padded)})."
        )
    if missing:
        notes.append(
            f"Filled with zeros: {counted(missing, 'module')} without an adapter"
            f" ({listed([*missing])})."
        )
    return notes


def gaps(lora: SavedLora, sizes: dict[str, tuple[int, int]] | None) -> dict[str, tuple[int, int]]:
    """Return d_out and d_in of modules that are adapted in other layers but not in their own.

    Args:
        lora: the adapter.
        sizes: sizes of the base's linear layers; None: a module is missing if a later layer or
            another projection of its layer is adapted, and has its size from other layers.
    """
    forms: dict[str, tuple[int, int]] = {}
    for name, (a, b) in lora.keys.items():
        forms[_LAYER.sub("*", name)] = (
            shape_of(lora.tensors, b)[0],
            shape_of(lora.tensors, a)[1],
        )
    if sizes is not None:
        return {
            name: size
            for name, size in sizes.items()
            if name not in lora.keys and _LAYER.sub("*", name) in forms
        }
    last: dict[str, int] = {}
    for name in lora.keys:
        if match := _LAYER.search(name):
            stem = name[: match.start()]
            last[stem] = max(last.get(stem, 0), int(match[0]))
    found = {}
    for form, size in forms.items():
        stem, star, rest = form.partition("*")
        for number in range(last[stem] + 1) if star and "*" not in rest else ():
            name = f"{stem}{number}{rest}"
            if name not in lora.keys:
                found[name] = size
    return found


def target_list(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the last name parts if they match no other known name, else the full names."""
    ours = set(names)
    ends = sorted({name.rpartition(".")[2] for name in ours})
    matched = {name for name in known if name.rpartition(".")[2] in ends}
    return ends if matched <= ours else sorted(ours)
