"""Recipes of both papers, one experiment a file.

Each starts as a file, or as `python -m hetero_kt.launchers.NAME` where the package is installed.
"""
