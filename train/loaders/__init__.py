"""From a data set and views to batches on a device: by torchvision, by DALI, on the device itself, or as noise."""
