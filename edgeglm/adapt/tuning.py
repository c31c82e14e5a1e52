"""Ways to tune a text tower: adapters from peft, bottlenecks, prompts, some blocks or all, and the way back.

After :func:`merge_tuning` the tower is a plain module that says what was trained, ready for export. What peft
has is taken from peft. It lacks bottleneck adapters; the library ``adapters`` has them, but needs
transformers 4. peft's prompts take two-dimensional masks only, so its prompts are joined to texts here.

Shapes: B batch, L tokens, V virtual tokens, H hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.adapt.merged_lora import merge_products
from edgeglm.adapt.targets import chosen_targets
from edgeglm.adapt.text_teacher import TextTeacher, enable_lora, linear_names, merge_lora, require_untuned
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.recipe import TeacherConfig

_MERGE_ATOL = 1e-5
_PROMPTS = ("prompt", "p-tuning")


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where a transformers encoder keeps its embeddings and its blocks."""

    embeddings_owner: nn.Module
    blocks_owner: nn.Module
    blocks_name: str

    @property
    def blocks(self) -> nn.ModuleList:
        """The list of blocks, from first to last."""
        found = getattr(self.blocks_owner, self.blocks_name)
        assert isinstance(found, nn.ModuleList)
        return found


_ANY_MODEL = 'teacher.tuning = "lora" and teacher.tuned_blocks = 0'


def anatomy_of(encoder: nn.Module, *, remedy: str = _ANY_MODEL) -> Anatomy:
    """Find the longest list of blocks and the module called ``embeddings``.

    Raises UserError where there are none; ``remedy`` is what to set instead, in the user's words.
    """
    lists = [
        (len(child), owner, name)
        for owner in encoder.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    owners = [
        module for module in encoder.modules() if isinstance(getattr(module, "embeddings", None), nn.Module)
    ]
    if not lists or not owners:
        raise UserError(f"{type(encoder).__name__} has no blocks that could be told apart; set {remedy}")
    _, owner, name = max(lists, key=lambda item: item[0])
    return Anatomy(embeddings_owner=owners[-1], blocks_owner=owner, blocks_name=name)


def enable_tuning(teacher: TextTeacher, config: TeacherConfig) -> list[nn.Parameter]:
    """Make the tower trainable in the way the recipe names and return the parameters to train.

    Raises:
        UserError: The target modules match nothing, there are fewer blocks than are to be tuned, or the
            way does not fit the model.
    """
    encoder = teacher.tower.encoder
    require_untuned(encoder)
    if config.tuned_blocks or config.tuning == "partial":
        if config.tuning in _PROMPTS:
            raise UserError(
                "prompts come before the first block, so all blocks are tuned; set teacher.tuned_blocks to 0"
            )
        require_blocks(encoder, config.tuned_blocks)
    if config.tuning == "lora" and not config.tuned_blocks:
        return enable_lora(teacher, config)
    teacher.tower.requires_grad_(False)
    if config.tuning in _PROMPTS:
        return _enable_prompts(teacher, config)
    if config.tuning == "bottleneck":
        return _enable_bottlenecks(encoder, config)
    if config.tuning in ("partial", "full"):
        anatomy = anatomy_of(encoder)
        blocks = list(anatomy.blocks)[-config.tuned_blocks :] if config.tuned_blocks else [encoder]
        for block in blocks:
            block.requires_grad_(True)
    else:
        _enable_peft(teacher, config)
    return [parameter for parameter in teacher.tower.encoder.parameters() if parameter.requires_grad]


def merge_tuning(teacher: TextTeacher, probe: Sequence[str]) -> float:
    """Fold what was trained into a plain tower and return the largest difference on ``probe`` texts.

    Raises EdgeglmError if it exceeds 1e-5 of the features' scale.
    """
    encoder: Any = teacher.tower.encoder
    if hasattr(encoder, "merge_and_unload"):
        return merge_lora(teacher, probe)
    before = teacher.all_features(probe)
    if isinstance(encoder, PromptedEncoder):
        encoder.freeze()
    teacher.tower.requires_grad_(False)
    difference = float((teacher.all_features(probe) - before).abs().max())
    if not difference <= _MERGE_ATOL * max(1.0, float(before.abs().max())):
        raise EdgeglmError(f"merging changes features by {difference:.3g}; report it with the versions")
    return difference


def require_blocks(
    encoder: nn.Module, wanted: int, *, key: str = "teacher.tuned_blocks", remedy: str = _ANY_MODEL
) -> None:
    """Raise UserError if an encoder has not so many blocks; ``key`` is what the user knows ``wanted`` as."""
    count = len(anatomy_of(encoder, remedy=remedy).blocks)
    if not 1 <= wanted <= count:
        raise UserError(f"{key} is {wanted} and the text tower has {count} blocks; choose 1 to {count}")


def _enable_peft(teacher: TextTeacher, config: TeacherConfig) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    encoder = teacher.tower.encoder
    targets = chosen_targets(config.lora_targets, linear_names(encoder), type(encoder).__name__)
    settings: Any
    if config.tuning == "ia3":
        settings = IA3Config(target_modules=targets, feedforward_modules=[])
    else:
        count = len(anatomy_of(encoder).blocks) if config.tuned_blocks else 0
        chosen = list(range(count - config.tuned_blocks, count)) or None
        settings = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type] # peft scales by it; a float does
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            layers_to_transform=chosen,
            use_rslora=config.tuning == "rslora",
            use_dora=config.tuning == "dora",
        )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5 for a name that is to go
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        teacher.tower.encoder = get_peft_model(encoder, settings)
    merge_products(teacher.tower.encoder)
    if config.tuning == "ia3" and config.tuned_blocks:
        for block in list(anatomy_of(encoder).blocks)[: -config.tuned_blocks]:
            block.requires_grad_(False)


class BottleneckBlock(nn.Module):
    """A block, and added to what it says a narrow perceptron that starts as nothing.

    Houlsby et al. (2019), once a block as in Pfeiffer et al. (2021).
    """

    def __init__(self, block: nn.Module, width: int, rank: int) -> None:
        super().__init__()
        self.block = block
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Call the block and add the bottleneck to its hidden states [B, L, H]."""
        found = self.block(*arguments, **named)
        hidden_BLH = found[0] if isinstance(found, tuple) else found
        hidden_BLH = hidden_BLH + self.up(F.gelu(self.down(hidden_BLH)))
        return (hidden_BLH, *found[1:]) if isinstance(found, tuple) else hidden_BLH


def _enable_bottlenecks(encoder: nn.Module, config: TeacherConfig) -> list[nn.Parameter]:
    anatomy = anatomy_of(encoder)
    width = _hidden_size(encoder)
    blocks = list(anatomy.blocks)
    first = len(blocks) - config.tuned_blocks if config.tuned_blocks else 0
    device = next(encoder.parameters()).device
    for index in range(first, len(blocks)):
        blocks[index] = BottleneckBlock(blocks[index], width, config.lora_rank).to(device)
    setattr(anatomy.blocks_owner, anatomy.blocks_name, nn.ModuleList(blocks))
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


class _JoinedEmbeddings(nn.Module):
    """Puts V virtual tokens before the embedded ones."""

    kept_VH: Tensor | None

    def __init__(self, embeddings: nn.Module, prompt: nn.Module, count: int) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.prompt = prompt
        self.count = count
        self.register_buffer("kept_VH", None)

    def tokens(self) -> Tensor:
        """Return the virtual tokens [V, H]."""
        if self.kept_VH is not None:
            return self.kept_VH
        device = next(self.prompt.parameters()).device
        made: Tensor = self.prompt(torch.arange(self.count, device=device)[None])[0]
        return made

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        embedded_BLH: Tensor = self.embeddings(*arguments, **named)
        tokens_BVH = self.tokens().unsqueeze(0).expand(embedded_BLH.shape[0], -1, -1)
        return torch.cat([tokens_BVH, embedded_BLH], dim=1)


class PromptedEncoder(nn.Module):
    """An encoder that reads V trained tokens before each text; what it says to them is cut off again."""

    def __init__(self, encoder: nn.Module, prompt: nn.Module, count: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.count = count
        owner = anatomy_of(encoder).embeddings_owner
        assert isinstance(owner.embeddings, nn.Module)
        self._joined = [_JoinedEmbeddings(owner.embeddings, prompt, count)]  # a list: registered below
        owner.embeddings = self._joined[0]

    def freeze(self) -> None:
        """Compute the tokens once and drop what made them."""
        joined = self._joined[0]
        with torch.no_grad():
            joined.kept_VH = joined.tokens().clone()
        joined.prompt = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Encode [B, L] tokens under an additive mask [B, 1, 1, L]."""
        mask_B11M = F.pad(attention_mask, (self.count, 0), value=0.0)
        found = self.encoder(input_ids=input_ids, attention_mask=mask_B11M)
        found.last_hidden_state = found.last_hidden_state[:, self.count :]
        return found


def _enable_prompts(teacher: TextTeacher, config: TeacherConfig) -> list[nn.Parameter]:
    from peft import PromptEmbedding, PromptEncoder, PromptEncoderConfig, PromptTuningConfig

    tower = teacher.tower
    if tower.mask != "bidirectional" or tower.pooling not in ("mean", "cls", "max"):
        raise UserError(
            f"prompts do not fit a tower with {tower.mask} masks and {tower.pooling} pooling; "
            'set teacher.tuning = "lora"'
        )
    width, count = _hidden_size(tower.encoder), config.virtual_tokens
    prompt: nn.Module
    if config.tuning == "prompt":
        settings = PromptTuningConfig(num_virtual_tokens=count, token_dim=width, num_transformer_submodules=1)
        prompt = PromptEmbedding(settings, nn.Embedding(1, width))  # type: ignore[no-untyped-call]
        nn.init.normal_(prompt.embedding.weight, std=0.02)
    else:
        encoding = PromptEncoderConfig(
            num_virtual_tokens=count,
            token_dim=width,
            num_transformer_submodules=1,
            encoder_hidden_size=max(config.lora_rank, 16),
        )
        prompt = PromptEncoder(encoding)  # type: ignore[no-untyped-call]
    prompt.to(next(tower.encoder.parameters()).device)
    tower.encoder = PromptedEncoder(tower.encoder, prompt, count)
    return [parameter for parameter in prompt.parameters() if parameter.requires_grad]


def _hidden_size(encoder: nn.Module) -> int:
    settings: Any = encoder.config
    return int(settings.hidden_size)
