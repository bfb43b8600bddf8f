"""Meshes, shardings and checkpoints of state that lives on many devices."""
