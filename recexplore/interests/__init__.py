"""Items → interest clusters, described in words."""
