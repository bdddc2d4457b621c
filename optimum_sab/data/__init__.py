"""Pictures and texts drawn by this package, so that nothing has to be downloaded."""
