"""From an image to a view of it: with torchvision (the reference), in whole batches, as a DALI graph."""
