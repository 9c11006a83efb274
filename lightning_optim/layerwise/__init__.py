"""The layerwise engine: steps buckets of parameters during backward and frees their gradients. Pure PyTorch.

README.md in this folder explains it; the public names are in :mod:`lightning_optim`.
"""
