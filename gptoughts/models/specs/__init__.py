"""Layer specs that pick the modules of a transformer layer."""
