"""Rows in words → token batches, as SeqIO tasks."""
