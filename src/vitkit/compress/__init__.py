"""Make a trained network cheaper, and say what was really saved: quantize, prune, merge tokens, distil, search."""
