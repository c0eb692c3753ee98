"""The one way to look inside a model: roles, capture, intervention, exact decomposition."""

from vitkit.anatomy.capture import (
    Intervene,
    SiteContext,
    Trace,
    add,
    expand,
    linear_inputs,
    scale,
    set_to,
    site_names,
    uniform_attention,
    zero,
)
from vitkit.anatomy.check import check
from vitkit.anatomy.decompose import Decomposition, decompose_residual
from vitkit.anatomy.host import find_host, host
from vitkit.anatomy.roles import linear_groups, role_of, roles
from vitkit.anatomy.untouched import untouched

__all__ = [
    "Decomposition",
    "Intervene",
    "SiteContext",
    "Trace",
    "add",
    "check",
    "decompose_residual",
    "expand",
    "find_host",
    "host",
    "linear_groups",
    "linear_inputs",
    "role_of",
    "roles",
    "scale",
    "set_to",
    "site_names",
    "uniform_attention",
    "untouched",
    "zero",
]
