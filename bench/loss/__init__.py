"""The loss alone: time, memory, processes, published code."""
