"""Locations of images, and reading images from files that hold many images."""
