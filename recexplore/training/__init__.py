"""Training of both models, sharded over a mesh."""
