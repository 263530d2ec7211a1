"""Adapters on an untouched base: the only package that knows PEFT's insides.

`layer` is the anchored layer, `attachment` puts a method's start on a model, `folders` writes and
reads adapters.
"""
