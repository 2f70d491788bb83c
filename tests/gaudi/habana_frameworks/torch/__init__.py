"""Stands for Intel's package, on the software device."""
