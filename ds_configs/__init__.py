"""DeepSpeed's zero_optimization block for each ZeRO stage."""
