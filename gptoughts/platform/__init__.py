"""The machine: devices, determinism, and the patches that let megatron-core run on a CPU."""
