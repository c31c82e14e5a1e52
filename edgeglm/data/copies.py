"""Pictures that are the same to the eye: scaled, encoded again, or saved once more.

A thumbnail has a brightness in each of 16 by 16 fields, and two colour differences in each of 4 by 4, since
JPEG keeps colours coarsely. Two pictures are near copies if their brightness differs by no more than a
tolerance in levels of 255, as a root of the mean square, and their colours by no more than twice that. At a
tolerance of 1 that holds for most founding icons encoded as JPEG of quality 90 or scaled by a quarter, at 2
for most encoded with 75 or halved; no held icon comes within 1 of one that trains.

Shapes: N images, S pixels of a side, P values of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

FIELDS, COLOUR_FIELDS = 16, 4
#: Within it a picture is a copy, without doubt.
TOLERANCE = 1.0
#: Within it a picture may be one: it does no harm to keep two that are not on one side.
LIKENESS = 2.0
_BATCH = 256
#: Of red, green and blue: brightness and two differences of colour, as JPEG has them (ITU-R BT.601).
_YCC = np.array([[0.299, -0.168736, 0.5], [0.587, -0.331264, -0.418688], [0.114, 0.5, -0.081312]], np.float32)

Thumbnails = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def thumbnails_of(images_NSS3: npt.NDArray[np.uint8], chosen: Sequence[int]) -> Thumbnails:
    """Return brightness and colours of the chosen images, float32 [len(chosen), P] each, in levels of 255."""
    side = int(images_NSS3.shape[1])
    block = max(1, side // FIELDS)
    fields = side // block
    coarse = max(1, fields // COLOUR_FIELDS)
    kept = fields // coarse * coarse
    bright = np.empty((len(chosen), fields * fields), np.float32)
    colours = np.empty((len(chosen), 2 * (fields // coarse) ** 2), np.float32)
    for start in range(0, len(chosen), _BATCH):
        place = np.asarray(chosen[start : start + _BATCH], np.int64)
        batch = np.asarray(images_NSS3[place])[:, : fields * block, : fields * block]
        rows = np.zeros((len(batch), fields, fields * block, 3), np.uint32)
        for i in range(block):
            rows += batch[:, i::block]
        mean = np.add.reduce([rows[:, :, i::block] for i in range(block)]).astype(np.float32) / block**2
        told = mean @ _YCC
        where = slice(start, start + len(batch))
        bright[where] = told[..., 0].reshape(len(batch), -1)
        parts = told[:, :kept, :kept, 1:].reshape(len(batch), kept // coarse, coarse, -1, coarse, 2)
        colours[where] = parts.mean((2, 4)).reshape(len(batch), -1)
    return bright, colours


def near_pairs(
    one: Thumbnails, other: Thumbnails, *, tolerance: float = TOLERANCE
) -> Iterator[tuple[int, int]]:
    """Yield the places of thumbnails, one in each set, that are near copies.

    Means differ by no more than thumbnails do, so only those of nearly equal mean brightness are compared.
    """
    (bright_NP, colour_NP), (bright_MP, colour_MP) = one, other
    if not len(bright_NP) or not len(bright_MP):
        return
    mean_N, mean_M = bright_NP.mean(1), bright_MP.mean(1)
    order = np.argsort(mean_M, kind="stable")
    low = np.searchsorted(mean_M[order], mean_N - tolerance - 1e-3, side="left")
    high = np.searchsorted(mean_M[order], mean_N + tolerance + 1e-3, side="right")
    for i in range(len(bright_NP)):
        near = order[low[i] : high[i]]
        apart = np.sqrt(np.square(bright_MP[near] - bright_NP[i]).mean(1))
        near = near[apart <= tolerance]
        apart = np.sqrt(np.square(colour_MP[near] - colour_NP[i]).mean(1))
        for j in near[apart <= 2.0 * tolerance].tolist():
            yield i, int(j)
