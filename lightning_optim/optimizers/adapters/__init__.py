"""Thin subclasses of upstream optimizers, one file per package, each fixing what its docstring names.

These modules import their package at the top: only :meth:`OptimizerSpec.load` may import them.
"""
