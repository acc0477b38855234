"""What is trained: networks, their loss, optimiser and schedule, and DistributedDataParallel around them."""
