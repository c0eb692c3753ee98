"""Objectives: self-supervised pretraining, and training from labels that is more than a loss on the outputs."""

from vitkit.pretrain.defect_mae import DefectMAE
from vitkit.pretrain.mae import MAE
from vitkit.pretrain.point_dg import PointDG
from vitkit.pretrain.tscnet import TSCNet
from vitkit.pretrain.unit_mae import UnitMAE

__all__ = ["MAE", "DefectMAE", "PointDG", "TSCNet", "UnitMAE"]
