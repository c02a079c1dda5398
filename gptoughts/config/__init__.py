"""Configuration: the typed tree, DeepSpeed's JSON, validation and the command line; imports no torch."""
