"""The kernels: what the compiler makes of them, and block sizes by time."""
