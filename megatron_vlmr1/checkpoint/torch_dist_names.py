"""What megatron-core's GPTModel calls a model's tensors in a checkpoint, and the published rows that make them up."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlmr1.models import families
from megatron_vlmr1.models.pieces import FUSED, OF_A_LAYER, Block, Piece
from megatron_vlmr1.models.shape import VlmShape

LANGUAGE_PREFIX = "language_model."

_LAYERS = "decoder.layers."
# What may have an extra state: megatron-core does not load a checkpoint without those that its modules have.
_STATES_OF_A_LAYER = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_FC1 = "mlp.linear_fc1.weight"


@dataclass(frozen=True)
class Part:
    """A tensor of the language model or of the tower, or one layer's share of a stacked one, and what it is made of."""

    prefix: str
    name: str  # Megatron's, behind the prefix; within the layer where it is a layer's
    layer: int | None
    shape: tuple[int, ...]  # of this layer's share
    blocks: tuple[Block, ...]  # rows of published tensors, one after another

    @property
    def key(self) -> str:
        """What megatron-core calls it, of either layer spec: all layers' shares are one tensor, stacked."""
        middle = "" if self.layer is None else _LAYERS
        return self.prefix + middle + FUSED.get(self.name, self.name)

    @property
    def vocabulary(self) -> bool:
        """Whether rows of padding may follow."""
        return self.name in (EMBEDDING, _OUTPUT)

    def places(self) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
        """Return all that it may be called: keys that hold equal shares of its rows, and the layer's index there.

        Layers are stacked or numbered, norms fused or apart, and gate and up one tensor or two.
        """
        names = dict.fromkeys((FUSED.get(self.name, self.name), self.name))
        if self.layer is None:
            return [((self.prefix + name,), ()) for name in names]
        stacked, numbered = self.prefix + _LAYERS, f"{self.prefix}{_LAYERS}{self.layer}."
        found: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
        for before, index in ((stacked, (self.layer,)), (numbered, ())):
            found += [((before + name,), index) for name in names]
            if self.name == _FC1:
                found.append(((f"{before}{_FC1}_w", f"{before}{_FC1}_v"), index))
        return found


def parts(shape: VlmShape, prefix: str = LANGUAGE_PREFIX) -> list[Part]:
    """Return the parts of all of a model's tensors, in the order of its layers; the tower under its published names.

    Args:
        shape: the model.
        prefix: of the language model's keys.
    """
    family, text = families.of(shape), shape.text
    sizes = family.tensor_shapes(shape)

    def part(name: str, layer: int | None = None) -> Part:
        blocks = tuple(_rows(piece, sizes) for piece in family.text_pieces(shape, name, layer, 0, 1))
        rows = sum(stop - start for _, start, stop in blocks)
        return Part(prefix, name, layer, (rows, *sizes[str(blocks[0][0])][1:]), blocks)

    out = [part(EMBEDDING)]
    out += [part(name, layer) for layer in range(text.num_layers) for name in OF_A_LAYER]
    out += [part("decoder.final_layernorm.weight")] + ([] if text.tied else [part(_OUTPUT)])
    for name, size in sizes.items():
        if name.startswith(family.VISION_PREFIX):
            out.append(Part("", name, None, size, ((name, 0, size[0]),)))
    held = [(str(name), start, stop) for found in out for name, start, stop in found.blocks]
    assert {name for name, _, _ in held} == sizes.keys()
    assert sum(stop - start for _, start, stop in held) == sum(size[0] for size in sizes.values())
    return out


def extra_states(shape: VlmShape, prefix: str = LANGUAGE_PREFIX) -> list[str]:
    """Return the keys of all extra states that the language model's modules may have; those of FP8 hold something."""
    layers = shape.text.num_layers
    return [f"{prefix}decoder.final_layernorm._extra_state/shard_0_1"] + [
        f"{prefix}{_LAYERS}{module}._extra_state/shard_{layer}_{layers}"
        for module in _STATES_OF_A_LAYER
        for layer in range(layers)
    ]


def _rows(piece: Piece, sizes: dict[str, tuple[int, ...]]) -> Block:
    """Return a piece as rows: on one rank, what is cut along columns is whole."""
    assert piece.name is not None
    if piece.dim == 0:
        return piece.name, piece.start, piece.stop
    assert (piece.start, piece.stop) == (0, sizes[piece.name][piece.dim])
    return piece.name, 0, sizes[piece.name][0]
