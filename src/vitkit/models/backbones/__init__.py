"""Published networks with a data flow of their own: pyramids, feature maps, points, recurrent state, curved space.

Importing this package registers them with timm, so that ``timm.create_model(name)`` and ``vitkit study`` know them.
"""
