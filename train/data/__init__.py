"""The data sets: which images, which labels, and whether their files are whole."""
