"""Model families, built from megatron-core layer specs."""
