"""Things seen through several styles, one of them unlabelled, and how many are called by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeglm.adapt.alignment import Alignment
from edgeglm.core.recipe import TeacherConfig
from edgeglm.data.pairs import Pair, PairSet, Role

CONFIG = TeacherConfig(
    embedding_dim=16, hidden=32, epochs=4, batch_size=32, lora_epochs=0, input_dropout=0.0, dropout=0.0
)
CONCEPTS, WIDTH = 24, 32


class Words:
    """Stands for a frozen text tower: a random vector for each text."""

    width = WIDTH

    def all_features(self, texts):
        rows = [np.random.default_rng(list(text.encode())).standard_normal(WIDTH) for text in texts]
        return torch.tensor(np.stack(rows), dtype=torch.float32)


def styled(tmp_path: Path, *, gap: float = 1.0) -> tuple[PairSet, Any]:
    """Two labelled styles and an unlabelled one: a concept's own vector, seen through each style."""
    rng = np.random.default_rng(0)
    own = rng.standard_normal((CONCEPTS, WIDTH))
    rows, features = [], []
    for domain in ("one", "two", "target"):
        gain, shift = np.exp(rng.normal(0, 0.3 * gap, WIDTH)), rng.normal(0, gap, WIDTH)
        for c in range(CONCEPTS):
            role: Role = "labelled" if domain != "target" else "unlabelled"
            name = f"thing {c}"
            rows.append(
                Pair(id=f"{domain}/{c}", text=name, captions=(name,), concept=name, domain=domain, role=role)
            )
            features.append(own[c] * gain + shift + rng.normal(0, 0.3, WIDTH))
    images = np.arange(len(rows) * 48, dtype=np.uint32).astype(np.uint8).reshape(len(rows), 4, 4, 3)
    images = images + np.arange(len(rows), dtype=np.uint8)[:, None, None, None]
    pairs = PairSet(path=tmp_path, images=images, rows=tuple(rows), tracks=(), licences=(), summary={})
    plain = torch.tensor(np.stack(features), dtype=torch.float32)
    noisy = plain + 0.1 * torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    return pairs, torch.stack([plain, noisy]).half()


def found_names(made: Alignment, pairs: PairSet) -> float:
    """Return the share of the unlabelled images whose nearest name is theirs."""
    image_MD = torch.from_numpy(made.image_embeddings()[0][pairs.by_role("unlabelled")])
    names = [f"thing {c}" for c in range(CONCEPTS)]
    with torch.no_grad():
        text_KD = made.text_head(made.text.all_features(names))
    return float(((image_MD @ text_KD.T).argmax(1) == torch.arange(CONCEPTS)).float().mean())
