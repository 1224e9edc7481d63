"""A look at all of a data set, before a config is written for it."""
