"""Data sets that the package makes itself."""
