"""What is trained: networks, their loss, optimizer and schedule, and DistributedDataParallel around them."""
