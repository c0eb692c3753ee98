"""Token merging: fewer tokens for the same image, and a way back to all of them.

The modules carry their methods' names: ``tome.tome``, ``dymu.dymu`` and ``dymu.fit_thresholds``, ``vtu.vtu_attention``.
"""

from vitkit.compress.merge import dymu, tome, vtu
from vitkit.compress.merge.matching import forward_tokens

__all__ = ["dymu", "forward_tokens", "tome", "vtu"]
