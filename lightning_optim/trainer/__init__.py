"""Everything that knows Lightning: the mixin, the callbacks, the strategies and the command line.

What a Trainer needs from ``build/`` and ``layerwise/`` is asked for here and nowhere above. The public names are those
of :mod:`lightning_optim`; ``_integration.py`` says in what order a fit meets the rest.
"""
