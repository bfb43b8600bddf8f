"""recexplore: LLM-powered exploration for recommender systems, on JAX."""

__version__ = "0.1.0"
