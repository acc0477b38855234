"""A command line, or a configuration that was saved, against what the options may be."""
