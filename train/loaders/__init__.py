"""From a data set and views to batches on a device: torchvision, DALI, whole batches on the device, noise."""
