"""A page of the literature: the user's library and the catalogue, to search and filter in a browser."""

from vitkit.catalogue.page.app import make_app

__all__ = ["make_app"]
