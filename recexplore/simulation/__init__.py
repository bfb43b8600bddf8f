"""Users whose truth is known."""
