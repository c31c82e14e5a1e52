from edgeglm.adapt.library import PretrainedModel as PretrainedModel
from edgeglm.adapt.library import from_pretrained as from_pretrained
from edgeglm.train.schedules import AdaptiveLR as AdaptiveLR

__version__: str
