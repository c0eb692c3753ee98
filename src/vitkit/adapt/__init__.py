"""A trained model for a new purpose: other heads, other tasks, other domains."""
