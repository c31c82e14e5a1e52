"""The text side of a teacher: a pretrained tower, LoRA on it, and its merge back.

Shapes: B batch, L tokens, F features, D embedding dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeglm.adapt.targets import chosen_targets
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.recipe import TeacherConfig
from edgeglm.data.tokenization import Tokenizer
from edgeglm.models.published import text_model_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeglm.adapt.frozen_prefix import KeptPrefix
    from edgeglm.models.hf_towers import HfTextTower

_MERGE_ATOL = 1e-5
_ENCODE_BATCH = 128


@dataclass(kw_only=True)
class TextTeacher:
    """A text tower that may be tuned, with its tokenizer.

    ``before`` is the tower as it was before it was tuned, where a head reads that too: the features of both
    then follow one another, [B, 2 F].
    """

    tower: HfTextTower
    tokenizer: Tokenizer
    max_length: int
    lowercase: bool = False
    prefix: KeptPrefix | None = None
    before: HfTextTower | None = None

    @property
    def width(self) -> int:
        """How many features one tower says of a text."""
        return self.tower.feature_dim

    def module(self) -> nn.Module:
        """Return what takes tokens and their mask to features."""
        from edgeglm.models.conse import BothTowers

        return self.tower if self.before is None else BothTowers(self.tower, self.before)

    def parameters(self) -> int:
        """Return the number of weights; what tuning left as it was counts once."""
        import torch

        own = list(self.tower.parameters())
        more = [] if self.before is None else list(self.before.parameters())
        changed = [one for one in more if not any(torch.equal(one, other) for other in own)]
        return sum(parameter.numel() for parameter in (*own, *changed))

    def features(self, texts: Sequence[str]) -> Tensor:
        """Return features float32 [B, F] on the tower's device, with gradients where it is tuned."""
        import torch

        ids, mask = self.tokenizer.encode(list(texts), max_length=self.max_length)
        if self.prefix is not None:
            self.prefix.choose(texts, ids.shape[1])
        device = next(self.tower.parameters()).device
        found: Tensor = self.module()(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
        return found

    def all_features(self, texts: Sequence[str]) -> Tensor:
        """Return features float32 [B, F] of many texts, without gradients, texts of one length together.

        They are in the host's memory wherever the tower is.
        """
        import torch

        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        out = torch.empty(len(texts), self.width * (1 if self.before is None else 2))
        self.tower.eval()
        with torch.no_grad():
            for start in range(0, len(order), _ENCODE_BATCH):
                chosen = order[start : start + _ENCODE_BATCH]
                out[chosen] = self.features([texts[i] for i in chosen]).cpu()
        return out


def read_in_part(teacher: TextTeacher, texts: Sequence[str]) -> dict[str, int]:
    """Return how many texts a tower reads, how many it cuts at ``tokens``, and of how many it knows nothing.

    The latter hold no token but the one for what the vocabulary lacks, and are all alike.
    """
    before, after = teacher.tokenizer.frame()
    unknown = teacher.tokenizer.unknown_id
    most = teacher.max_length - len(before) - len(after)
    tokens = [[token for token, _, _ in teacher.tokenizer.pieces(text)] for text in texts]
    return {
        "texts": len(texts),
        "tokens": teacher.max_length,
        "cut": sum(len(row) > most for row in tokens),
        "unknown": sum(set(row) <= {unknown} for row in tokens),
    }


def load_text_teacher(name: str, source: Artifact, scratch: Path, *, max_length: int) -> TextTeacher:
    """Load the text tower that the recipe calls ``name``.

    Args:
        name: A catalogue asset, ``hf:owner/name``, or a folder.
        source: The fetched asset.
        scratch: A folder for the files of a packed asset.
        max_length: The most tokens; less where the model takes less.
    """
    from edgeglm.models.pretrained_hf import is_dual_encoder, load_dual_encoder, load_text_tower

    folder = text_model_folder(name, source, scratch)
    lowercase = False
    if is_dual_encoder(folder):
        _, tower, preprocessing = load_dual_encoder(folder)
        lowercase = preprocessing.lowercase
    else:
        tower = load_text_tower(folder)
    return TextTeacher(
        tower=tower,
        tokenizer=Tokenizer(tower.tokenizer_path, lowercase=lowercase),
        max_length=min(max_length, tower.max_length),
        lowercase=lowercase,
    )


def keep_entries(teacher: TextTeacher, texts: Sequence[str], count: int, folder: Path) -> None:
    """Leave ``count`` entries of the vocabulary, and their rows of the input table, in place.

    Texts whose tokens were all kept get the same features as before (Abdaoui et al., "Load what you need",
    2020).

    Args:
        teacher: Its tower must not be tuned yet.
        texts: Whose tokens must be kept.
        count: How many; 0, or as many as there are, keeps all.
        folder: Where the new ``tokenizer.json`` is written.

    Raises:
        UserError: ``count`` cannot hold what must be kept, or the model reads tokens by number.
    """
    import torch

    from edgeglm.data.vocabulary import trimmed_tokenizer

    tower = teacher.tower
    if not 0 < count < teacher.tokenizer.vocabulary_size:
        return
    if tower.end_id is not None or tower.pooling == "end" or tower.mask == "padded":
        raise UserError(
            "teacher.vocabulary does not fit a text tower that finds its end by a token's number; set it to 0"
        )
    trimmed = trimmed_tokenizer(
        tower.tokenizer_path, texts, count=count, lowercase=teacher.lowercase, key="teacher.vocabulary"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(trimmed.text, "utf-8")
    encoder: Any = tower.encoder
    table = encoder.get_input_embeddings().weight.detach()
    kept = torch.nn.Embedding(len(trimmed.kept), table.shape[1])
    kept.weight.data = table[torch.from_numpy(trimmed.kept)].clone()
    encoder.set_input_embeddings(kept)
    encoder.config.vocab_size = len(trimmed.kept)
    tower.tokenizer_path = path
    teacher.tokenizer = Tokenizer(path, lowercase=teacher.lowercase)


def require_untuned(encoder: Any) -> None:
    """Raise UserError if the encoder already carries what a way of tuning put there."""
    if hasattr(encoder, "peft_config") or any(
        type(module).__name__ in ("BottleneckBlock", "PromptedEncoder") for module in encoder.modules()
    ):
        raise UserError("the text tower is being tuned already; merge what it has before tuning it again")


def linear_names(encoder: Any) -> set[str]:
    """Return the last names of the encoder's linear layers."""
    from torch import nn

    return {name.rpartition(".")[2] for name, m in encoder.named_modules() if isinstance(m, nn.Linear)}


def enable_lora(teacher: TextTeacher, config: TeacherConfig) -> list[Any]:
    """Put low-rank adapters on the tower and return the parameters to train (Hu et al., LoRA, 2022).

    Raises UserError if the target modules match nothing; it lists names that exist.
    """
    from peft import LoraConfig, get_peft_model

    from edgeglm.adapt.merged_lora import merge_products

    encoder = teacher.tower.encoder
    require_untuned(encoder)
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type] # peft scales by it; a float does
        lora_dropout=config.lora_dropout,
        target_modules=chosen_targets(config.lora_targets, linear_names(encoder), type(encoder).__name__),
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5 for a name that is to go
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        teacher.tower.encoder = get_peft_model(encoder, settings)
    merge_products(teacher.tower.encoder)
    teacher.tower.projection.requires_grad_(False)
    return [parameter for parameter in teacher.tower.encoder.parameters() if parameter.requires_grad]


def merge_lora(teacher: TextTeacher, probe: Sequence[str]) -> float:
    """Fold the adapters into the weights and return the largest difference on ``probe`` texts.

    Raises EdgeglmError if it exceeds 1e-5: then the merge would not be what was trained.
    """
    before = teacher.all_features(probe)
    adapted: Any = teacher.tower.encoder
    teacher.tower.encoder = adapted.merge_and_unload()
    teacher.tower.requires_grad_(False)
    difference = float((teacher.all_features(probe) - before).abs().max())
    if not difference <= _MERGE_ATOL * max(1.0, float(before.abs().max())):
        raise EdgeglmError(
            f"merging LoRA changes features by {difference:.3g}; report it with the version of peft"
        )
    return difference
