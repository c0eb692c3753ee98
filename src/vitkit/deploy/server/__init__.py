"""A prediction server: one model behind HTTP, with batching, limits, metrics and a page."""

from vitkit.deploy.server.app import make_app
from vitkit.deploy.server.limits import Limits

__all__ = ["Limits", "make_app"]
