"""DeepSpeed's engine under megatron-core's schedules."""
