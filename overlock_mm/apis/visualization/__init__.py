"""Pictures: a module for each figure, with a function of the same name."""
