"""Bridges to other frameworks, for those who have them; nothing else needs them."""
