"""Thin subclasses of upstream optimizers, one file per package, each mending what its docstring names.

These modules import their package at the top: nothing but :meth:`OptimizerSpec.load` may import them.
"""
