"""Everything that knows Lightning: the mixin, the callbacks, the strategies and the command line.

Only this room connects ``build/`` and ``layerwise/`` to a Trainer. The public names are in :mod:`lightning_optim`;
``_integration.py`` shows the order in which a fit calls the rest.
"""
