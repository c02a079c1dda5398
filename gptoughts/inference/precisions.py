"""In which precisions a model answers; imports no torch."""

PRECISIONS = ("fp32", "bf16")
