"""What a platform calls."""
