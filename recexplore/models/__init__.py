"""flax.linen networks. They know nothing of recommendation."""
