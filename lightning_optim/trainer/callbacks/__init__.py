"""Lightning callbacks, one per file; their public names are in :mod:`lightning_optim`."""
