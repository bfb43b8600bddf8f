"""The compiled step: arrays in, arrays out; no logs, no text."""
