"""Self-supervised pretraining objectives."""

from vitkit.pretrain.defect_mae import DefectMAE
from vitkit.pretrain.mae import MAE

__all__ = ["MAE", "DefectMAE"]
