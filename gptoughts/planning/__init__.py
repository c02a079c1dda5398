"""What a run would need and how fast it would be in any layout, by arithmetic alone."""
