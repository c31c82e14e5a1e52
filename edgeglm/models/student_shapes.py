"""The named sizes of students that a recipe chooses from; no torch, so that a recipe is checked at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeglm.core.errors import UserError, unknown_name


@dataclass(frozen=True, kw_only=True)
class StudentShape:
    """One named size.

    Attributes:
        blocks: How many blocks of Lite0 the image tower keeps; with ``patch``, how many Transformer layers.
        channels: Channels after the last block, before flattening.
        factor: Size of a token's embedding before it is widened.
        width: Width of the text Transformer.
        layers: Its depth.
        heads: Its attention heads.
        patch: Side of the patches of an image Transformer, in pixels; 0 for a convolutional tower.
        patch_width: Width of the image Transformer; its heads are 32 wide.
        heir: Whether the text tower is built as the teacher's is (normalised after each sum, as wide), and
            starts from its layers.
        feedforward: Width inside a text layer's feed-forward part; 0 is four times ``width``.
    """

    blocks: int
    channels: int
    factor: int
    width: int
    layers: int
    heads: int
    patch: int = 0
    patch_width: int = 0
    heir: bool = False
    feedforward: int = 0

    @property
    def inner(self) -> int:
        """Width inside a text layer's feed-forward part."""
        return self.feedforward or 4 * self.width


STUDENTS: dict[str, StudentShape] = {
    "edge-xs": StudentShape(blocks=8, channels=48, factor=48, width=128, layers=1, heads=4),
    "edge-s": StudentShape(blocks=11, channels=64, factor=64, width=160, layers=2, heads=4),
    "edge-m": StudentShape(blocks=15, channels=96, factor=96, width=256, layers=2, heads=4),
    # An image Transformer in place of convolutions, and a text tower that inherits a layer of MiniLM-L6.
    "edge-vit": StudentShape(
        blocks=4, channels=16, factor=64, width=160, layers=2, heads=4, patch=8, patch_width=160
    ),
    "edge-heir": StudentShape(blocks=11, channels=64, factor=64, width=384, layers=1, heads=12, heir=True),
    # Nearly as light as edge-s: a third of the layer's feed-forward part, and a narrower table.
    "edge-heir-s": StudentShape(
        blocks=11, channels=64, factor=56, width=384, layers=1, heads=12, heir=True, feedforward=512
    ),
}
#: What grows from one to the next; a search begins with them.
FAMILY = ("edge-xs", "edge-s", "edge-m")

_SPELLED = re.compile(r"b(\d+)c(\d+)-f(\d+)w(\d+)l(\d+)")
_MOST_BLOCKS = 16
_HEADS = 4


def student_shape(size: str) -> StudentShape:
    """Return the shape of a size: a named one, or one spelled as :func:`spelled` does.

    Raises:
        UserError: The name is unknown (it names the nearest), or what is spelled cannot be built.
    """
    if size in STUDENTS:
        return STUDENTS[size]
    found = _SPELLED.fullmatch(size)
    if found is None:
        raise unknown_name("student size", size, STUDENTS)
    blocks, channels, factor, width, layers = map(int, found.groups())
    if not 1 < blocks <= _MOST_BLOCKS or not all((channels, factor, width, layers)) or width % _HEADS:
        raise UserError(
            f"no student can be of the size {size!r}: it takes 2 to {_MOST_BLOCKS} blocks, nothing may be 0, "
            f"and its width must be a multiple of {_HEADS}; set student.size to 'edge-s'"
        )
    return StudentShape(
        blocks=blocks, channels=channels, factor=factor, width=width, layers=layers, heads=_HEADS
    )


def spelled(*, blocks: int, channels: int, factor: int, width: int, layers: int) -> str:
    """Return the size of a convolutional student with such a shape: its name, else it spelled.

    ``b11c64-f64w160l2`` has 11 blocks and 64 channels, factor 64, width 160 and 2 layers: it is ``edge-s``.
    """
    shape = StudentShape(
        blocks=blocks, channels=channels, factor=factor, width=width, layers=layers, heads=_HEADS
    )
    known = {each: name for name, each in STUDENTS.items()}
    return known.get(shape, f"b{blocks}c{channels}-f{factor}w{width}l{layers}")


def require_inheritance(wanted: tuple[int, int], found: tuple[int, int] | None) -> None:
    """Check that an heir can take a layer of its teacher's text tower.

    Args:
        wanted: The width of the student's layer, and that of its feed-forward part.
        found: Those of the teacher's; None for a tower without the layers of a BERT.

    Raises:
        UserError: It cannot.
    """
    if found is None:
        raise UserError(
            "the teacher's text tower has no layers of BERT to inherit; set student.size to 'edge-s'"
        )
    if found[0] != wanted[0]:
        raise UserError(
            f"the teacher's text tower is {found[0]} wide and the student's {wanted[0]}, so that its layers "
            "cannot be inherited; set student.size to 'edge-s'"
        )
    if found[1] < wanted[1]:
        raise UserError(
            f"the feed-forward part of the teacher's text tower has {found[1]} units and the student's "
            f"{wanted[1]}, so that it cannot be inherited; set student.size to 'edge-s'"
        )
