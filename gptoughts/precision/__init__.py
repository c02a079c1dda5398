"""FP8 training: recipe, emulation, linears, and reports on what it loses."""
