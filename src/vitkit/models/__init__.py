"""The host, its parts, and networks of other shapes."""

# before any module of this package, since importing timm registers our networks, which need those modules whole
import timm  # noqa: F401
