"""The recipe's table ``[teacher]`` and the tables in it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgeglm.core.section import Count, Dropped, Fraction, Positive, Rate, Section, Weight

Tuning = Literal["lora", "rslora", "dora", "ia3", "bottleneck", "prompt", "p-tuning", "partial", "full"]


class DomainConfig(Section, frozen=True, kw_only=True):
    """How the unlabelled images of the target style take part in the teacher; by default they do not.

    Options add up. ``mmd_weight``, ``coral_weight`` and ``dann_weight`` pull the embeddings of labelled and
    unlabelled images together while heads are trained: by kernel means (Long et al., DAN, 2015), by
    covariances (Sun & Saenko, Deep CORAL, 2016), or against a discriminator behind a gradient reversal
    (Ganin & Lempitsky, 2015). ``consistency_weight`` asks an unlabelled view for what the mean of all
    views says (mean teacher without a second network; Tarvainen & Valpola, 2017). ``curriculum`` is
    the share, risen to linearly, by which a labelled feature may be moved to the target's statistics:
    domains in between (MixStyle, Zhou et al., 2021; AdaBN, Li et al., 2016). ``pseudo_label_rounds`` times,
    after all else, images and concepts that choose each other become pairs, and the heads train
    ``pseudo_label_epochs`` more on them too (pseudo-labels: Lee, 2013; mutual neighbours as the test).
    """

    mmd_weight: Weight = 0.0
    coral_weight: Weight = 0.0
    dann_weight: Weight = 0.0
    consistency_weight: Weight = 0.0
    curriculum: Fraction = 0.0
    pseudo_label_rounds: Count = 0
    pseudo_label_epochs: Positive = 10

    def uses_unlabelled(self) -> bool:
        """Return whether any option is on."""
        weights = (self.mmd_weight, self.coral_weight, self.dann_weight, self.consistency_weight)
        return any(weights) or self.curriculum > 0 or self.pseudo_label_rounds > 0


class MultitaskConfig(Section, frozen=True, kw_only=True):
    """What the image head learns besides retrieval, while heads are trained; by default nothing.

    ``category_weight`` and ``subcategory_weight`` ask it to tell what kind of thing a labelled picture shows,
    as the pairs say (``data.categories``, or two keys of one's own lines). ``sharing`` is ``hard`` where the
    classifiers read the embedding itself (Caruana, 1997), and ``soft`` where they have an image head of their
    own, whose parameters ``soft_weight`` pulls to those of the first (Duong et al., 2015). ``balance`` says
    how the losses weigh: ``fixed``; ``uncertainty``, by a learned variance each (Kendall et al., 2018);
    ``gradnorm``, so that all learn at one pace, ``gradnorm_alpha`` strictly (Chen et al., 2018); ``pcgrad``,
    with gradients projected where they conflict (Yu et al., 2020; by ``torchjd``).

    ``reptile_rounds`` above 0 finds a first state of the heads before all else: a round takes
    ``reptile_steps`` steps on one style, or one category, and moves the heads by ``reptile_reach`` of the way
    there, less and less (Reptile, Nichol et al., 2018).
    """

    category_weight: Weight = 0.0
    subcategory_weight: Weight = 0.0
    sharing: Literal["hard", "soft"] = "hard"
    soft_weight: Weight = 0.01
    balance: Literal["fixed", "uncertainty", "gradnorm", "pcgrad"] = "fixed"
    gradnorm_alpha: Weight = 1.5
    reptile_rounds: Count = 0
    reptile_over: Literal["styles", "categories"] = "styles"
    reptile_steps: Positive = 5
    reptile_reach: Fraction = 0.5


class PretrainingConfig(Section, frozen=True, kw_only=True):
    """How the text tower reads texts of the domain before anything is aligned; by default it does not.

    ``corpus`` names text files (UTF-8: a sentence a line, an empty line between documents) or ``.jsonl``
    files with ``text``, from the recipe's folder, or ``cldr``, the names and keywords of emoji; ``epochs``
    above 0 reads them so often. Three objectives add up: ``mlm_weight``, masked language modelling
    (BERT, Devlin et al., 2019), ``mask_fraction`` of the tokens masked; ``order_weight``, whether two
    neighbouring sentences were swapped (ALBERT, Lan et al., 2020); ``term_weight``, which term of the domain
    was masked as a whole (entity masking of ERNIE, Sun et al., 2019). ``anchor_weight`` keeps the features
    of a sentence near what they were (Learning without Forgetting, Li & Hoiem, 2016). ``glossary`` is a file
    with a term a line, other spellings after tabs; without one the terms are the captions that train.

    Texts are cleaned first. ``deidentify = "patterns"`` replaces ids, telephone and card numbers, addresses
    of mail and machines, and names beside a title or a label; ``"presidio"`` finds names too, by
    Microsoft Presidio with the spaCy model ``name_model``; ``"off"`` replaces nothing. Lines that say what
    an evaluation asks for are never read.
    """

    corpus: tuple[str, ...] = ()
    epochs: Count = 0
    mlm_weight: Weight = 1.0
    order_weight: Weight = 0.0
    term_weight: Weight = 0.0
    anchor_weight: Weight = 0.0
    mask_fraction: Annotated[float, msgspec.Meta(gt=0.0, le=0.5)] = 0.15
    glossary: str = ""
    deidentify: Literal["off", "patterns", "presidio"] = "patterns"
    name_model: str = "en_core_web_sm"
    batch_size: Positive = 32
    learning_rate: Rate = 5e-5
    max_length: Annotated[int, msgspec.Meta(ge=8)] = 64


class AuxiliaryConfig(Section, frozen=True, kw_only=True):
    """Named icons of other domains that heads are trained on besides one's own pairs; by default none.

    ``icons`` names icon sets of the catalogue (``game-icons``, ``healthicons``, ``pinhead`` and ``temaki``
    draw some 7,000 things). Before anything else the heads are trained on them and the
    labelled pairs together for ``epochs`` passes: supervised pre-training on an intermediate task
    (Phang et al., STILTs, 2018) by the contrast of CLIP. While the heads are trained on
    features after that, ``replay`` is the share of each batch that is drawn from the icons, so that what
    they taught is not forgotten (experience replay, Rolnick et al., 2019). An icon that says the name
    of an unseen concept is never taken.
    """

    icons: tuple[str, ...] = ()
    epochs: Positive = 20
    replay: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.25


class ConseConfig(Section, frozen=True, kw_only=True):
    """What an ImageNet classifier calls a picture, beside what the heads learn; by default nothing.

    With ``weight`` above 0 an image's embedding is what its head says plus ``weight`` times the mean of the
    names of EfficientNet-Lite0's classes by their probabilities (ConSE, Norouzi et al., 2014), and a text's
    what its head says plus ``weight`` times its own features along the same axes. Nothing of that second
    part is learned, so that it tells of things that no labelled pair shows. Probabilities are those of
    logits at ``temperature``, less their mean over the labelled pictures; ``resolution`` is the side of the
    classifier's input in pixels. A class that says the name of an unseen concept is never named.
    """

    weight: Weight = 0.0
    temperature: Rate = 1.5
    resolution: Positive = 224


class OptimisationConfig(Section, frozen=True, kw_only=True):
    """How the teacher's loops step; the defaults are a warm-up, a cosine, and nothing else.

    ``schedule`` is the fall of the rate. ``adaptive_clip`` above 0 keeps each unit's gradient below that
    ratio of its weights (AGC, Brock et al., 2021; 0.01 to 0.1). ``accumulate`` batches make one step.
    ``patience`` above 0 stops after so many epochs without a better mean loss. The state in which a phase
    ends is kept in the store until the teacher is done, and so is the last good one of a loss that diverges;
    with ``checkpoint_epochs`` above 0 the state is kept every so many epochs too. A build that was killed
    goes on from what is kept. ``precision`` is that of the forward pass: ``bfloat16`` by autocast
    (Micikevicius et al., 2018; Kalamkar et al., 2019), ``auto`` where the device multiplies it; weights stay
    float32.
    """

    schedule: Literal["cosine", "exponential"] = "cosine"
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    adaptive_clip: Weight = 0.0
    accumulate: Positive = 1
    patience: Count = 0
    checkpoint_epochs: Count = 0


class TeacherConfig(Section, frozen=True, kw_only=True):
    """The pretrained towers and how they are aligned on the pairs.

    ``image`` lists the backbones, ``text`` is the text model: names of pinned assets, ``hf:owner/name``
    ids or local folders. Where there are several backbones one head reads the features of all (``ensemble
    = "joined"``), or each has a head of its own and the embedding is their sum, at scales that are
    learned from the pairs too (``"scaled"``). ``views`` counts the augmented copies of each image,
    ``resolution`` is in pixels (0: the checkpoint's own). Three phases follow one another: the heads on
    frozen features (``warmup_epochs``), LoRA on the text tower (``lora_epochs``; 0 leaves it frozen), and
    the heads again on what that gave (``epochs``). With ``heads`` above 1 so many pairs of heads are
    trained, each from a seed of its own, and their embeddings are joined into one (deep ensembles,
    Lakshminarayanan et al., 2017). ``domain`` brings in unlabelled images, ``multitask``
    other things to learn, ``pretraining`` texts to read first, ``auxiliary`` named icons of other domains,
    ``conse`` what a classifier calls a picture.

    ``tuning`` says how the text tower is tuned in the second phase: ``lora`` (Hu et al., 2022), ``rslora``
    (Kalajdzievski, 2023), ``dora`` (Liu et al., 2024), ``ia3`` (Liu et al., 2022), ``bottleneck`` adapters
    (Houlsby et al., 2019), ``prompt`` (Lester et al., 2021) or ``p-tuning`` (Liu et al., 2021) with
    ``virtual_tokens``, ``partial`` (the last ``tuned_blocks`` blocks) or ``full``; the last two learn at
    ``tuned_rate``, all others at ``lora_learning_rate``. ``lora_targets`` names the linear layers that are
    adapted; where it names none they are the query and value layers, by the model's own names. With
    ``tuned_blocks`` above 0 only so many last blocks are tuned, by any way but prompts, and what the blocks
    before them say is computed once and kept. With ``image_blocks`` above 0 so many last blocks of
    ``efficientnet-lite0`` are tuned on pictures before all that, at ``image_rate``, for ``image_epochs``
    passes in batches of ``image_batch_size``, by what ``domain`` and ``multitask`` ask of heads too; the
    three phases then go on from the features that this gave. ``vocabulary`` above 0 keeps so many entries
    of the text tower's vocabulary, for models of a hundred languages: single characters, those of the
    captions and of whatever else the teacher is told by name, and the most frequent others.
    """

    image: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = ("efficientnet-lite0",)
    text: str = "minilm-l6"
    vocabulary: Count = 0
    ensemble: Literal["joined", "scaled"] = "joined"
    embedding_dim: Positive = 256
    resolution: Count = 128
    views: Count = 3
    hidden: Positive = 512
    heads: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    warmup_epochs: Positive = 8
    epochs: Positive = 20
    batch_size: Positive = 512
    learning_rate: Rate = 1e-3
    weight_decay: Fraction = 0.05
    input_dropout: Dropped = 0.3
    dropout: Dropped = 0.2
    temperature: Rate = 0.05
    lora_epochs: Count = 2
    lora_batch_size: Positive = 256
    lora_learning_rate: Rate = 1e-3
    lora_rank: Positive = 8
    lora_alpha: Rate = 16.0
    lora_dropout: Dropped = 0.05
    lora_targets: tuple[str, ...] = ()
    tuning: Tuning = "lora"
    tuned_blocks: Count = 0
    tuned_rate: Rate = 1e-4
    virtual_tokens: Positive = 8
    image_blocks: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0
    image_epochs: Positive = 4
    image_rate: Rate = 2e-4
    image_batch_size: Positive = 64
    domain: DomainConfig = DomainConfig()
    multitask: MultitaskConfig = MultitaskConfig()
    pretraining: PretrainingConfig = PretrainingConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    conse: ConseConfig = ConseConfig()
    optimisation: OptimisationConfig = OptimisationConfig()
