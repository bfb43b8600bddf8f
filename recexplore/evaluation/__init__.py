"""How good is it: arrays in, numbers and pages out."""
