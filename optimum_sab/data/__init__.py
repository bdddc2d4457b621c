"""Pictures and texts drawn by this package, so that nothing has to be downloaded; and what a string of data names."""
