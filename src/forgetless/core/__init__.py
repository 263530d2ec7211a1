"""The mathematics, and the few things that every room stands on: errors, files, settings, bars."""
